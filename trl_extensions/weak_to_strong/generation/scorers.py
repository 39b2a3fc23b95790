"""What says how good an answer of a weak model is: a number a text, by a classifier, a measurement or a phrase list.

`create_scorer` builds any of them, the judge of `judge_scorer.py` included, from what stands in a config;
`plan_scorer` only checks what stands there.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ...core.classifiers import TextClassifier, load_profanity_check
from ...core.generation.types import Prompt
from .evaluate_scorer import EvaluateScorer
from .judge_scorer import JudgeScorer, check_judge, judge_by_name
from .scorer_range import checked_range


class Scorer(Protocol):
    """What every scorer offers.

    Two more attributes are read where they exist: `counts` (a `Counter` of what went wrong, by kind, over all calls)
    and `failures` (of the last call: index of a text -> the raw answers out of which no score could be read).

    Attributes:
        name: Key of the scores in the rows.
        higher_is_better: Whether a higher score means a better answer.
        range: The lowest and the highest score there can be.
        settings: JSON-ready values that the scores depend on; a resumed run must have the same ones.
    """

    name: str
    higher_is_better: bool
    range: tuple[float, float]
    settings: dict[str, Any]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """A number for each completion, `None` where there is none to give. `prompts[i]` is what `completions[i]`
        answers or continues; no completion is empty."""
        ...


class ProfanityScorer:
    """The probability that a text is profane, by the linear model of `alt-profanity-check`; lower is better.

    Args:
        name: Key of the scores.

    Raises:
        ImportError: `alt-profanity-check` is not installed.
    """

    higher_is_better = False
    range = (0.0, 1.0)

    def __init__(self, *, name: str = "profanity"):
        self.name = name
        self.settings: dict[str, Any] = {"kind": "profanity"}
        self._predict = load_profanity_check()

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Probabilities in [0, 1]; prompts are not looked at."""
        return self._predict(completions)


class ClassifierScorer:
    """The probability of one label under a sequence classifier of transformers.

    The classifier sees the completion alone, and only its first tokens if there are more than it takes.

    Args:
        model: Model id or directory.
        label: The label, as in `id2label` of the model's config. May be left out if the model has one label, or two:
            then it is the second.
        higher_is_better: Whether the label is a good one; not so for "toxic".
        batch_size: Texts scored at once.
        name: Key of the scores.

    Raises:
        ValueError: A batch size below 1, or a label that the model does not have (the message lists those it has).
        OSError: The model cannot be found.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        model: str,
        label: str | None = None,
        *,
        higher_is_better: bool = False,
        batch_size: int = 32,
        name: str = "classifier",
    ):
        self._classifier = TextClassifier(model, label, batch_size)
        self.name = name
        self.higher_is_better = higher_is_better
        self.settings: dict[str, Any] = {
            "kind": "classifier",
            "model": str(model),
            "label": self._classifier.label,
            "higher_is_better": higher_is_better,
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Probabilities in [0, 1]; prompts are not looked at."""
        return self._classifier.score(completions)


