"""How long `import trl_extensions` and `trl-ext --help` take beyond Python's own start, and what they load."""

import statistics
import subprocess
import sys
import time


_RUNS = {
    "python": "pass",
    "import": "import trl_extensions",
    "help": "import sys; from trl_extensions.cli.main import main; main(['--help'])",
}


def measure_startup(repeats: int = 11) -> dict[str, float | bool]:
    """Median seconds over alternated fresh interpreters.

    Returns:
        `python` (a start alone), `import` and `help` (each a whole run), and whether these load torch:
        `loads_torch` (the import) and `help_loads_torch`.
    """
    seconds = {name: [] for name in _RUNS}
    for _ in range(repeats):
        for name, code in _RUNS.items():
            start = time.perf_counter()
            _run(code)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {"loads_torch": _loads_torch("import"), "help_loads_torch": _loads_torch("help")}


def _loads_torch(name: str) -> bool:
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {_RUNS[name]}"
    return _run(code).splitlines()[-1] == "True"


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
