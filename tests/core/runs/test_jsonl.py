import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl


ROWS = [{"id": 0, "text": "plain"}, {"id": 1, "text": "two\nlines, \u2028 and \u00e9"}, {"id": 2, "text": "日本 🦊"}]


def write(path, rows):
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.append(row)


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "directory" / "rows.jsonl"
    write(path, ROWS[:1])
    write(path, ROWS[1:])
    assert read_jsonl(path, required=("id", "text")) == ROWS
    # One line a row, for readers that know nothing of this module.
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == ROWS


def test_a_row_is_on_disk_when_append_returns(tmp_path):
    path = tmp_path / "rows.jsonl"
    with JsonlWriter(path) as writer:
        for count, row in enumerate(ROWS, start=1):
            writer.append(row)
            assert read_jsonl(path) == ROWS[:count]


def test_last_line_cut_at_every_byte(tmp_path, caplog):
    """The last row holds characters of three and four bytes: some cuts fall inside one."""
    whole = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        complete = cut >= len(whole) - 1  # at most the newline is missing
        fragment = b"" if complete else whole[start:cut]
        caplog.clear()
        assert read_jsonl(path) == (ROWS if complete else ROWS[:2])
        assert len(caplog.records) == (1 if fragment else 0)
        assert path.read_bytes() == whole[:cut], "reading must not change the file"

        write(path, [{"id": 3}])

        assert read_jsonl(path) == (ROWS if complete else ROWS[:2]) + [{"id": 3}]
        broken = tmp_path / f"{cut}.jsonl.broken"
        assert broken.exists() == bool(fragment)
        if fragment:
            assert broken.read_bytes() == fragment + b"\n"


