"""Mark the unwanted parts of outputs; the package is its main function too: `annotate(rows, phrases=[...])`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...core.inputs import Source
from ..data import load_training_rows, read_annotated
from .rows import AnnotationReport, Annotator, Span, annotate_rows, merge_spans


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["AnnotationReport", "Annotator", "Span", "annotate", "annotate_rows", "merge_spans"]


def annotate(dataset: Source, *, annotators: Sequence[Annotator] = (), **unwanted: Any) -> "Dataset":
    """Rows for `TNTTrainer`: answers with what is unwanted in them marked.

    Args:
        dataset: A file, data set or rows, of any shape that `core.inputs.answered` takes: chats (`messages`, of which
            the last is the answer), `prompt` and `completion`, `instruction` and `output`, ... Best are the model's
            own answers, see `trl_extensions.tnt.sample`.
        annotators: Annotators of your own.
        unwanted: What is unwanted, by the names of `AnnotatorArguments`: `phrases`, `patterns`, `classifier`, ...

    Returns:
        `prompt`, `completion`, `negative_spans`, `severities` and `truncated`. Rows that an annotator cannot judge and
        empty answers are left out and counted; what cannot be read is a `ValueError`.
    """
    from ..config import AnnotatorArguments

    own = AnnotatorArguments(**unwanted).build() if unwanted or not annotators else []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "annotated.jsonl"
        report = annotate_rows(read_annotated(dataset, "train"), [*annotators, *own], path)
        print(report.summary.partition(": ")[2])
        return load_training_rows(str(path), "train")


class _Function(ModuleType):
    __call__ = staticmethod(annotate)  # one name cannot stand for a package and a function otherwise


sys.modules[__name__].__class__ = _Function