class PhraseScorer:
    """The share of phrases and regular expressions that are absent from a text; 1 means none occurs, higher is better.

    Args:
        phrases: Words and phrases. A stretch of white space in one matches any other, and one that begins or ends
            with a letter or digit does not go on with another: "cat" is not in "category".
        patterns: Regular expressions, searched for as they are.
        ignore_case: Whether case is ignored, in both.
        name: Key of the scores.

    Raises:
        ValueError: Nothing to look for, an empty phrase, or a pattern that is no regular expression.
        TypeError: A list that is a single text, or holds something else.
    """

    higher_is_better = True
    range = (0.0, 1.0)

    def __init__(
        self,
        phrases: Sequence[str] = (),
        patterns: Sequence[str] = (),
        *,
        ignore_case: bool = True,
        name: str = "phrases",
    ):
        for field, values in (("phrases", phrases), ("patterns", patterns)):
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise TypeError(f"`{field}` is {values!r:.60}; give a list of texts")
            if not all(value.strip() for value in values):
                raise ValueError(f"`{field}` holds an empty text; leave it out")
        if not phrases and not patterns:
            raise ValueError("scorer of kind phrases: give `phrases` or `patterns` to look for")
        self.name = name
        flags = re.IGNORECASE if ignore_case else re.NOFLAG
        self._expressions = [re.compile(_phrase_pattern(phrase), flags) for phrase in phrases]
        self._expressions += [_compile(pattern, flags) for pattern in patterns]
        self.settings: dict[str, Any] = {
            "kind": "phrases",
            "phrases": list(phrases),
            "patterns": list(patterns),
            "ignore_case": ignore_case,
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Shares in [0, 1]; prompts are not looked at."""
        number = len(self._expressions)
        return [
            sum(expression.search(text) is None for expression in self._expressions) / number for text in completions
        ]


class CallableScorer:
    """A function of your own as a scorer.

    Args:
        function: From prompts and completions (texts, as many of each) to a number or `None` for each.
        name: Key of the scores.
        higher_is_better: Whether a higher number means a better text.
        range: The lowest and the highest number the function returns.
        settings: JSON-ready values that the function depends on, so that a resumed run does not mix two of them.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None]],
        name: str,
        *,
        higher_is_better: bool,
        range: tuple[float, float] = (0.0, 1.0),
        settings: Mapping[str, Any] | None = None,
    ):
        self._function = function
        self.name = name
        self.higher_is_better = higher_is_better
        self.range = checked_range(range)
        self.settings: dict[str, Any] = {
            "kind": "callable",
            "higher_is_better": higher_is_better,
            **(settings or {}),
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """What the function returns."""
        return self._function(prompts, completions)


@dataclass(frozen=True)
class ScorerPlan:
    """A scorer that a config describes, nothing of it loaded yet.

    Args:
        settings: `kind` and arguments, as given.
        build: Loads what it needs and returns it.
    """

    settings: dict[str, Any]
    build: Callable[[], Scorer]


def create_scorer(settings: str | Mapping[str, Any]) -> Scorer:
    """Build the scorer that a config describes.

    Args:
        settings: A dict with `kind` and the arguments of the class: `profanity` (`ProfanityScorer`), `classifier`
            (`ClassifierScorer`), `judge` (`JudgeScorer`, with `engine`, or the `model` that judges, and the `base_url`
            of the endpoint that serves it, if any), `evaluate` (`EvaluateScorer`) or `phrases` (`PhraseScorer`). As a
            text: the kind alone, or the dict in YAML (`"{kind: classifier, model: ./toxic, label: toxic}"`).

    Raises:
        ValueError: An unknown kind or argument, a missing one, or what the class refuses.
        ImportError: The kind needs a package that is not installed.
    """
    return plan_scorer(settings).build()


def plan_scorer(settings: str | Mapping[str, Any]) -> ScorerPlan:
    """Check what a config says of a scorer as far as that goes without loading any model.

    Args:
        settings: See `create_scorer`.

    Raises:
        ValueError: An unknown kind or argument, a missing one, or a value that is out of range.
        ImportError: The kind needs a package that is not installed.
    """
    given = _read_settings(settings)
    arguments = {name: value for name, value in given.items() if name != "kind"}
    kinds = {
        "profanity": ProfanityScorer,
        "classifier": ClassifierScorer,
        "evaluate": EvaluateScorer,
        "phrases": PhraseScorer,
        "judge": JudgeScorer if "engine" in arguments else judge_by_name,
    }
    kind = given["kind"]
    if kind not in kinds:
        raise ValueError(f"unknown kind of scorer {kind!r}; give one of {', '.join(kinds)}")
    try:
        inspect.signature(kinds[kind]).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(kinds[kind]).parameters)
        raise ValueError(f"scorer of kind {kind}: {error}; its arguments are {known}") from None
    plan = ScorerPlan(given, partial(kinds[kind], **arguments))
    if kind == "profanity" and importlib.util.find_spec("profanity_check") is None:
        load_profanity_check()  # which says what to install
    elif kind == "evaluate":
        checked_range(arguments.get("range", (0, 1)))
    elif kind == "phrases":
        plan.build()  # loads nothing
    elif kind == "judge":
        check_judge(arguments)
    return plan


def _read_settings(settings: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(settings, str):
        import yaml

        try:
            read = yaml.safe_load(settings)
        except yaml.YAMLError:
            raise ValueError(
                f"scorer {settings!r} is not YAML; write e.g. '{{kind: phrases, phrases: [damn]}}'"
            ) from None
        settings = {"kind": read} if isinstance(read, str) else read
    if not isinstance(settings, Mapping) or not isinstance(settings.get("kind"), str):
        raise ValueError(f"scorer {settings!r}: give a kind such as 'profanity', or a dict with `kind` and arguments")
    return dict(settings)


def _phrase_pattern(phrase: str) -> str:
    words = r"\s+".join(map(re.escape, phrase.split()))
    first, last = phrase.split()[0][0], phrase.split()[-1][-1]
    return (r"(?<![^\W_])" if first.isalnum() else "") + words + (r"(?![^\W_])" if last.isalnum() else "")


def _compile(pattern: str, flags: re.RegexFlag) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression ({error}); correct it") from None
