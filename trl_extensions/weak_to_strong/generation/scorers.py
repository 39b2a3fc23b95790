"""What says how good an answer of a weak model is, a number a text: a classifier, a measurement, phrases, or a judge.

`plan_scorer` reads what a config says of one and checks it without loading anything; `score_rows` takes a file of rows
to a file of scored rows.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import yaml

from ...core.generation import EngineArguments, create_engine, parse_engine
from ...core.generation.ask import ask_until_read
from ...core.generation.replies import as_text
from ...core.generation.sampling import completion_text
from ...core.generation.types import GenerationEngine, GenerationParams, Prompt
from ...core.judge.pairwise import Rating, read_rating
from ...core.runs.resumable import MapReport, map_rows
from ...core.text import TextClassifier, load_profanity_check, pattern_finder
from ..labels.learners import digest


class Scorer(Protocol):
    """What says how good a text is. It may have two more attributes: `counts` (a `Counter` of what went wrong, by
    kind) and `failures` (of the last call: index of a text -> the raw answers out of which no score could be read)."""

    name: str  # key of the scores in the rows
    higher_is_better: bool
    range: tuple[float, float]  # the lowest and the highest score there can be
    settings: dict[str, Any]  # JSON-ready values that the scores depend on; a resumed run must have the same ones

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """A number for each completion, `None` where there is none to give. `prompts[i]` is what `completions[i]`
        answers or continues; no completion is empty."""


@dataclass
class TextScorer:
    """A scorer that looks at the completions alone."""

    name: str
    higher_is_better: bool
    range: tuple[float, float]
    settings: dict[str, Any]
    function: Callable[[Sequence[str]], Sequence[float | None]]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        return list(self.function(completions))


def profanity_scorer(*, name: str = "profanity") -> TextScorer:
    """The probability that a text is profane, by the linear model of `alt-profanity-check`; lower is better."""
    return TextScorer(name, False, (0.0, 1.0), {"kind": "profanity"}, load_profanity_check())


def classifier_scorer(
    model: str,
    label: str | None = None,
    *,
    higher_is_better: bool = False,
    batch_size: int = 32,
    name: str = "classifier",
) -> TextScorer:
    """The probability of a label under a sequence classifier of transformers, see `core.text.TextClassifier`.

    `higher_is_better` says whether the label is a good one; not so for "toxic".
    """
    classifier = TextClassifier(model, label, batch_size)
    settings = {"model": str(model), "label": classifier.label, "higher_is_better": higher_is_better}
    return TextScorer(name, higher_is_better, (0.0, 1.0), {"kind": "classifier"} | settings, classifier.score)


def phrases_scorer(
    phrases: Sequence[str] = (), patterns: Sequence[str] = (), *, ignore_case: bool = True, name: str = "phrases"
) -> TextScorer:
    """The share of phrases and regular expressions that are absent from a text; 1 means none occurs, higher is better.

    A stretch of white space in a phrase matches any other, and one that begins or ends with a letter or digit does not
    go on with another: "cat" is not in "category".
    """
    for field, values in (("phrases", phrases), ("patterns", patterns)):
        if isinstance(values, str) or not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(f"`{field}` is {values!r:.60}; give a list of texts, none of them empty")
    if not phrases and not patterns:
        raise ValueError("scorer of kind phrases: give `phrases` or `patterns` to look for")
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    finders = [pattern_finder(own, "the pattern", flags) for own in (*map(_phrase_pattern, phrases), *patterns)]

    def score(texts: Sequence[str]) -> list[float]:
        return [sum(next(find(text), None) is None for find in finders) / len(finders) for text in texts]

    settings = {"phrases": list(phrases), "patterns": list(patterns), "ignore_case": ignore_case}
    return TextScorer(name, True, (0.0, 1.0), {"kind": "phrases"} | settings, score)


def _phrase_pattern(phrase: str) -> str:
    words = r"\s+".join(map(re.escape, phrase.split()))
    first, last = phrase.split()[0][0], phrase.split()[-1][-1]
    return (r"(?<![^\W_])" if first.isalnum() else "") + words + (r"(?![^\W_])" if last.isalnum() else "")


def evaluate_scorer(
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
) -> TextScorer:
    """A number for each text from any module of the library `evaluate`, such as the measurement `toxicity`.

    Args:
        module: Path of the module's `.py` file or folder, which works offline, or its name.
        key: Which output to take, if there are several. One number for all texts is asked for each text alone.
        higher_is_better, range: Whether a higher number means a better text, and the lowest and the highest there is.
        input_name: What the module calls its texts, if it has several inputs and none is `predictions`.
        config_name, module_type: As in `evaluate.load`.
        arguments: Further arguments of the module's `compute`, such as `{"model_id": "gpt2"}`.
        name: Key of the scores; the module's own name when left out.
    """
    import evaluate

    limits = checked_range(range)
    try:
        # In memory: two runs on one machine would otherwise wait for each other's cache file
        loaded = evaluate.load(str(module), config_name, module_type=module_type, keep_in_memory=True)
    except Exception as error:  # of many kinds: no network, no such module, a package that it imports
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        remedy = "give the path of its .py file, or a name that the hub knows"
        raise ValueError(f"evaluate module {module}: it cannot be loaded ({reason}); {remedy}") from error
    inputs = list(loaded.features[0] if isinstance(loaded.features, list) else loaded.features)
    chosen = input_name or (inputs[0] if len(inputs) == 1 else "predictions")
    if inputs != [chosen]:
        remedy = "set `input_name` to the only one, or use a module that measures texts alone"
        raise ValueError(f"evaluate module {module}: its inputs are {inputs}, not one of texts: {remedy}")
    called = name or loaded.name.replace("--", "/").split("/")[-1]

    def compute(texts: Sequence[str]) -> Any:
        output: Any = loaded.compute(**{chosen: list(texts)}, **(arguments or {}))
        output = output if isinstance(output, dict) else {}
        wanted = next(iter(output)) if key is None and len(output) == 1 else key
        value = output.get(wanted)
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, str) or not isinstance(value, (int, float, Sequence)):
            found = f"output {wanted!r} is {type(value).__name__}"
            known = ", ".join(map(repr, output))
            raise ValueError(f"scorer {called!r}: {found}; set `key` to one with numbers, of: {known}")
        return value

    def score(texts: Sequence[str]) -> list[float]:
        value = compute(texts)
        if isinstance(value, (int, float)):  # of all texts together
            value = [value] if len(texts) == 1 else [compute([text]) for text in texts]
        return value

    settings = {"module": str(module), "config_name": config_name, "key": key, "input_name": chosen}
    settings |= {"arguments": dict(arguments or {}), "higher_is_better": higher_is_better}
    return TextScorer(called, higher_is_better, limits, {"kind": "evaluate"} | settings, score)


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


class JudgeScorer:
    """Asks a language model for a rating from 1 to 10; higher is better.

    A reply of which no rating can be read is asked for once more; if that fails too, the text has no score and both
    replies are in `failures`. A small model is no judge: rate a few answers yourself before training on its choice.

    Args:
        engine: The judge; it is given chat messages.
        criterion: What a good answer is, in words that complete "Criterion: ...", such as "polite, without insults".
        params: Also as a dict of its fields. Defaults to greedy decoding with up to 24 new tokens; a judge that
            thinks aloud needs more.
        name: Key of the scores.
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
        self.engine, self.name = engine, name
        self.criterion, self.params = _checked_judge(criterion, params)
        self.counts: Counter[str] = Counter()
        self.failures: dict[int, list[str]] = {}
        settings = {"kind": "judge", "engine": engine.name, "criterion": self.criterion}
        self.settings = settings | {"params": self.params.as_dict(), "question": digest([QUESTION.encode()])}

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Ratings in [1, 10], `None` where none could be read."""
        chats = []
        for prompt, text in zip(prompts, completions, strict=True):
            question = QUESTION.format(criterion=self.criterion, prompt=as_text(prompt), text=text)
            chats.append([{"role": "user", "content": question}])
        counts: Counter[str] = Counter()
        answers = ask_until_read(self.engine, chats, self.params, Rating, read=read_rating, step="rate", counts=counts)
        self.failures = {i: list(answer.raw) for i, answer in enumerate(answers) if answer.value is None}
        self.counts += Counter(retried=counts["retried"], unparsed=len(self.failures))
        return [answer.value for answer in answers]


def judge_by_name(
    criterion: str, *, params: dict[str, Any] | None = None, name: str = "judge", **engine: Any
) -> JudgeScorer:
    """A judge that is loaded here (`model`) or asked at an endpoint (`base_url` too); `engine` may say all that
    `parse_engine` knows."""
    return JudgeScorer(create_engine(_judge_engine(**engine)), criterion, params=params, name=name)


def _judge_engine(**engine: Any) -> EngineArguments:
    if not engine.get("model"):
        raise ValueError("scorer of kind judge: give the `model` that judges")
    return parse_engine(engine, "scorer of kind judge").arguments


def _checked_judge(criterion: Any, params: GenerationParams | dict[str, Any] | None) -> tuple[str, GenerationParams]:
    if not isinstance(criterion, str) or not criterion.strip():
        raise ValueError("scorer of kind judge: `criterion` is empty; say in a few words what a good answer is")
    if not isinstance(params, GenerationParams):
        try:
            params = GenerationParams(**{"max_new_tokens": 24, **(params or {})})
        except TypeError as error:
            raise ValueError(f"scorer of kind judge: `params`: {error}; correct it") from None
    return " ".join(criterion.split()), params


# What a config may name
KINDS: dict[str, Callable[..., Scorer]] = {
    "profanity": profanity_scorer,
    "classifier": classifier_scorer,
    "judge": judge_by_name,
    "evaluate": evaluate_scorer,
    "phrases": phrases_scorer,
}


class ScorerPlan(NamedTuple):
    """A scorer that a config describes, as given, and what loads it; nothing of it is loaded yet."""

    settings: dict[str, Any]
    build: Callable[[], Scorer]


def plan_scorer(settings: str | Mapping[str, Any]) -> ScorerPlan:
    """Check what a config says of a scorer as far as that goes without loading any model.

    Args:
        settings: A dict with a `kind` of `KINDS` and the arguments of its function. As a text: the kind alone, or the
            dict in YAML (`"{kind: classifier, model: ./toxic, label: toxic}"`).
    """
    given: Any = settings
    if isinstance(settings, str):
        try:
            given = yaml.safe_load(settings)
        except yaml.YAMLError:
            example = "{kind: phrases, phrases: [damn]}"
            raise ValueError(f"scorer {settings!r} is not YAML; write e.g. '{example}'") from None
        given = {"kind": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        raise ValueError(f"scorer {given!r}: give a kind such as 'profanity', or a dict with `kind` and arguments")
    arguments = dict(given)
    kind = arguments.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scorer {kind!r}; give one of {', '.join(KINDS)}")
    try:
        inspect.signature(KINDS[kind]).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(KINDS[kind]).parameters)
        raise ValueError(f"scorer of kind {kind}: {error}; its arguments are {known}") from None
    plan = ScorerPlan(dict(given), partial(KINDS[kind], **arguments))
    if kind == "profanity" and importlib.util.find_spec("profanity_check") is None:
        load_profanity_check()  # which says what to install
    elif kind == "evaluate":
        checked_range(arguments.get("range", (0, 1)))
    elif kind == "phrases":
        plan.build()  # loads nothing
    elif kind == "judge":
        _checked_judge(arguments["criterion"], arguments.get("params"))
        _judge_engine(**{n: value for n, value in arguments.items() if n not in ("criterion", "params", "name")})
    return plan


def checked_range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest score as floats; a `ValueError` unless they are finite, the lower one first."""
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"`range` of a scorer is {values!r:.60}; give its lowest and highest score, such as [0, 1]")
    return low, high


