"""The file of candidates that a person edits between the logs and the training rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...core.runs.report import write_atomically
from .candidates import Candidate, check_severity, form_key


FIELDS = tuple(field.name for field in fields(Candidate))
KINDS = ("span", "quote", "phrase")

_HEADER = """\
# What may be unwanted in the logged outputs: first what is kept by default, and of each part the worst first (count
# x severity). Read it before you train. For each entry:
#   keep      true: remove it from the model, wherever it occurs, flagged or not. false: it is fine as it is.
#             Set false rather than delete the entry: what a log marks is unwanted unless an entry says that it is not.
#   text, variants   what is looked for: whole words, any case and white space. Add forms, or delete wrong ones.
#   severity  1 (a blemish) to 5 (must never happen).
# You can add entries: `- text: ...` is enough. For your information only: kind (span: marked in an output; quote: from
# a complaint; phrase: more frequent in flagged outputs), count and clean_count (flagged and other outputs with it) and
# examples. A phrase that only flagged outputs share may be their subject, not their fault: look at the examples.
"""


def write_candidates(path: str | os.PathLike, candidates: Sequence[Candidate]) -> None:
    """Write candidates as YAML, under a comment that says how to edit them.

    Args:
        path (`str` or `os.PathLike`): Where to write; parent folders are made.
        candidates (`Sequence[Candidate]`): At least one.

    Raises:
        `ValueError`: there is no candidate, or there is a file already, which may hold a person's decisions.
    """
    import yaml

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists and may have been edited; move it away, or write to another file")
    if not candidates:
        raise ValueError(f"no candidate to write to {path}; add complaints that quote the output, or more logs")
    entries = [{name: _plain(getattr(candidate, name)) for name in FIELDS} for candidate in candidates]
    body = yaml.safe_dump({"candidates": entries}, sort_keys=False, allow_unicode=True, width=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _HEADER + "\n" + body)


def load_candidates(path: str | os.PathLike) -> list[Candidate]:
    """Read and validate a file of candidates.

    Args:
        path (`str` or `os.PathLike`): A file of the form `candidates: [{text: ..., keep: true, severity: 4}, ...]`;
            every field but `text` is optional.

    Returns:
        `list[Candidate]`: kept and dropped ones, in file order.

    Raises:
        `FileNotFoundError`: there is no such file. `ValueError`: one line naming the file, the entry (from 1), the
        field and the remedy.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not valid YAML; put texts with special characters in quotes ({' '.join(str(error).split())})"
        ) from None
    entries = document.get("candidates") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected the key `candidates` with a list; add `candidates:` and `- text: ...`")
    unknown = [key for key in document if key != "candidates"]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; remove it, the only top-level key is `candidates`")
    candidates: list[Candidate] = []
    owners: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        if isinstance(entry, dict) and isinstance(entry.get("text"), str):
            where += f" ({entry['text']!r:.40})"
        try:
            candidate = _candidate(entry)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for form in candidate.forms:
            owner = owners.setdefault(form_key(form), number)
            if owner != number:
                raise ValueError(f"{where}: {form!r:.80} is in entry {owner} too; leave it in one of them")
        candidates.append(candidate)
    return candidates


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else round(value, 2) if isinstance(value, float) else value


def _candidate(entry: Any) -> Candidate:
    if not isinstance(entry, dict):
        raise ValueError(f"expected a mapping with `text`, got {entry!r:.80}; write `- text: ...`")
    unknown = [key for key in entry if key not in FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; remove it, the fields are {', '.join(FIELDS)}")
    if "text" not in entry:
        raise ValueError("`text` is missing; add `text: <what is unwanted>`")
    values = dict(entry)
    _check_text(values["text"], "text")
    for name in ("examples", "variants"):
        values[name] = tuple(_texts(values.get(name, []), name))
    if not isinstance(values.get("keep", True), bool):
        raise ValueError(f"`keep` must be true or false, got {values['keep']!r:.80}")
    if values.get("kind", "phrase") not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {values['kind']!r:.80}")
    for name in ("count", "clean_count"):
        value = values.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"`{name}` must be a number of outputs, 0 or more, got {value!r:.80}")
    if "severity" in values:
        values["severity"] = check_severity(values["severity"])
    return Candidate(**values)


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list):
        raise ValueError(f"`{name}` must be a list of texts, got {values!r:.80}; write `{name}: []` for none")
    for value in values:
        _check_text(value, name)
    return values


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be text, got {value!r:.80}; put it in quotes")
    if not value.strip():
        raise ValueError(f"`{name}` is empty; write what is unwanted, or remove it")
