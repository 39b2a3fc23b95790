"""SIGKILL at random moments of runs in their own processes, against a real server; they end as if nothing happened."""

import json
import logging
import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import openai
import pytest

from tests.codeclm.server import Server, finished_calls, key_of_call, serving
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.core.generation import endpoint
from trl_extensions.core.generation.endpoint import EndpointEngine
from trl_extensions.core.runs.jsonl import read_jsonl


CONCURRENCY = 8
KILLS = 12
FILES = ("metadata.jsonl", "basics.jsonl", "basics.json", "data.jsonl", "export.json")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")


def work(url, folder, name):
    """A run in a process of its own, which tells the server its name."""
    # A shell that runs this in the background hands on that interrupts are ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    openai._base_client.MAX_RETRY_DELAY = openai._base_client.INITIAL_RETRY_DELAY = 0.001
    endpoint._FIRST_PAUSE = endpoint._LONGEST_PAUSE = 0.001
    engines = (
        EndpointEngine(url, model, api_key=name, concurrency=CONCURRENCY, max_retries=50)
        for model in ("strong", "target")
    )
    config = CodecLMConfig(prompts=str(folder.parent / "seeds.jsonl"), num_instructions=16, max_rounds=3)
    CodecLM(config, folder, **dict(zip(("strong", "target"), engines, strict=True))).run()


@pytest.fixture(scope="module")
def processes():
    """Processes that are forked from one that has imported everything: real ones, and there at once."""
    context = multiprocessing.get_context("forkserver")
    late = ("datasketch", "jinja2", "tqdm.auto", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "stringprep")
    context.set_forkserver_preload([__name__, "trl_extensions.codeclm.report", "matplotlib.figure", *late])
    return context


@pytest.fixture
def start(processes, tmp_path):
    seeds = [{"instruction": f"Please help me with the {word} that I found"} for word in ("egg", "map", "bug", "poem")]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    started = []

    def start(url, name, run):
        process = processes.Process(target=work, args=(url, tmp_path / name, run), daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def made(folder):
    """The requests whose answers are in the log, as the next process will find it."""
    return list(map(key_of_call, finished_calls(folder))) if (folder / "calls.sqlite").exists() else []


def phase(folder):
    names = ("data.jsonl", "items.jsonl", "basics.jsonl", "calls.sqlite")
    return next((name for name in names if size(folder / name)), "nothing")


def size(path):
    return path.stat().st_size if path.exists() else 0


def until(reached, process):
    while process.is_alive() and not reached():
        time.sleep(0.0005)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(start, tmp_path, seed):
    """Twelve kills a run: after a number of requests drawn at random, and when files of the other phases appear."""
    draw = random.Random(seed)
    with serving(Server()) as url:
        start(url, "whole", "whole").join()
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in FILES}
    total = len(made(tmp_path / "whole"))
    assert total > 150

    folder, server = tmp_path / "pieces", Server(delay=0.004, spread=1.0, failures=0.1, seed=seed)
    moments = ["calls.sqlite", *["requests"] * (KILLS - 3), "data.jsonl", "export.json"]
    phases, logged = [], {}
    with serving(server) as url:
        for number, what in enumerate(moments):
            name = f"{number}"
            before = len(server.log)
            process = start(url, "pieces", name)
            if what == "requests":
                left = total - len(made(folder))
                step = min(draw.randint(1, 2 * total // KILLS), left // 2)
                until(lambda before=before, step=step: len(server.log) >= before + step, process)
                time.sleep(draw.uniform(0, 0.004))
            else:
                until(lambda what=what: size(folder / what), process)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, f"the run was over before kill {number}"
            phases.append(phase(folder))
            logged[name] = set(made(folder))
        last = start(url, "pieces", "last")
        last.join()
        assert last.exitcode == 0
    assert {name: (folder / name).read_bytes() for name in FILES} == whole
    by_id = [
        sorted(read_jsonl(tmp_path / name / "items.jsonl"), key=lambda row: row["id"]) for name in ("whole", "pieces")
    ]
    assert by_id[0] == by_id[1], "each instruction once, whatever came before"
    assert {"calls.sqlite", "items.jsonl", "data.jsonl"} <= set(phases), phases

    # What was in the log at a kill was not asked for by any process after it
    runs = [*map(str, range(len(moments))), "last"]
    for place, name in enumerate(runs[:-1]):
        later = {key for run, key in server.log if run in runs[place + 1 :]}
        assert not later & logged[name], f"asked again after kill {name}"
    # Besides, at each kill as many answers were on their way as requests may be, of two engines
    assert sum(server.answered.values()) - len(server.answered) <= 2 * CONCURRENCY * len(moments)
    assert Counter(made(folder)) == Counter(made(tmp_path / "whole")), "every call is in the log, and once"


def test_interrupted_while_the_server_is_slow(start, tmp_path):
    """Ctrl-C does not wait for answers that take an hour, and the next run goes on."""
    server = Server(delay=3600.0)
    with serving(server) as url:
        process = start(url, "run", "first")
        until(lambda: server.in_flight == 4, process)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode not in (None, 0) and server.in_flight == 4
    with serving(Server()) as url:
        start(url, "run", "second").join()
    assert read_jsonl(tmp_path / "run" / "data.jsonl")