@dataclass(frozen=True)
class ScoringReport(MapReport):
    """Also the rows without text (no scorer is asked about them), those with a score and their mean, and what went
    wrong in this call, by kind."""

    empty: int
    scored: int
    mean: float | None
    counts: dict[str, int]

    @property
    def summary(self) -> str:
        """One line for a log."""
        average = "no score" if self.mean is None else f"mean {self.mean:.3g}"
        counts = {"without a score": self.rows - self.empty - self.scored} | dict(sorted(self.counts.items()))
        wrong = "".join(f", {count} {kind}" for kind, count in counts.items() if count)
        rows = f"{self.rows} rows scored ({self.resumed} by an earlier run), {self.empty} of them empty"
        return f"{self.path}: {rows}; {average}{wrong}; {self.seconds:.1f} s"


def score_rows(
    rows: Sequence[dict[str, Any]], scorer: Scorer, output: str | os.PathLike, *, chunk_size: int = 64
) -> ScoringReport:
    """Score rows (`id`, `prompt`, `completion`) and append each to a JSON-lines file; resumable, see `map_rows`.

    A row keeps its columns and gets `scores` (scorer -> number, or None where there is none: an empty completion, or
    a text that the scorer could not score), beside those it has already, and `failures` (scorer -> raw answers) if a
    judge's replies could not be read. A `ValueError` names the scorer and the row where there is no score for any row,
    not one for each, or one that is no number; nothing of that chunk is written.
    """
    for row in rows:
        if scorer.name in (row.get("scores") or {}):
            raise ValueError(f"row {row['id']!r} has a score {scorer.name!r} already; give the scorer another `name`")
    before = Counter(getattr(scorer, "counts", {}))
    empty = scored = 0
    total = 0.0

    def tally(row: dict[str, Any]) -> None:
        nonlocal empty, scored, total
        score = row["scores"].get(scorer.name)
        empty += not completion_text(row["completion"]).strip()
        scored += score is not None
        total += score or 0.0

    def make(chunk: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        asked = [place for place, row in enumerate(chunk) if _text(row).strip()]
        scores: dict[int, float | None] = {}
        failures: dict[int, list[str]] = {}
        if asked:
            scores = dict(zip(asked, checked_scores(scorer, [chunk[place] for place in asked]), strict=True))
            failures = {asked[i]: list(raw) for i, raw in getattr(scorer, "failures", {}).items()}
            if not scored and all(value is None for value in scores.values()):
                reply = f"; it replied {failures[asked[0]][-1]!r:.120}" if asked[0] in failures else ""
                where = f"the first {len(asked)} rows with text, beginning with row {chunk[asked[0]]['id']!r}"
                raise ValueError(f"scorer {scorer.name!r} gave no score to any of {where}{reply}; use another scorer")
        for place, row in enumerate(chunk):
            made = {**row, "scores": {**(row.get("scores") or {}), scorer.name: scores.get(place)}}
            if place in failures:
                made["failures"] = {**(row.get("failures") or {}), scorer.name: failures[place]}
            yield place, made

    own: dict[str, Any] = {"settings": {scorer.name: scorer.settings}, "same": ("completion",), "tally": tally}
    report = map_rows(rows, make, output, chunk_size=chunk_size, desc="scoring", **own)
    mean, counts = total / scored if scored else None, Counter(getattr(scorer, "counts", {})) - before
    return ScoringReport(**vars(report), empty=empty, scored=scored, mean=mean, counts=dict(counts))


def checked_scores(scorer: Scorer, rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """Ask a scorer, which may be the user's own, and check that it returns a finite number or None for each row."""
    values: Any = scorer.score([row.get("prompt", "") for row in rows], [_text(row) for row in rows])
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or len(values) != len(rows):
        number = len(values) if isinstance(values, list) else f"{type(values).__name__}, no list of"
        asked = f"{len(rows)} rows from {rows[0]['id']!r}"
        raise ValueError(f"scorer {scorer.name!r} returned {number} scores for {asked}")
    for value, row in zip(values, rows, strict=True):
        if value is not None and (isinstance(value, (bool, str, list)) or not math.isfinite(value)):
            found = f"gave row {row['id']!r} the score {value!r:.60}"
            raise ValueError(f"scorer {scorer.name!r} {found}; give a finite number, or None for what has no score")
    return [None if value is None else float(value) for value in values]


def _text(row: dict[str, Any]) -> str:
    if "completion" not in row:
        raise ValueError(f"row {row['id']!r}: no `completion`, only {sorted(row)}")
    try:
        return completion_text(row["completion"])
    except ValueError as error:
        raise ValueError(f"row {row['id']!r}: {error}") from None


def check_scores(rows: Iterable[dict[str, Any]], scorer: Scorer) -> None:
    """Make sure that scored rows have scores in the scorer's range, or none; a `ValueError` names the row."""
    low, high = scorer.range
    for row in rows:
        score = row["scores"][scorer.name]
        if score is not None and not low <= score <= high:
            found = f"gave row {row['id']!r} the score {score:g}, outside of its range {low:g} to {high:g}"
            remedy = "set `range` of the scorer to the lowest and highest it can give (scores made so far are kept)"
            raise ValueError(f"scorer {scorer.name!r} {found}: {remedy}.")
