"""Options of the commands: parsing and YAML, in which recipes name files from where they lie, and `--help`."""

import argparse
import contextlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NoReturn

from trl_extensions.core.options import did_you_mean, message, old_names

from .recipes import NO_INPUTS, beside, config_file, known_recipes


def option_parser(
    command: str, dataclasses: Sequence[Any], quiet: bool = False, *, trains: bool = True, **defaults: Any
) -> Any:
    """TRL's parser of options and YAML, with one-line errors, and old names (`quiet`: without a word about those).

    Options of a trainer are known but no more than stored for a command that has none (`trains=False`): looking at
    devices, or refusing what only training cannot do, is of no use there. `defaults` are those of single options.
    """
    from trl import TrlParser

    renamed = {old: new for cls in dataclasses for old, new in old_names(cls).items()}
    known = {f.name for cls in dataclasses for f in fields(cls) if f.init}
    told = set(renamed) if quiet else set()

    def translate(name: str, given: set[str]) -> str:
        old = name.replace("-", "_")  # dashes do too, as in the parser
        new = renamed.get(old, name)
        if new != name and new in given:
            raise ValueError(f"`{old}` is now called `{new}`: give one of the two")
        if new != name and old not in told:
            told.add(old)
            print(f"trl-ext: {message(old, new)}", file=sys.stderr)
        return new

    class OptionParser(TrlParser):
        launching = False  # whether what is not known here is left for a launcher

        def parse_args_and_config(self, args=None):  # type: ignore[override]
            return self.parse_args_into_dataclasses(args)

        def parse_known_args(self, args=None, namespace=None):
            config, rest = _take(args or (), "--config")
            if config is not None:
                self.set_defaults_with_config(**read_settings(config))
            pairs = [item.partition("=") for item in rest]
            given = {name[2:].replace("-", "_") for name, _, _ in pairs if name.startswith("--")}
            rest = [f"--{translate(n[2:], given)}{s}{v}" if n.startswith("--") else n + s + v for n, s, v in pairs]
            found, unknown = super().parse_known_args(rest, namespace)
            if unknown and not self.launching:
                name = unknown[0].partition("=")[0]
                self.error(f"unknown option {name}{did_you_mean(name.lstrip('-').replace('-', '_'), known, '--')}")
            return found, unknown

        def set_defaults_with_config(self, **values):
            os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
            values = {translate(name, set(values)): value for name, value in values.items()}
            for name in values.keys() - known:
                raise ValueError(f"--config: unknown key `{name}`{did_you_mean(name, known)}; correct or remove it")
            return super().set_defaults_with_config(**values)

        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message} (`{self.prog} --help` lists what it takes)")

    parser = OptionParser(tuple(dataclasses), prog=f"trl-ext {command}", allow_abbrev=False)
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    if not trains:
        idle: dict[str, Any] = {"__post_init__": lambda self: None}
        known_as: Any = [type(c.__name__, (c,), idle) if hasattr(c, "warmup_steps") else c for c in dataclasses]
        parser.dataclass_types = known_as
    return parser


def read_settings(config: str) -> dict[str, Any]:
    """The settings of a YAML file or a recipe; files that they name as seen from here."""
    import yaml

    path = Path(config_file(config))
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, not settings; write `name: value`, one a line")
    return {name: own if name in NO_INPUTS else beside(own, path.parent) for name, own in settings.items()}


def peek(argv: Sequence[str], *names: str) -> list[str]:
    """What the command line, and then its YAML, say about a setting that decides what other settings there are."""
    config, _ = _take(argv, "--config")
    given, _ = _take(argv, *(f"--{name}" for name in names), nargs="?", const="true")
    settings = read_settings(config) if config is not None else {}
    return [str(value) for value in (given, *(settings.get(name) for name in names)) if value is not None]