def test_repair_is_logged_in_one_line(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id')
    with caplog.at_level(logging.WARNING), JsonlWriter(path):
        pass
    (record,) = caplog.records
    assert "rows.jsonl.broken" in record.getMessage() and "\n" not in record.getMessage()


def test_half_written_line_longer_than_a_block(tmp_path):
    path = tmp_path / "rows.jsonl"
    fragment = b'{"text": "' + b"x" * 200_000
    path.write_bytes(b'{"id": 0}\n' + fragment)
    write(path, [{"id": 1}])
    assert read_jsonl(path) == [{"id": 0}, {"id": 1}]
    assert (tmp_path / "rows.jsonl.broken").read_bytes() == fragment + b"\n"


def test_a_list_on_one_line_is_refused_as_such(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('[{"id": 0}, {"id": 1}]')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: expected a JSON object, got list"):
        read_jsonl(path)


def test_a_number_is_not_a_complete_row(tmp_path):
    """`{"a": 1}\\n12` could be the start of anything: only an object counts as a whole row."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 0}\n12')
    write(path, [{"id": 1}])
    assert read_jsonl(path) == [{"id": 0}, {"id": 1}]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_while_writing(tmp_path):
    path = tmp_path / "rows.jsonl"
    program = (
        "import sys\nfrom trl_extensions.core.runs.jsonl import JsonlWriter\nwriter = JsonlWriter(sys.argv[1])\n"
        "for i in range(10**9):\n    writer.append({'id': i, 'text': '日本' * 5000})\n    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    for _ in range(20):
        acknowledged = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.stdout.read()
    process.wait()
    process.stdout.close()
    with JsonlWriter(path) as writer:
        written = len(read_jsonl(path))
        writer.append({"id": written})
    assert written > acknowledged
    assert [row["id"] for row in read_jsonl(path)] == list(range(written + 1))


@pytest.mark.skipif(os.name == "nt", reason="needs a file size limit")
def test_full_disk_leaves_whole_lines_only(tmp_path):
    """A limit of 100 bytes on the file stops the write in the middle of the row, as a full disk would."""
    path = tmp_path / "rows.jsonl"
    program = (
        "import resource, sys\nfrom trl_extensions.core.runs.jsonl import JsonlWriter\n"
        "writer = JsonlWriter(sys.argv[1])\n"
        "writer.append({'id': 0})\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try:\n    writer.append({'text': 'x' * 1000})\nexcept OSError:\n    writer.append({'id': 1})\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert read_jsonl(path) == [{"id": 0}, {"id": 1}]


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "rows.jsonl"
    with JsonlWriter(path) as writer:
        writer.append({"id": 0})
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left.*rows\.jsonl") as caught:
            patch.setattr("os.fsync", full)
            writer.append({"id": 1})
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
        writer.append({"id": 2})
    assert read_jsonl(path) == [{"id": 0}, {"id": 2}]


def test_syncing_once_in_a_while(tmp_path, monkeypatch):
    """The clock stands still, then jumps: only rows at and after the interval ask the machine's disk to be sure."""
    now, synced = [100.0], []
    monkeypatch.setattr("trl_extensions.core.runs.jsonl.time.monotonic", lambda: now[0])
    real = os.fsync
    path = tmp_path / "rows.jsonl"
    writer = JsonlWriter(path, sync_seconds=2.0)
    monkeypatch.setattr("os.fsync", lambda descriptor: (synced.append(len(read_jsonl(path))), real(descriptor)))
    for time in (100.0, 101.9, 102.0, 102.5, 104.5):
        now[0] = time
        writer.append({"time": time})
        assert read_jsonl(path)[-1] == {"time": time}, "without a sync it survives the death of the process"
    assert synced == [3, 5]
    writer.append({})
    writer.close()
    assert synced == [3, 5, 6]
    with JsonlWriter(path) as writer:  # and with no interval, every row
        writer.append({})
        writer.append({})
    assert synced == [3, 5, 6, 7, 8]


def test_closing_waits_for_a_row_that_is_being_written(tmp_path, monkeypatch):
    writer = JsonlWriter(tmp_path / "rows.jsonl", sync_seconds=100.0)
    entered, go_on = threading.Event(), threading.Event()
    write_raw = writer._file.write

    class Slow:
        """The file, which writes half of what it is given and takes its time over it."""

        def write(self, data):
            entered.set()
            go_on.wait(60)
            return write_raw(data[: max(1, len(data) // 2)])

        def __getattr__(self, name):
            return getattr(file, name)

    file, writer._file = writer._file, Slow()
    writing = threading.Thread(target=writer.append, args=({"text": "x" * 100},))
    writing.start()
    assert entered.wait(60)
    closing = threading.Thread(target=writer.close)
    closing.start()
    go_on.set()
    writing.join()
    closing.join()
    assert file.closed and read_jsonl(tmp_path / "rows.jsonl") == [{"text": "x" * 100}]


@pytest.mark.parametrize(
    ("row", "error"),
    [({"x": float("nan")}, ValueError), ({"x": {1, 2}}, TypeError), ([1], TypeError), ("text", TypeError)],
)
def test_bad_row_writes_nothing(tmp_path, row, error):
    path = tmp_path / "rows.jsonl"
    with JsonlWriter(path) as writer:
        with pytest.raises(error, match=r"rows\.jsonl"):
            writer.append(row)
        assert path.read_bytes() == b""


def test_lone_surrogate_is_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, [{"text": "half \ud83d pair"}])
    assert read_jsonl(path) == [{"text": "half ? pair"}]


def test_closed_writer_refuses(tmp_path):
    writer = JsonlWriter(tmp_path / "rows.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append({"id": 0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', r"rows.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n{"a": 2\n', r"rows.jsonl:2: not valid JSON"),  # a newline says the line was meant to be whole
        (b'{"a": 1}\n\n[1]\n', r"rows.jsonl:3: expected a JSON object, got list"),
        (b'{"a": "\xff"}\n{"a": 2}\n', r"rows.jsonl:1: not UTF-8"),
        (b'{"a": 1}\n{"b": 2}\n', r"rows.jsonl:2: column 'a' is missing; the row has \['b'\]"),
    ],
)
def test_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_jsonl(path, required=("a",))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_empty_file_and_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    assert read_jsonl(path) == []
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_jsonl(path) == [{"a": 1}]
