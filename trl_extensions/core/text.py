"""Measures of generated text: how it repeats itself, how like another it is, and what classifiers say of it.

Texts to compare come in pairs, two lists of equal length; anything else raises a `ValueError` or `TypeError`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .extras import import_extra


# Han and kana without their middle dot, half-width kana; Thai and Lao; Burmese; Khmer: words are not divided there
SPACELESS = re.compile(
    "[\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\U00020000-\U0003ffff]"
)


_LONGEST_SEARCH = 10.0  # seconds


@functools.cache
def pattern_finder(pattern: str, name: str, flags: int = 0) -> Callable[[str], Iterator[re.Match[str]]]:
    """A function that finds the matches of a regular expression of the user, called `name`, in a text, one after the
    other. `ValueError`, one line, if it is none; or when it takes more than ten seconds for one text, as one may that
    tries every way to divide it."""
    import regex  # which can be stopped

    try:
        re.compile(pattern, flags)
        compiled: Any = regex.compile(pattern, int(flags))
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} {pattern!r:.200} is not a regular expression ({error}); correct it") from None

    def find(text: str) -> Iterator[re.Match[str]]:
        try:
            yield from compiled.finditer(text, timeout=_LONGEST_SEARCH)
        except TimeoutError:
            what = f"takes more than {_LONGEST_SEARCH:g} seconds for a text of {len(text)} characters"
            raise ValueError(f"{name} {pattern!r:.200} {what}; leave out repetitions within repetitions") from None

    return find


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_2(texts: Sequence[str]) -> float:
    """Mean over texts (of two words or more; 1.0 without any) of distinct word pairs / word pairs, in [0, 1].

    Low values mean a text repeats itself. It does not fall as more texts are added.
    """
    shares = [len(set(pairs)) / len(pairs) for pairs in (_ngrams(text, 2) for text in texts) if pairs]
    return sum(shares) / len(shares) if shares else 1.0


def corpus_distinct_2(texts: Sequence[str]) -> float:
    """Distinct word pairs / word pairs over all texts together, in [0, 1], 1.0 without any (distinct-2 of arXiv
    1510.03055). Falls with the number of texts: compare only sets of equal size."""
    pairs = [pair for text in texts for pair in _ngrams(text, 2)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def seq_rep_n(text: str, n: int = 4) -> float:
    """1 - distinct n-grams / n-grams of one text's words (lower-cased, split at white space), in [0, 1): seq-rep-n of
    arXiv 1908.04319. 0.0 for a text of fewer than n words."""
    ngrams = _ngrams(text, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def mean_seq_rep_n(texts: Sequence[str], n: int = 4) -> float:
    """Mean of `seq_rep_n` over texts. Texts of fewer than n words are left out; 0.0 if none remains."""
    repetitions = [seq_rep_n(text, n) for text in texts if len(text.split()) >= n]
    return sum(repetitions) / len(repetitions) if repetitions else 0.0


def exact_match(a: Sequence[str], b: Sequence[str]) -> float:
    """Share of texts equal word for word to their partner, in [0, 1]; white space aside. nan without texts."""
    return _mean([left.split() == right.split() for left, right in _pairs(a, b)])


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU by sacrebleu with its defaults (tokenizer 13a, case kept), one reference a text, in [0, 100].

    If no hypothesis has four words, the orders that occur are averaged (sacrebleu's effective order), so that equal
    texts get 100 whatever their length. nan without texts. The tokenizer does not divide Chinese, Japanese or Thai.
    """
    if not _pairs(hypotheses, references):
        return math.nan
    # force: a warning less, about full stops that stand apart, which a model may well write.
    options = {"force": True, "use_effective_order": True}
    score = import_extra("sacrebleu").corpus_bleu(list(hypotheses), [list(references)], **options)
    return min(score.score, 100.0)  # it can come out an ulp above


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure by rouge-score, without a stemmer, in [0, 1]. nan without texts.

    Words are the package's, with letters of other scripts beside. Texts equal word for word count 1, empty ones too.
    """
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_RougeWords())
    return _mean([
        1.0 if hypothesis.split() == reference.split() else scorer.score(reference, hypothesis)["rougeL"].fmeasure
        for hypothesis, reference in _pairs(hypotheses, references)
    ])  # fmt: skip


class _RougeWords:
    """The tokenizer interface of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


class TextClassifier:
    """The probability of one label under a sequence classifier, for the whole text or as much as the model takes.

    The label is one of the config's `id2label`; a model of one label, or of two (then it is the second), needs none.
    """

    def __init__(self, model: str, label: str | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; give at least 1")
        from transformers import pipeline

        self._pipeline: Any = pipeline("text-classification", model=model, trust_remote_code=False)
        config: Any = self._pipeline.model.config
        tokenizer: Any = self._pipeline.tokenizer
        labels = [config.id2label[i] for i in range(config.num_labels)]
        if label is None and len(labels) <= 2:
            label = labels[-1]
        if label not in labels:
            problem = "it has more than two labels" if label is None else f"it has no label {label!r}"
            raise ValueError(f"classifier {model}: {problem}; set `label` to one of {', '.join(map(repr, labels))}")
        self.label = label
        # Some tokenizers know no limit, and some models keep two positions from the text
        positions = getattr(config, "max_position_embeddings", None) or 514
        length = min(tokenizer.model_max_length, positions - 2)
        size = batch_size if tokenizer.pad_token_id is not None else 1
        self._call = {"top_k": None, "truncation": True, "max_length": length, "batch_size": size}

    def score(self, texts: Sequence[str]) -> list[float]:
        """The probability of the label for each text, in [0, 1]."""
        results = self._pipeline(list(texts), **self._call)
        return [next(entry["score"] for entry in entries if entry["label"] == self.label) for entries in results]


def load_profanity_check() -> Callable[[Sequence[str]], list[float]]:
    """A function from texts to the probability that each is profane, by the linear model of `alt-profanity-check`."""
    predict_prob = import_extra("profanity_check").predict_prob
    return lambda texts: [float(probability) for probability in predict_prob(list(texts))] if texts else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _pairs(a: Sequence[str], b: Sequence[str]) -> list[tuple[str, str]]:
    if isinstance(a, str) or isinstance(b, str):
        raise TypeError("texts are compared in pairs: give two lists of texts, not a single text.")
    if len(a) != len(b):
        raise ValueError(f"{len(a)} texts against {len(b)}: texts are compared in pairs, so give as many of each.")
    return list(zip(a, b, strict=True))