def _take(argv: Sequence[str], *names: str, **how: Any) -> tuple[str | None, list[str]]:
    """The value of an option, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="value", **how)
    found, rest = parser.parse_known_args(argv)
    return found.value, rest


# What most people set of the options that are TRL's
_USUAL = "model_name_or_path, output_dir, max_steps, per_device_train_batch_size, dtype, use_peft, load_in_4bit, seed"


def wants_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help", "--help-all"} & set(argv))


def help_text(command: str, options: Callable[[list[str]], Sequence[Any]], argv: list[str]) -> str:
    """What `--help` says of a command: its options, a group for each dataclass; with `--help-all` also those that are
    TRL's, which takes seconds to import."""
    if everything := "--help-all" in argv:
        return _describe(command, options(argv), everything)
    with contextlib.suppress(Exception), _stand_ins():
        return _describe(command, options(argv), everything)
    return _describe(command, options(argv), everything)


def _describe(command: str, dataclasses: Sequence[Any], everything: bool) -> str:
    name, method, is_run = f"trl-ext {command}", command.split()[0], command.endswith(" run")
    example = next((recipe for recipe in known_recipes() if recipe.startswith(f"smollm2-135m/{method}/")), None)
    width = min(120, shutil.get_terminal_size().columns)
    parser = argparse.ArgumentParser(
        usage=f"{name} [--config FILE or RECIPE] [--OPTION VALUE ...] [--json] [--quiet]{' [--dry_run]' * is_run}",
        description=f"For example: {name} --config {example} --output_dir runs/mine" if example else None,
        epilog=None if everything else f"`{name} --help-all` lists TRL's options too, such as {_USUAL}.",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width),
    )
    known: list[Any] = [cls for cls in dataclasses if is_dataclass(cls)]  # those of TRL may be stand-ins
    for cls in known:
        bases = [base for base in cls.__mro__ if base.__module__.startswith("trl_extensions.")]
        own = {name for base in bases for name in inspect.get_annotations(base)}
        doc = " ".join((cls.__doc__ or "").split()).partition(". ")[0].rstrip(".") if bases else "TRL's"
        group = parser.add_argument_group(f"{cls.__name__} ({doc})")
        for f in sorted(fields(cls), key=lambda f: f.name not in own):
            if f.init and (everything or f.name in own):
                default = f.default if f.default_factory is MISSING else f.default_factory()
                shown = "" if default in (MISSING, None, "", []) else f" [{default}]"
                choices = f.metadata.get("choices") or re.findall(r"(?:al\[|, )['\"](\w+)", str(f.type)) or ["VALUE"]
                about = f"{f.metadata.get('help', '')}{shown}".strip().replace("%", "%%")
                group.add_argument(f"--{f.name}", metavar="|".join(map(str, choices)), help=about)
    return parser.format_help()


class _Anything(type):
    """Stands for a module, class or function of a library: has every attribute, as have its instances, and these give
    back what they decorate."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        own: dict[str, Any] = {"__init__": lambda *_, **__: None, "__getattr__": lambda self, name: getattr(cls, name)}
        return _Anything(name, (), own | {"__call__": lambda self, *given, **_: (*given, self)[0]})


class _StandIns:
    """Finds and loads such modules in place of all but Python's own and this package's."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"trl_extensions", "packaging", "yaml", *sys.stdlib_module_names}:
            return ModuleSpec(name, _StandIns, is_package=True)  # type: ignore[arg-type]

    create_module = staticmethod(lambda spec: _Anything(spec.name, (), {}))
    exec_module = staticmethod(lambda module: None)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Import modules of this package without libraries, for their options' sake, and forget them afterwards; where TRL
    is loaded already, nothing is done."""
    before = set(sys.modules)
    sys.meta_path[:0] = [] if "trl" in before else [_StandIns]  # type: ignore[list-item]
    try:
        yield
    finally:
        if _StandIns in sys.meta_path:  # type: ignore[comparison-overlap]
            sys.meta_path.remove(_StandIns)  # type: ignore[arg-type]
            for name in sys.modules.keys() - before:
                del sys.modules[name]
