"""Which of two answers is better, by a language model that sees every pair in both orders."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ..generation import parse_engine
from ..generation.ask import Answer, ask_until_read, cached_calls, load_template
from ..generation.client import Request, ResponseCache
from ..generation.replies import Model, Unreadable, answer_text, as_text, read_reply
from ..generation.types import GenerationEngine, GenerationParams, Prompt
from ..options import check_choices, check_least, option


Vote = Literal["first", "second", "tie"]

MODES = ("scores", "verdict", "logprobs")
OPTIONS = ("A", "B")
CRITERION = (
    "how helpful and accurate the answer is, whether its level of detail fits, and how well it does what the request "
    "asks for. Length is no merit."
)
LEAST_MASS = 0.01
"""Least probability of all options together: small models seldom write one and yet rank by it; below this is noise."""

_VARIABLES = ("criterion", "first", "prompt", "second")

# The forms of scores outside of JSON, in plain characters and without emphasis: "8/10", "8 out of 10", "8点"
_SCORE = r"(\d{1,3}(?:\.\d+)?)(?:\s?(?:/|out of)\s?10(?:\.0)?|\s?点)?"
_SCORES_ARE = r"(?:(?:my |the )?(?:final )?(?:scores?|ratings?|評価|スコア|点数)\s?(?:is|are|は)?\s?:?\s?)?"
_END = r"\s?\)?\s?(?:です)?[.。]?\s?"
_ONE = re.compile(rf"\s?{_SCORES_ARE}{_SCORE}{_END}", re.IGNORECASE)
_PAIR = re.compile(rf"\s?{_SCORES_ARE}\(?{_SCORE}(?:\s?(?:[,;、&]|and|と)\s?|\s){_SCORE}{_END}", re.IGNORECASE)
_LABEL = r"(?:(?i:the )?(?i:score|rating) (?:of|for) )?([^\W\d_]+)\s?#?([12]|[AB](?![A-Za-z0-9]))"
_LABELLED = re.compile(
    rf"\s?{_LABEL}\s?(?:['’]s )?(?:score |rating )?(?:[:=(は]|is|gets|receives|deserves)\s?(?:Score: ?)?{_SCORE}{_END}"
    r"[,;、]?\s?(.*)"
)
_BETWEEN = re.compile(rf"\n|(?:[.。,;、]|\band\b)\s?(?={_LABEL})")
_VERDICT = re.compile(
    r"\s?(?:(?:the |my )?(?:final )?(?:winner|verdict|better answer|answer|勝者|判定)\s?(?:is|は|:)\s?)?"
    r"(?:(?:answer|回答)\s?(?=[AB]))?\(?(A|B|(?:it['’]s |it is )?(?:a )?(?:tie|draw)|引き分け)\)?\s?[.!。]?\s?",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"\[\[\s?(A|B|C|tie)\s?\]\]", re.IGNORECASE)
_SIDES = {"1": "score_1", "a": "score_1", "first": "score_1", "2": "score_2", "b": "score_2", "second": "score_2"}


# Whole numbers are asked for, since grammars can bound them; others are read too
_From1To10 = Annotated[float, Field(ge=1, le=10, json_schema_extra={"type": "integer"})]


@dataclass
class JudgeArguments:
    """The model that compares answers, named and asked in every method alike."""

    judge: str | None = option(None, "Compares answers: a model to run here, or YAML as {model: ..., base_url: ...}.")
    judge_mode: str = option("scores", "Scores of 1 to 10; A, B or tie; logprobs, for small models.", *MODES)
    judge_max_new_tokens: int = option(64, "Longest reply of the judge; more for one that thinks aloud.")

    def __post_init__(self):
        check_choices(self, "judge_mode")
        check_least(self, judge_max_new_tokens=1)
        if self.judge is not None and not parse_engine(self.judge, "judge").arguments.engine_model:
            raise ValueError("`judge` names no model: add `model` to it.")


class Rating(BaseModel):
    rating: _From1To10


class Scores(BaseModel):
    """Of the first and of the second answer; also read from a list of two, and under other names of the two."""

    score_1: _From1To10
    score_2: _From1To10

    @model_validator(mode="before")
    @classmethod
    def _by_side(cls, value: Any) -> Any:
        while isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), (dict, list)):
            [value] = value.values()
        if isinstance(value, list) and len(value) == 2 and not any(isinstance(score, dict) for score in value):
            value = dict(zip("12", value, strict=True))
        if not isinstance(value, dict):
            raise ValueError("there are no two scores")
        both = cls.model_fields.keys() <= value.keys()
        scores: dict[str, Any] = {}
        for key, score in value.items():
            if both and key not in cls.model_fields and isinstance(score, str):
                continue  # a reason
            sides = {_SIDES[word] for word in re.findall(r"[a-z]+|\d+", key.lower()) if word in _SIDES}
            if len(sides) == 1:
                if scores.keys() & sides:
                    raise ValueError("several scores for one answer")
                scores[sides.pop()] = _number(score)
        return scores


class Verdict(BaseModel):
    better: Literal["A", "B", "tie"]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; a judgment is found by the id."""

    id: str
    prompt: Prompt
    first: str
    second: str


