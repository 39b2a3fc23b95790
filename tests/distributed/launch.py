"""Start a script in one or several processes that form a process group, and wait for all of them."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
HANGS_AFTER = 300  # seconds; a process whose peer died waits for half an hour otherwise


def run_processes(script: Path, arguments: list[str], *, processes: int, folder: Path) -> None:
    """Run `script` once per rank; fails with the output of a rank that failed.

    The script calls `join` first. Ranks meet through a file in `folder` and the loopback interface: torchrun would
    look host names up, which hangs where no name server answers.
    """
    common = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": str(processes),
        "STORE": str((folder / "store").resolve()),
    }  # fmt: skip
    logs = [folder / f"rank_{rank}.log" for rank in range(processes)]
    running = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            running.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(HANGS_AFTER) for process in running]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * processes, "\n\n".join(log.read_text()[-3000:] for log in logs)


def join() -> None:
    """Inside the script, before anything of accelerate: become a rank of the group."""
    import torch

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def leave() -> None:
    """Inside the script, as its last act and with the trainer still alive: end at once.

    Torch destroys the process group while it holds the interpreter's lock, and joins a thread of gloo that may be
    waiting for this lock to let go of the last tensors it gathered: a rank in a hurry then never ends.
    """
    sys.stdout.flush()
    os._exit(0)
