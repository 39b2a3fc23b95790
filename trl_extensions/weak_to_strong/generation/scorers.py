"""What says how good an answer of a weak model is, a number a text: a classifier, a measurement, phrases, or a judge.

`plan_scorer` reads what a config says of one and checks it without loading anything.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, Field

from ...core.generation import create_engine, parse_engine
from ...core.generation.ask import ask_until_read
from ...core.generation.replies import as_text
from ...core.generation.types import GenerationEngine, GenerationParams, Prompt
from ...core.text import TextClassifier, load_profanity_check
from ..labels.learners import digest


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
    """The probability that a text is profane, by the linear model of `alt-profanity-check`; lower is better."""

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
        ValueError: Nothing to look for, no list of texts, an empty one, or a pattern that is no regular expression.
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
            if isinstance(values, str) or not all(isinstance(value, str) and value.strip() for value in values):
                raise ValueError(f"`{field}` is {values!r:.60}; give a list of texts, none of them empty")
        if not phrases and not patterns:
            raise ValueError("scorer of kind phrases: give `phrases` or `patterns` to look for")
        self.name = name
        flags = re.IGNORECASE if ignore_case else re.NOFLAG
        self._expressions = [re.compile(_phrase_pattern(phrase), flags) for phrase in phrases]
        for pattern in patterns:
            try:
                self._expressions.append(re.compile(pattern, flags))
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is not a regular expression ({error}); correct it") from None
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


def _phrase_pattern(phrase: str) -> str:
    words = r"\s+".join(map(re.escape, phrase.split()))
    first, last = phrase.split()[0][0], phrase.split()[-1][-1]
    return (r"(?<![^\W_])" if first.isalnum() else "") + words + (r"(?![^\W_])" if last.isalnum() else "")


class EvaluateScorer:
    """A number for each text from any module of the library `evaluate`, such as the measurement `toxicity`.

    Args:
        module: Path of the module's `.py` file or folder, which works offline, or its name.
        key: Which output to take. May be left out if there is one. Where the module gives one number for all texts,
            it is asked about each text alone.
        higher_is_better: Whether a higher number means a better text.
        range: The lowest and the highest number the module gives.
        input_name: What the module calls its texts. May be left out if it has one input, or `predictions`.
        config_name: Configuration of the module, if it has several.
        module_type: `"metric"`, `"measurement"` or `"comparison"`; needed for some names, never for paths.
        arguments: Further arguments of the module's `compute`, such as `{"model_id": "gpt2"}`.
        name: Key of the scores; the module's own name when left out.

    Raises:
        ValueError: The module cannot be loaded, or needs an input beside the texts; a range that is none.
    """

    def __init__(
        self,
        module: str,
        key: str | None = None,
        *,
        higher_is_better: bool,
        range: tuple[float, float] = (0.0, 1.0),
        input_name: str | None = None,
        config_name: str | None = None,
        module_type: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        name: str | None = None,
    ):
        self.range = checked_range(range)
        self._module = _load_module(module, config_name, module_type)
        self.name = name or self._module.name.replace("--", "/").split("/")[-1]
        self.higher_is_better = higher_is_better
        self.key = key
        self._input = _input_name(module, self._module, input_name)
        self._arguments = dict(arguments or {})
        self.settings: dict[str, Any] = {
            "kind": "evaluate",
            "module": str(module),
            "config_name": config_name,
            "key": key,
            "input_name": self._input,
            "arguments": self._arguments,
            "higher_is_better": higher_is_better,
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Numbers as the module gives them; prompts are not looked at.

        Raises:
            ValueError: The output `key` is not there, or is neither a number nor one for each text.
        """
        value = self._compute(completions)
        if isinstance(value, (int, float)):  # of all texts together
            value = [value] if len(completions) == 1 else [self._compute([text]) for text in completions]
        return list(value)

    def _compute(self, texts: Sequence[str]) -> Any:
        output = self._module.compute(**{self._input: list(texts)}, **self._arguments)
        output = output if isinstance(output, dict) else {}
        key = next(iter(output)) if self.key is None and len(output) == 1 else self.key
        value = output.get(key)
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, str) or not isinstance(value, (int, float, Sequence)):
            problem = f"output {key!r} is {type(value).__name__}" if key in output else f"the module gives no {key!r}"
            raise ValueError(
                f"scorer {self.name!r}: {problem}; set `key` to one with numbers, of: {', '.join(map(repr, output))}"
            )
        return value


def _load_module(module: str, config_name: str | None, module_type: str | None) -> Any:
    import evaluate

    try:
        # In memory: two runs on one machine would otherwise wait for each other's cache file
        return evaluate.load(str(module), config_name, module_type=module_type, keep_in_memory=True)
    except Exception as error:  # of many kinds: no network, no such module, a package that it imports
        reason = " ".join(str(error).split())
        raise ValueError(
            f"evaluate module {module}: it cannot be loaded ({type(error).__name__}: {reason:.200}); give the path of "
            "its .py file, or a name that the hub knows"
        ) from error


def _input_name(path: str, module: Any, name: str | None) -> str:
    features = module.features if isinstance(module.features, list) else [module.features]
    names = list(features[0])
    name = name or (names[0] if len(names) == 1 else "predictions")
    if name not in names:
        raise ValueError(f"evaluate module {path}: it has no input {name!r}; set `input_name` to one of {names}")
    needed = [other for other in names if other != name]
    if needed:
        raise ValueError(
            f"evaluate module {path}: it needs {needed} beside the texts; a scorer has only texts to give, so use a "
            "module that measures them alone"
        )
    return name


class Rating(BaseModel):
    """What the judge replies."""

    rating: int = Field(ge=1, le=10)


