"""Rows made one by one, resumed after a kill, and refused where they belong to something else."""

import json
import signal
import subprocess
import sys

import pytest

from trl_extensions.core.runs.jsonl import read_jsonl, write_jsonl
from trl_extensions.core.runs.resumable import Failed, failures_path, map_rows


ROWS = [{"id": f"r{number}", "text": text} for number, text in enumerate(["one", "two", "三つ", "vier", "cinq"])]


def doubled(calls, fail=()):
    """`make` that doubles texts, backwards as an engine may, and notes what it was asked."""

    def make(chunk):
        calls.append([row["id"] for row in chunk])
        for place, row in reversed(list(enumerate(chunk))):
            if row["id"] in fail:
                yield place, Failed("unreadable", {"answers": ["?"]})
            else:
                yield place, {"text": row["text"], "twice": row["text"] * 2}

    return make


def test_rows_and_failures_are_written_and_a_second_call_asks_for_nothing(tmp_path):
    output, calls = tmp_path / "out.jsonl", []
    report = map_rows(ROWS, doubled(calls, fail={"r1"}), output, chunk_size=2)
    assert (report.rows, report.failed, report.resumed) == (4, 1, 0)
    assert calls == [["r0", "r1"], ["r2", "r3"], ["r4"]]
    assert [row["id"] for row in read_jsonl(output)] == ["r0", "r3", "r2", "r4"]
    assert read_jsonl(output)[2] == {"id": "r2", "text": "三つ", "twice": "三つ三つ"}
    assert read_jsonl(failures_path(output)) == [ROWS[1] | {"reason": "unreadable", "answers": ["?"]}]
    again = map_rows(ROWS, doubled(calls), output, chunk_size=2)
    assert (again.rows, again.failed, again.resumed, len(calls)) == (4, 1, 5, 3)
    failures_path(output).unlink()
    assert map_rows(ROWS, doubled(calls), output).rows == 5
    assert calls[3:] == [["r1"]]


@pytest.mark.parametrize("kill_after", [1, 3])
def test_killed_in_the_middle_it_goes_on_behind_the_last_whole_row(tmp_path, kill_after):
    output = tmp_path / "out.jsonl"
    program = (
        "import json, os, signal, sys\n"
        "from trl_extensions.core.runs.resumable import map_rows\n"
        "def make(chunk):\n"
        "    for place, row in enumerate(chunk):\n"
        f"        if row['id'] == 'r{kill_after}':\n"
        "            open(sys.argv[1], 'ab').write(b'{\"id\": \"r')\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield place, {'text': row['text'], 'by': 'first'}\n"
        "map_rows(json.loads(sys.argv[2]), make, sys.argv[1], settings={'a': 1})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, output, json.dumps(ROWS)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    calls = []
    report = map_rows(ROWS, doubled(calls), output, settings={"a": 1})
    assert calls == [[row["id"] for row in ROWS[kill_after:]]]
    assert (report.resumed, report.rows) == (kill_after, 5)
    rows = read_jsonl(output)
    assert sorted(row["id"] for row in rows) == [row["id"] for row in ROWS]
    assert sum("by" in row for row in rows) == kill_after
    assert output.with_name("out.jsonl.broken").read_bytes() == b'{"id": "r\n'


def test_other_settings_rows_or_contents_are_refused_and_nothing_changes(tmp_path):
    output, make = tmp_path / "out.jsonl", doubled([])
    map_rows(ROWS[:2], make, output, settings={"model": "a", "seed": 1})
    before = output.read_bytes()
    for rows, settings, named in (
        (ROWS, {"model": "b", "seed": 1}, r'out.jsonl was made with other settings: model was "a", now "b"'),
        (ROWS[1:], {"model": "a", "seed": 1}, r"out.jsonl: its row 'r0' is not among"),
        ([ROWS[0] | {"text": "other"}, ROWS[1]], {"model": "a", "seed": 1}, "row 'r0' has another text"),
    ):
        with pytest.raises(ValueError, match=named):
            map_rows(rows, make, output, settings=settings, same=["text"])
    assert output.read_bytes() == before
    assert map_rows(ROWS, make, output, settings={"model": "a", "seed": 1}, same=["text"]).rows == 5


def test_half_a_surrogate_pair_is_no_other_row(tmp_path):
    rows = [{"id": 1, "text": "broken \ud83d"}]
    map_rows(rows, doubled([]), tmp_path / "out.jsonl")
    assert map_rows(rows, doubled([]), tmp_path / "out.jsonl", same=["text"]).resumed == 1


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no rows"),
        ([{"text": "a"}], "row 0 has no `id`"),
        ([{"id": True}], "row 0 has no `id`"),
        ([{"id": "a"}, {"id": "a"}], "row 1: the `id` 'a' occurs twice"),
    ],
)
def test_rows_that_cannot_be_told_apart_are_refused(tmp_path, rows, named):
    with pytest.raises(ValueError, match=named):
        map_rows(rows, doubled([]), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_limit_ends_it_where_enough_rows_are_kept_whatever_the_chunk(tmp_path):
    for size in (1, 2, 5, None):
        kept, output = [], tmp_path / f"{size}.jsonl"

        def tally(row, kept=kept):
            if len(row["text"]) > 3:
                kept.append(row["id"])

        report = map_rows(ROWS, doubled([]), output, chunk_size=size, tally=tally, limit=lambda: 1 - len(kept))  # noqa: B023
        assert (report.rows, kept) == (4, ["r3"])
        kept.clear()
        report = map_rows(ROWS, doubled([]), output, chunk_size=size, tally=tally, limit=lambda: 2 - len(kept))  # noqa: B023
        assert (report.rows, report.resumed, kept) == (5, 4, ["r3", "r4"])


def test_parts_of_one_file_do_not_see_each_other(tmp_path):
    output = tmp_path / "out.jsonl"
    for name in ("a", "b"):
        rows = [{"id": f"{name}-{row['id']}"} for row in ROWS]
        done = map_rows(
            rows,
            lambda chunk, name=name: ((place, {"model": name}) for place in range(len(chunk))),
            output,
            settings={"engine": name},
            part=("model", name),
        )
        assert (done.rows, done.resumed) == (5, 0)
    assert len(read_jsonl(output)) == 10
    assert json.loads((tmp_path / "out.b.settings.json").read_text()) == {"engine": "b"}


def test_a_row_left_out_is_no_silent_loss(tmp_path):
    with pytest.raises(ValueError, match="'r0'"):
        map_rows(ROWS[:2], lambda chunk: [(1, {})], tmp_path / "out.jsonl")


def test_a_second_process_is_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    program = (
        "import sys\nfrom trl_extensions.core.runs.jsonl import JsonlWriter\n"
        "with JsonlWriter(sys.argv[1]):\n    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=r"out.jsonl: another process"):
            map_rows(ROWS, doubled([]), output)
        other.stdin.close()
    assert map_rows(ROWS, doubled([]), output).rows == 5


def test_integer_keys_come_back_as_integers(tmp_path):
    rows, output = [{"row": 7}, {"row": 8}], tmp_path / "out.jsonl"
    write_jsonl(output, [{"row": 7}])
    assert map_rows(rows, lambda chunk: [(0, {"value": 1})], output, key="row").resumed == 1
    assert read_jsonl(output) == [{"row": 7}, {"row": 8, "value": 1}]
