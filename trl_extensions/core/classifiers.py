"""Probabilities from text classifiers: a model of transformers, or `alt-profanity-check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextClassifier:
    """The probability of one label under a sequence classifier, for the whole text or as much as the model takes.

    Args:
        model: Model id or directory of a sequence classifier, for the `text-classification` pipeline of transformers.
        label: A label, as in `id2label` of the model's config. May be left out if the model has one label, or two:
            then it is the second.
        batch_size: Texts scored at once.

    Attributes:
        label: The label whose probability is given.

    Raises:
        ValueError: A batch size below 1, or a label that the model does not have (the message lists those it has).
        OSError: The model cannot be found.
    """

    def __init__(self, model: str, label: str | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; give at least 1")
        from transformers import pipeline

        self._pipeline = pipeline("text-classification", model=model)
        config, tokenizer = self._pipeline.model.config, self._pipeline.tokenizer
        # Some tokenizers know no limit, and some models keep two positions from the text
        positions = getattr(config, "max_position_embeddings", None) or 514
        self.label = _resolve_label(model, label, [config.id2label[i] for i in range(config.num_labels)])
        self._call = {
            "top_k": None,
            "truncation": True,
            "max_length": min(tokenizer.model_max_length, positions - 2),
            "batch_size": batch_size if tokenizer.pad_token_id is not None else 1,
        }

    def score(self, texts: Sequence[str]) -> list[float]:
        """The probability of the label for each text, in [0, 1]."""
        results = self._pipeline(list(texts), **self._call)
        return [next(entry["score"] for entry in entries if entry["label"] == self.label) for entries in results]


def load_profanity_check() -> Callable[[Sequence[str]], list[float]]:
    """A function from texts to the probability that each is profane, by the linear model of `alt-profanity-check`.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        from profanity_check import predict_prob
    except ImportError as error:
        raise ImportError(
            f"probabilities of profanity need alt-profanity-check ({error}): pip install alt-profanity-check"
        ) from None
    return lambda texts: [float(probability) for probability in predict_prob(list(texts))] if texts else []


def _resolve_label(model: str, label: str | None, labels: list[str]) -> str:
    if label is None and len(labels) <= 2:
        return labels[-1]
    if label not in labels:
        problem = "it has more than two labels" if label is None else f"it has no label {label!r}"
        raise ValueError(f"classifier {model}: {problem}; set `label` to one of {', '.join(map(repr, labels))}")
    return label
