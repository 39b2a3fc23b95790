"""One command of a method, by name."""

import warnings
from collections.abc import Callable, Sequence


def dispatch(argv: Sequence[str], usage: str, commands: dict[str, Callable[[list[str]], int | None]]) -> int:
    """Run the command `argv` begins with, or print how to use it.

    Args:
        argv: The arguments behind the method's name.
        usage: What `--help` prints.
        commands: What there is; "stage" is for runs that start their stages in processes of their own.

    Returns:
        Exit code.

    Raises:
        ValueError: There is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    # Deprecations between the libraries below are nothing a user of these commands can act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    if argv[0] not in commands:
        offered = ", ".join(name for name in commands if name != "stage")
        raise ValueError(f"unknown command {argv[0]!r}; choose from {offered}")
    return commands[argv[0]](list(argv[1:])) or 0


def peek(argv: Sequence[str], name: str) -> list[str]:
    """What the command line and the YAML it names say about one setting, which decides what other settings there are.

    Args:
        argv: The arguments of a command.
        name: The setting.

    Returns:
        None, one or two values as text, the command line's first.
    """
    import argparse

    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", dest="value", nargs="?", const="true")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(argv)
    values = [given.value]
    if given.config:
        with open(given.config, encoding="utf-8") as file:
            try:
                settings = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{given.config} is not YAML ({' '.join(str(error).split())}); correct it") from None
        values.append(settings.get(name) if isinstance(settings, dict) else None)
    return [str(value) for value in values if value is not None]