QUESTION = """\
Below are a request and an answer to it. Rate the answer by one criterion, from 1 to 10.

Criterion: {criterion}

10 means that the answer meets the criterion entirely, 1 that it does not meet it at all. Nothing else counts: an \
answer is not better for being longer, or for agreeing with you.

<request>
{prompt}
</request>

<answer>
{text}
</answer>

Reply with JSON and nothing else: {{"rating": N}}, where N is a whole number from 1 to 10."""
"""What the judge is asked, as the only message of a chat."""


class JudgeScorer:
    """Asks a language model for a rating from 1 to 10; higher is better.

    The question is `QUESTION`, the reply a `Rating`, to which engines that can are held. A reply that cannot be read, or
    was cut off, is asked for once more. If that fails too, the text has no score and both replies are in `failures`.

    A small model is no judge. Rate a few answers yourself before training on what one keeps.

    Attributes:
        counts: Over all calls: texts `retried`, and of these those `unparsed` in the end.
        failures: Of the last call: index of a text -> both replies.

    Args:
        engine: The judge; it is given chat messages.
        criterion: What a good answer is, in words that complete "Criterion: ...", such as "polite, without insults".
        params: Also as a dict of its fields. Defaults to greedy decoding with up to 24 new tokens; a judge that
            thinks aloud needs more.
        name: Key of the scores.

    Raises:
        ValueError: The criterion is empty, or `params` has a field that there is not.
    """

    higher_is_better = True
    range = (1.0, 10.0)

    def __init__(
        self,
        engine: GenerationEngine,
        criterion: str,
        *,
        params: GenerationParams | dict[str, Any] | None = None,
        name: str = "judge",
    ):
        self.engine = engine
        self.criterion, self.params = _checked_judge(criterion, params)
        self.name = name
        self.counts: Counter[str] = Counter()
        self.failures: dict[int, list[str]] = {}
        self.settings: dict[str, Any] = {
            "kind": "judge",
            "engine": engine.name,
            "criterion": self.criterion,
            "params": self.params.as_dict(),
            "question": digest([QUESTION.encode()]),
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Ratings in [1, 10], `None` where none could be read."""
        questions = [
            QUESTION.format(criterion=self.criterion, prompt=as_text(prompt), text=text)
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        chats = [[{"role": "user", "content": question}] for question in questions]
        counts: Counter[str] = Counter()
        answers = ask_until_read(self.engine, chats, self.params, Rating, step="rate", counts=counts)
        self.failures = {i: list(answer.raw) for i, answer in enumerate(answers) if answer.value is None}
        self.counts += Counter(retried=counts["retried"], unparsed=len(self.failures))
        return [None if answer.value is None else float(answer.value.rating) for answer in answers]


def judge_by_name(
    criterion: str,
    *,
    params: GenerationParams | dict[str, Any] | None = None,
    name: str = "judge",
    **engine: Any,
) -> JudgeScorer:
    """A judge that is loaded here (`model`) or asked at an endpoint (`base_url` too); `engine` may say all that
    `parse_engine` knows."""
    return JudgeScorer(create_engine(_judge_engine(engine)), criterion, params=params, name=name)


def _judge_engine(engine: dict[str, Any]) -> Any:
    if not engine.get("model"):
        raise ValueError("scorer of kind judge: give the `model` that judges")
    return parse_engine(engine, "scorer of kind judge").arguments


def _checked_judge(
    criterion: Any, params: GenerationParams | dict[str, Any] | None = None
) -> tuple[str, GenerationParams]:
    if not isinstance(criterion, str) or not criterion.strip():
        raise ValueError("scorer of kind judge: `criterion` is empty; say in a few words what a good answer is")
    if not isinstance(params, GenerationParams):
        try:
            params = GenerationParams(**{"max_new_tokens": 24, **(params or {})})
        except TypeError as error:
            raise ValueError(f"scorer of kind judge: `params`: {error}; correct it") from None
    return " ".join(criterion.split()), params


# From a config to a scorer


@dataclass(frozen=True)
class ScorerPlan:
    """A scorer that a config describes, as given, and what loads it; nothing of it is loaded yet."""

    settings: dict[str, Any]
    build: Callable[[], Scorer]


def plan_scorer(settings: str | Mapping[str, Any]) -> ScorerPlan:
    """Check what a config says of a scorer as far as that goes without loading any model.

    Args:
        settings: A dict with `kind` and the arguments of the class: `profanity` (`ProfanityScorer`), `classifier`
            (`ClassifierScorer`), `judge` (`judge_by_name`), `evaluate` (`EvaluateScorer`) or `phrases`
            (`PhraseScorer`). As a text: the kind alone, or the dict in YAML
            (`"{kind: classifier, model: ./toxic, label: toxic}"`).

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
        "judge": judge_by_name,
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
        _checked_judge(arguments["criterion"], arguments.get("params"))
        _judge_engine({n: value for n, value in arguments.items() if n not in ("criterion", "params", "name")})
    return plan


def _read_settings(settings: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(settings, str):
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


# The range of a scorer


def checked_range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest score as floats; a `ValueError` unless they are finite, the lower one first."""
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"`range` of a scorer is {values!r:.60}; give its lowest and highest score, such as [0, 1]")
    return low, high


def check_scores(rows: Iterable[dict[str, Any]], scorer: Scorer) -> None:
    """Make sure that scored rows have scores in the scorer's range, or none; a `ValueError` names the row."""
    low, high = scorer.range
    for row in rows:
        score = row["scores"][scorer.name]
        if score is not None and not low <= score <= high:
            raise ValueError(
                f"scorer {scorer.name!r} gave row {row['id']!r} the score {score:g}, outside of its range {low:g} to "
                f"{high:g}: set `range` of the scorer to the lowest and highest score it can give (what is scored "
                "already is kept), or use another scorer."
            )
