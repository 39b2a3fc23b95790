"""Mark the unwanted parts of outputs; the package is its main function too: `annotate(rows, phrases=[...])`."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from ..data import load_training_rows, read_annotated
from .rows import AnnotationReport, Annotator, Span, annotate_rows, merge_spans


__all__ = ["AnnotationReport", "Annotator", "Span", "annotate", "annotate_rows", "merge_spans"]


def annotate(dataset: Any, *, model: Any = None, annotators: Any = (), num_samples: int = 1, **unwanted: Any) -> Any:
    """Rows for `TNTTrainer`, a `Dataset`: answers with what is unwanted in them marked.

    Args:
        dataset: A file, data set or rows, see `core.inputs.answered`: `messages`, `prompt` and `completion`, ...
        model: Answers in place of those in `dataset`, greedily and `num_samples` times at random; what is trained had
            better be this model. See `core.generation.engine_of`.
        annotators: Annotators of your own.
        unwanted: What is unwanted, by the names of `AnnotatorArguments`: `phrases`, `patterns`, `classifier`, ...
    """
    from ...core.generation import GenerationParams, engine_of, takes_chats
    from ...core.generation.sampling import load_outputs, sample_outputs
    from ...core.inputs import load_queries
    from ..config import AnnotatorArguments

    marking = [*annotators, *(AnnotatorArguments(**unwanted).build() if unwanted or not annotators else [])]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "annotated.jsonl"
        if model is None:
            rows = read_annotated(dataset, "train")
        else:
            engine, outputs, params = engine_of(model), path.with_name("outputs.jsonl"), GenerationParams(128, 1.0)
            chats, asked = takes_chats(engine), load_queries(dataset, chats=True)
            sample_outputs(engine, asked, params, outputs, num_samples=num_samples, conversational=chats)
            rows = load_outputs(outputs)
        print(annotate_rows(rows, marking, path).summary.partition(": ")[2])
        return load_training_rows(str(path), "train")


class _Function(ModuleType):
    __call__ = staticmethod(annotate)  # one name cannot stand for a package and a function otherwise


sys.modules[__name__].__class__ = _Function
