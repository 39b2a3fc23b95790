import json
import logging
import math
import threading

import pytest

from trl_extensions.core.generation.calls import Call, CallLog, Reply, _KeyIndex
from trl_extensions.core.generation.types import Generation, GenerationParams


def call(prompt="hi", step="encode", engine="endpoint:m", options=(), **params):
    return Call(step, engine, prompt, GenerationParams(**params), options)


def chat(text):
    return [{"role": "user", "content": text}]


ROUND_TRIPS = {
    "text": (call("hi"), Reply("there", "stop", 3, 5)),
    "chat": (call(chat("hi"), temperature=0.7, seed=4, stop=("END", "\n")), Reply("cut", "length", 9, 0)),
    "options": (call(options=("7", "8")), Reply("", "length", 1, 4, (-0.25, -math.inf))),
    "unicode": (call(chat("日本 🦊 \u2028 \x00"), step="é"), Reply('"quoted"\nlines \u2029 \r\n 🦊', "stop", 1, 1)),
    "half a surrogate pair": (call("half \ud83d pair"), Reply("fine", "stop", 1, 1)),
}


@pytest.mark.parametrize("name", list(ROUND_TRIPS))
def test_what_was_added_is_found(tmp_path, name):
    made, reply = ROUND_TRIPS[name]
    with CallLog(tmp_path / "calls.jsonl") as log:
        assert log.find(made) is None and len(log) == 0
        log.add(made, reply)
        assert log.find(made) == reply and len(log) == 1
    with CallLog(tmp_path / "calls.jsonl") as log:
        assert log.find(made) == reply and len(log) == 1
        (row,) = log.rows()
    assert (row["key"], row["step"], row["engine"]) == (made.key, made.step, made.engine)
    assert ("options" in row) == bool(made.options)


def test_the_key_stands_for_all_of_a_call():
    different = [
        call(), call("ho"), call(chat("hi")), call(step="decode"), call(engine="endpoint:n"), call(options=("7",)),
        call(options=("7", "8")), call(seed=1), call(temperature=0.5), call(top_p=0.5), call(max_new_tokens=9),
        call(stop=("x",)),
    ]  # fmt: skip
    assert len({own.key for own in different}) == len(different)
    assert all(len(own.key) == 32 and int(own.key, 16) >= 0 for own in different)
    assert call(chat("hi")).key == call(chat("hi")).key


def test_a_reply_is_the_same_before_and_after_the_log(tmp_path):
    """Half a surrogate pair, which a file cannot hold: a run that was killed must not go on with another text."""
    reply = Reply.of(Generation("half \ud83d pair", "stop", 3, 2))
    with CallLog(tmp_path / "calls.jsonl") as log:
        log.add(call(), reply)
        assert log.find(call()) == reply


