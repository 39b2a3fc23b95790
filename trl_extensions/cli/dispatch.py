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
