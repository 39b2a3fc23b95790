"""Settings that claim a folder."""

import pytest

from trl_extensions.core.runs.run import check_resume


def test_same_settings_resume_and_others_are_named(tmp_path):
    path = tmp_path / "settings.json"
    check_resume(path, {"a": 1, "deep": {"b": (1, 2)}}, made="rows.jsonl", started=False)
    check_resume(path, {"a": 1, "deep": {"b": (1, 2)}}, made="rows.jsonl", started=True)
    with pytest.raises(
        ValueError, match=r"rows.jsonl was made with other settings: a was 1, now 2; deep.b was \[1, 2\], now \[3\]"
    ):
        check_resume(path, {"a": 2, "deep": {"b": (3,)}}, made="rows.jsonl", started=True)


def test_nothing_made_yet_means_free(tmp_path):
    path = tmp_path / "new" / "settings.json"
    check_resume(path, {"a": 1}, made="rows", started=False)
    check_resume(path, {"a": 2}, made="rows", started=False)
    check_resume(path, {"a": 2}, made="rows", started=True)


@pytest.mark.parametrize("content", [None, "{half"])
def test_lost_or_broken_settings_are_not_guessed(tmp_path, content):
    path = tmp_path / "settings.json"
    if content:
        path.write_text(content)
    with pytest.raises(ValueError, match="missing or not JSON"):
        check_resume(path, {"a": 1}, made="rows", started=True)