def test_half_written_last_line_is_repaired(tmp_path):
    path = tmp_path / "calls.jsonl"
    with CallLog(path) as log:
        for number in range(3):
            log.add(call(str(number)), Reply(f"reply {number}"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with CallLog(path) as log:
        assert [log.find(call(str(number))) for number in range(3)] == [Reply("reply 0"), Reply("reply 1"), None]
        log.add(call("2"), Reply("again"))
        assert log.find(call("2")) == Reply("again") and log.find(call("1")) == Reply("reply 1")
    assert len(path.read_bytes().splitlines()) == 3


BREAKS = {
    "beginning lost": lambda line: b"\x00" * 30 + line[30:],
    "end lost": lambda line: line[:-20] + b"\x00" * 19 + b"\n",
    "middle lost": lambda line: line[:60] + b"\x00" * 20 + line[80:],
    "no text": lambda line: b"\xff\xfe\n",
    "empty": lambda line: b"\n",
    "two lines in one": lambda line: line[:70] + line,
}


@pytest.mark.parametrize("name", list(BREAKS))
def test_a_broken_line_costs_one_call_and_a_warning(tmp_path, caplog, name):
    path = tmp_path / "calls.jsonl"
    with CallLog(path) as log:
        for number in range(3):
            log.add(call(str(number)), Reply(f"reply {number}"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + BREAKS[name](lines[1]) + lines[2])
    with caplog.at_level(logging.WARNING), CallLog(path) as log:
        assert [log.find(call(str(number))) for number in range(3)] == [Reply("reply 0"), None, Reply("reply 2")]
        assert len(caplog.records) == 1 and "calls.jsonl" in caplog.text and "made again" in caplog.text
        log.add(call("1"), Reply("anew"))
        assert log.find(call("1")) == Reply("anew")
    with CallLog(path) as log:
        found = [log.find(call(str(number))) for number in range(3)]
        assert found == [Reply("reply 0"), Reply("anew"), Reply("reply 2")]
        assert len(list(log.rows())) == 3


class Forged(Call):
    """A call with the key that its prompt says."""

    key = property(lambda self: self.prompt)


def forged(key):
    return Forged("s", "e", key, GenerationParams())


@pytest.mark.parametrize("recent", [1, 2, 3, 1000], ids=lambda value: f"merged after {value}")
def test_keys_that_begin_alike_are_told_apart(tmp_path, monkeypatch, recent):
    monkeypatch.setattr(_KeyIndex, "_RECENT", recent)
    keys = [f"{'ab' * 8}{number:016x}" for number in range(4)] + ["cd" * 16]
    with CallLog(tmp_path / "calls.jsonl") as log:
        for key in keys:
            assert log.find(forged(key)) is None
            log.add(forged(key), Reply(key))
            assert [log.find(forged(k)) == Reply(k) for k in keys] == [k <= key for k in keys]
    with CallLog(tmp_path / "calls.jsonl") as log:
        assert all(log.find(forged(key)) == Reply(key) for key in keys) and len(log) == 5
        assert log.find(forged("ab" * 16)) is None


def test_more_than_the_recent_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(_KeyIndex, "_RECENT", 64)
    path = tmp_path / "calls.jsonl"
    with CallLog(path) as log:
        for number in range(1000):
            log.add(call(str(number)), Reply(str(number)))
            if number % 50 == 0:
                assert all(log.find(call(str(n))) == Reply(str(n)) for n in range(0, number + 1, 37))
    for _ in range(2):
        with CallLog(path) as log:
            assert len(log) == 1000
            assert all(log.find(call(str(n))) == Reply(str(n)) for n in range(1000))
            assert log.find(call("1000")) is None


def test_an_index_of_more_than_two_to_the_sixteenth():
    """As it is, unpatched: every offset comes back, in the dict, in the arrays and across the merge."""
    index = _KeyIndex()
    keys = [(number * 0x9E3779B97F4A7C15) % 2**64 for number in range(70_000)]
    for offset, key in enumerate(keys):
        index.add(key, offset)
    assert len(index) == 70_000
    assert all(list(index.offsets(keys[place])) == [place] for place in (*range(0, 70_000, 101), 65_535, 65_536))
    assert not list(index.offsets(12345))


def test_eight_threads_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_KeyIndex, "_RECENT", 100)
    wrong = []

    def work(log, thread):
        for number in range(150):
            own = call(f"{thread}/{number}")
            log.add(own, Reply(f"{thread} {number} " + "x" * (number * 7 % 300)))
            for other in range(8):
                found = log.find(call(f"{other}/{number // 2}"))
                if found is not None and not found.text.startswith(f"{other} {number // 2} "):
                    wrong.append(found)
            if log.find(own) is None:
                wrong.append(own)

    with CallLog(tmp_path / "calls.jsonl") as log:
        threads = [threading.Thread(target=work, args=(log, thread)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    lines = (tmp_path / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["prompt"] for line in lines) == sorted(
        f"{t}/{n}" for t in range(8) for n in range(150)
    )
    with CallLog(tmp_path / "calls.jsonl") as log:
        assert len(log) == 1200
        assert all(log.find(call(f"{t}/{n}")).text.startswith(f"{t} {n} ") for t in range(8) for n in range(0, 150, 9))


def test_rows_in_the_order_they_finished(tmp_path):
    with CallLog(tmp_path / "calls.jsonl") as log:
        for number in (3, 1, 2):
            log.add(call(str(number), max_new_tokens=number), Reply("r", "stop", number, 10))
        rows = list(log.rows())
    assert [row["prompt"] for row in rows] == ["3", "1", "2"]
    assert [row["params"]["max_new_tokens"] for row in rows] == [3, 1, 2]
    assert [row["reply"]["num_tokens"] for row in rows] == [3, 1, 2]


def test_a_refused_row_does_not_shift_the_others(tmp_path):
    """A reply that JSON cannot hold is refused; offsets of what follows stay right."""
    with CallLog(tmp_path / "calls.jsonl") as log:
        log.add(call("0"), Reply("zero"))
        with pytest.raises(ValueError, match=r"calls\.jsonl"):
            log.add(call("1"), Reply(logprobs=(math.nan,)))
        log.add(call("2"), Reply("two"))
        assert [log.find(call(str(n))) for n in range(3)] == [Reply("zero"), None, Reply("two")]


def test_closed(tmp_path):
    log = CallLog(tmp_path / "calls.jsonl")
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.add(call(), Reply("late"))
    assert (tmp_path / "calls.jsonl").read_bytes() == b""