@dataclass(frozen=True)
class Judgment:
    """What the judge makes of a pair.

    Args:
        winner: "first" or "second" if that answer won in both orders, else "tie"; None if a reply cannot be read.
        scores: Of both answers, means over both orders: 1 to 10 in mode "scores", in mode "logprobs" how likely each
            is the better one. None in mode "verdict", for equal answers, and where a reply cannot be read.
        votes: The better answer by the reply in the order given, and by that in the other order.
        reason, raw: Why there was nothing to ask, or what could not be read, and those replies.
    """

    id: str
    winner: Vote | None
    scores: tuple[float, float] | None
    votes: tuple[Vote | None, Vote | None]
    reason: str | None = None
    raw: tuple[str, ...] = ()

    @property
    def contradicts(self) -> bool:
        """Whether each order has another winner: the judge went by the place an answer stands in."""
        return set(self.votes) == {"first", "second"}


class PairwiseJudge:
    """Asks which of two answers is better, in both orders; a side wins only if it wins in both.

    Answers that are equal but for white space around them are a tie without a question. A reply that cannot be read is
    asked for once more; if that is in vain the pair has no winner, which is not a tie.

    Args:
        engine: The judge; it is given chats.
        mode: "scores" asks for two numbers from 1 to 10, "verdict" for A, B or tie, "logprobs" takes the probabilities
            that the reply begins with A or with B, for models that cannot write a readable reply.
        criterion: What makes an answer better, as a clause after "What counts is this:". Default: `CRITERION`.
        template: A Jinja file in place of the question that comes along, with the variables `prompt`, `first`,
            `second` (the answers in the order they are shown in) and `criterion`.
        params: Defaults to greedy decoding with up to 64 new tokens; a judge that thinks aloud needs more.
        cache: Where calls are kept: none that is in there is made again. The caller closes it.

    Attributes:
        counts: Over all calls of `judge`: `calls` made, `cache_hits`, replies `retried`; `low_mass`: orders of mode
            "logprobs" in which A and B, less than 1 % likely together, are two things the model would not say.

    Raises:
        ValueError: An unknown mode, an empty criterion, or a template that cannot be used; one line.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        *,
        mode: str = "scores",
        criterion: str | None = None,
        template: str | os.PathLike[str] | None = None,
        params: GenerationParams | None = None,
        cache: ResponseCache | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}")
        if criterion is not None and not criterion.strip():
            raise ValueError("`criterion` is empty; say in a few words what makes an answer better, or leave it out")
        self.engine = engine
        self.mode = mode
        self.criterion = " ".join((criterion or CRITERION).split())
        self.params = GenerationParams(1) if mode == "logprobs" else params or GenerationParams(64)
        self.counts: Counter[str] = Counter()
        self._cache = cache
        file = Path(__file__).parent / "prompts" / f"judge_{mode}.jinja" if template is None else Path(template)
        self._question = load_template(file, _VARIABLES, needed=("first", "second"))
        self._question(dict.fromkeys(_VARIABLES, "(text)"))  # what is wrong with it shows now
        self.settings: dict[str, Any] = {
            "engine": engine.name,
            "mode": mode,
            "criterion": self.criterion,
            "template": None if template is None else file.read_text(encoding="utf-8"),
            "params": self.params.as_dict(),
        }

    def judge(self, pairs: Sequence[Pair]) -> list[Judgment]:
        """A judgment for each pair, in their order. Raises what `ask_until_read` raises."""
        judgments = [Judgment(pair.id, "tie", None, ("tie", "tie"), "the answers are equal") for pair in pairs]
        asked = [place for place, pair in enumerate(pairs) if pair.first.strip() != pair.second.strip()]
        chats = [self._chat(pairs[place], swapped) for place in asked for swapped in (False, True)]
        if self.mode == "logprobs":
            answers = self._weigh(chats)
        else:
            schema, read = (Scores, read_scores) if self.mode == "scores" else (Verdict, read_verdict)
            answers = ask_until_read(
                self.engine, chats, self.params, schema, read=read, cache=self._cache, step="judge", counts=self.counts
            )
        for place, given, swapped in zip(asked, answers[::2], answers[1::2], strict=True):
            judgments[place] = self._judgment(pairs[place].id, given, swapped)
        return judgments

    def _chat(self, pair: Pair, swapped: bool) -> list[dict[str, str]]:
        first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        values = {"criterion": self.criterion, "prompt": as_text(pair.prompt), "first": first, "second": second}
        return [{"role": "user", "content": self._question(values)}]

    def _weigh(self, chats: list[list[dict[str, str]]]) -> list[Answer]:
        """The share of A and of B in their probability together."""
        requests = [Request("judge", self.engine.name, chat, self.params, OPTIONS) for chat in chats]
        answers = []
        for response in cached_calls(self.engine, requests, self._cache, self.counts):
            weights = [math.exp(value) for value in response.logprobs or ()]
            total = sum(weights)
            self.counts["low_mass"] += total < LEAST_MASS
            reason = None if total else "neither A nor B is among the likeliest tokens"
            answers.append(Answer(tuple(weight / total for weight in weights) if total else None, reason))
        return answers

    def _judgment(self, id_: str, given: Answer, swapped: Answer) -> Judgment:
        one, two = given.value, swapped.value and swapped.value[::-1]
        votes = one and _larger(*one), two and _larger(*two)
        unread = [own for own in (given, swapped) if own.reason is not None]
        if unread:
            reasons = dict.fromkeys(own.reason or "" for own in unread)
            return Judgment(id_, None, None, votes, "; ".join(reasons), sum((own.raw for own in unread), ()))
        scores = None if self.mode == "verdict" else ((one[0] + two[0]) / 2, (one[1] + two[1]) / 2)
        return Judgment(id_, votes[0] if votes[0] == votes[1] else "tie", scores, votes)


def read_scores(text: str, *, truncated: bool = False) -> tuple[float, float]:
    """Two scores from 1 to 10, for the first answer and for the second; `Unreadable` if there are none, or several.

    Strict, since a number somewhere in a text may mean anything. Understood are JSON (see `Scores`); a line of nothing
    but two numbers (`8 7`, `8/10 and 7/10.`, `Scores: 8, 7`), whatever is explained before or behind it; and scores
    labelled with the answers they are for (`Assistant 1: 8/10.`, `Answer B: 7`), one for each.
    """
    scores = _read(text, Scores, _plain_scores, truncated)
    return scores.score_1, scores.score_2


def _plain_scores(lines: list[str]) -> list[float]:
    pairs = {match.groups() for line in lines if (match := _PAIR.fullmatch(line))}
    alone = [match[1] for line in lines if (match := _ONE.fullmatch(line))]
    if len(alone) == len(lines) == 2:
        pairs = {tuple(alone)}
    labelled: dict[str, set[str]] = {"score_1": set(), "score_2": set()}
    names, doubtful = set(), False
    for piece in _BETWEEN.split("\n".join(lines))[:: _BETWEEN.groups + 1]:
        if match := _LABELLED.fullmatch(piece):
            name, side, score, rest = match.groups()
            if rest:  # "Answer 1: 5 arguments", "Answer 1: 8 for style"
                doubtful = True
            else:
                names.add(name.casefold())
                labelled[_SIDES[side.lower()]].add(score)
    if not pairs and len(names) == 1 and not doubtful:
        pairs = set(itertools.product(*labelled.values()))
    if len(pairs) != 1:
        raise Unreadable("several scores for one answer" if pairs else "there are no two scores")
    [pair] = pairs
    if any(scores - {score} for scores, score in zip(labelled.values(), pair, strict=True)):
        raise Unreadable("several scores for one answer")
    return [float(score) for score in pair]


def read_rating(text: str, *, truncated: bool = False) -> float:
    """One score from 1 to 10: JSON, or nothing but `7`, `8/10.` or `Score: 8 out of 10`; else `Unreadable`."""
    return _read(text, Rating, _plain_rating, truncated).rating


def _plain_rating(lines: list[str]) -> dict[str, float]:
    match = _ONE.fullmatch(lines[0]) if len(lines) == 1 else None
    if match is None:
        raise Unreadable("it is not one score and nothing else")
    return {"rating": float(match[1])}


def read_verdict(text: str, *, truncated: bool = False) -> tuple[float, float]:
    """Which of two answers is better: (1, 0) for A, (0, 1) for B, (0.5, 0.5) for a tie; or `Unreadable`.

    Understood are JSON (see `Verdict`), `[[A]]`, and a line of nothing but a letter or "tie", also behind "Winner:" or
    "Answer", whatever is explained before or behind it.
    """
    better = _read(text, Verdict, _plain_verdict, truncated).better
    return {"A": (1.0, 0.0), "B": (0.0, 1.0), "tie": (0.5, 0.5)}[better]


def _plain_verdict(lines: list[str]) -> dict[str, str]:
    found = _BRACKETED.findall("\n".join(lines)) or [own[1] for line in lines if (own := _VERDICT.fullmatch(line))]
    verdicts = {word.upper() if word.upper() in OPTIONS else "tie" for word in found}
    if len(verdicts) != 1:
        raise Unreadable("different verdicts" if verdicts else "there is no verdict")
    return {"better": verdicts.pop()}


def summarise(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """Counts of judgments, and how far the judge goes by the place an answer stands in; JSON-ready.

    `pairs` are `first`, `second` (wins), `ties` and `unread` together; of the ties some are `equal` answers or
    `contradictions`; `contradiction_share`, of the pairs that were read and not equal; `first_place_share`: of all
    replies that prefer an answer, the share that prefer the one shown first, 0.5 without bias; None of nothing.
    """
    winners = Counter(own.winner for own in judgments)
    equal = sum(own.winner == "tie" and own.reason is not None for own in judgments)
    compared = len(judgments) - winners[None] - equal
    contradictions = sum(own.contradicts for own in judgments)
    votes = [(vote, place) for own in judgments for vote, place in zip(own.votes, ("first", "second"), strict=True)]
    places = [vote == place for vote, place in votes if vote in ("first", "second")]
    return {
        "pairs": len(judgments),
        "first": winners["first"],
        "second": winners["second"],
        "ties": winners["tie"],
        "unread": winners[None],
        "equal": equal,
        "contradictions": contradictions,
        "contradiction_share": contradictions / compared if compared else None,
        "first_place_share": sum(places) / len(places) if places else None,
    }


def _read(text: str, schema: type[Model], plain: Callable[[list[str]], Any], truncated: bool) -> Model:
    """JSON of a schema, or what `plain` finds in lines of plain characters without emphasis and a number at a cut."""
    reply = unicodedata.normalize("NFKC", answer_text(text))
    if re.match(r"(?:```\w*\s*)?[\[{](?!\[)", reply):
        return read_reply(reply, schema, truncated=truncated)
    reply = re.sub(r"[ \t|]+", " ", re.sub(r"[*_`#\"“”]|^\s*[-•]\s", "", reply, flags=re.MULTILINE))
    if truncated:
        reply = re.sub(r"[\d./]+\Z", "", reply)
    return read_reply(json.dumps(plain([line for line in reply.splitlines() if line.strip()])), schema)


def _number(value: Any) -> float:
    """A score inside of JSON: 8, "8/10" or {"score": 8}."""
    if isinstance(value, dict):
        value = next((value[key] for key in reversed(value) if key.lower() in ("score", "rating")), None)
    if isinstance(value, str):
        return read_rating(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a score is no number")
    return value


def _larger(first: float, second: float) -> Vote:
    return "tie" if first == second else "first" if first > second else "second"
