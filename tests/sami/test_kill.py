"""SIGKILL at telling moments of a run in a process of its own; the restarted run ends as an undisturbed one does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.sami.test_run import arguments, files, results  # noqa: F401 (fixtures)


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS = {
    "original half sampled": lambda run: lines(run / "round_0" / "eval_samples.jsonl") >= 1,
    "rows half sampled": lambda run: lines(run / "round_1" / "samples.jsonl") >= 1,
    "training begun": lambda run: (run / "round_1" / "sampling.json").exists(),
    "second round's model there": lambda run: (run / "round_2" / "model").exists(),
}


@pytest.mark.slow
def test_killed_at_several_moments(arguments, files):  # noqa: F811
    def start(output):
        command = [sys.executable, "-m", "trl_extensions", "sami", "run", *arguments(output)]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole = start("whole")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors[-3000:]
    killed = []
    for name, reached in MOMENTS.items():
        process = start("pieces")
        while process.poll() is None and not reached(files / "pieces"):
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed.append(name)
        process.communicate()
    assert len(killed) >= 3, f"the run was too fast to be killed: {killed}"
    last = start("pieces")
    _, errors = last.communicate()
    assert last.returncode == 0, errors[-3000:]
    assert results(files / "pieces") == results(files / "whole")
