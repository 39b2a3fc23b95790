"""Which of two answers is better, by a language model that sees every pair in both orders."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ..generation.client import Request, Response, ResponseCache
from ..generation.replies import Unreadable, as_text
from ..generation.types import GenerationEngine, GenerationParams, Prompt
from .replies import LEAST_MASS, Verdict, parse_scores, parse_verdict


Side = Literal["first", "second"]
Vote = Literal["first", "second", "tie"]

MODES = ("scores", "verdict", "logprobs")
OPTIONS = ("A", "B")
CRITERION = (
    "how helpful and accurate the answer is, whether its level of detail fits, and how well it does what the request "
    "asks for. Length is no merit."
)

_PROMPTS = files("trl_extensions.core.judge").joinpath("prompts")
_VARIABLES = {"criterion", "prompt", "first", "second"}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Args:
        id: What the judgment is found by.
        prompt: What was asked: a text or a chat.
        first, second: The answers.
    """

    id: str
    prompt: Prompt
    first: str
    second: str


@dataclass(frozen=True)
class Judgment:
    """What the judge makes of a pair.

    Args:
        id: Of the pair.
        winner: "first" or "second" if that answer won in both orders, else "tie"; None if a reply cannot be read.
        scores: Of the first and of the second answer, means over both orders: 1 to 10 in mode "scores"; in mode
            "logprobs" the probability of each to be the better one, which add up to 1. None in mode "verdict", for
            answers that are equal, and where a reply cannot be read.
        votes: The better answer by the reply in the order given, and by that in the other order.
        reason: Why there was nothing to ask, or what could not be read.
        raw: The replies in each order that could not be read, in the order they were asked for.
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


@dataclass(frozen=True)
class _Read:
    """What one order says: a vote, and the scores of the first and of the second answer of the pair."""

    vote: Vote | None
    scores: tuple[float, float] | None = None
    reason: str | None = None
    raw: tuple[str, ...] = ()


class PairwiseJudge:
    """Asks which of two answers is better, in both orders; a side wins only if it wins in both.

    Judges prefer an answer for the place it stands in, small ones more often than not; a win that holds in both places
    is none of that. Answers that are equal but for white space around them are a tie without a question. A reply that
    cannot be read is answered with what is wrong and asked for once more; if that is in vain the pair has no winner,
    which is not a tie.

    Modes: "scores" asks for two numbers from 1 to 10, "verdict" for A, B or tie, "logprobs" takes the probabilities
    that the reply begins with A or with B, for models that cannot write a readable reply. There are no ties in an
    order of "logprobs" and there is nothing to ask again.

    Args:
        engine: The judge; it is given chats.
        mode: "scores", "verdict" or "logprobs".
        criterion: What makes an answer better, as a clause after "What counts is this:". Default: `CRITERION`.
        template: A Jinja file in place of the question that comes along, with the variables `prompt`, `first`,
            `second` (the answers in the order they are shown in) and `criterion`.
        params: Defaults to greedy decoding with up to 64 new tokens; a judge that thinks aloud needs more.
        log: Where calls are kept: none that is in there is made again. The caller closes it.

    Attributes:
        counts: Over all calls of `judge`: `calls` made, those `reused` from the log, replies `retried`; `low_mass`:
            in mode "logprobs" orders in which A and B had less than 1 % of the probability together, so that the
            preference is one between two things the model would not say.

    Raises:
        ValueError: An unknown mode, an empty criterion, or a template that cannot be used; one line.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        *,
        mode: str = "scores",
        criterion: str | None = None,
        template: str | os.PathLike | None = None,
        params: GenerationParams | None = None,
        log: ResponseCache | None = None,
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
        self._log = log
        self._question = _load_template(template, mode)
        self.settings: dict[str, Any] = {
            "engine": engine.name,
            "mode": mode,
            "criterion": self.criterion,
            "template": None if template is None else Path(template).read_text(encoding="utf-8"),
            "params": self.params.as_dict(),
        }

    def judge(self, pairs: Sequence[Pair]) -> list[Judgment]:
        """A judgment for each pair, in their order.

        Every finished call is in the log before the next one is waited for, so that a run that was killed goes on
        where it stopped.

        Raises:
            ValueError, EndpointError, OSError: The engine refuses a question, or the log cannot be written; what was
                answered before is in the log.
        """
        asked = [(i, swapped) for i, pair in enumerate(pairs) if not _equal(pair) for swapped in (False, True)]
        chats = [self._chat(pairs[i], swapped) for i, swapped in asked]
        read = self._weigh(chats) if self.mode == "logprobs" else self._write(chats)
        by_order = {
            place: _seen_from_pair(own, swapped=place[1]) for place, own in zip(asked, read, strict=True)
        }  # fmt: skip
        return [
            _judgment(pair.id, by_order[i, False], by_order[i, True])
            if (i, False) in by_order
            else Judgment(pair.id, "tie", None, ("tie", "tie"), "the answers are equal")
            for i, pair in enumerate(pairs)
        ]

    def _chat(self, pair: Pair, swapped: bool) -> list[dict[str, str]]:
        first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        content = self._question.render(
            criterion=self.criterion, prompt=as_text(pair.prompt), first=first, second=second
        )
        return [{"role": "user", "content": content}]

    def _write(self, chats: list[list[dict[str, str]]]) -> list[_Read]:
        """What the replies say of the answers as they are shown, asked again where one says nothing."""
        results: dict[int, _Read] = {}
        questions = dict(enumerate(chats))
        for step in ("judge", "judge:again"):
            self.counts["retried"] += len(questions) if step == "judge:again" else 0
            replies = self._replies([Request(step, self.engine.name, chat, self.params) for chat in questions.values()])
            again = {}
            for place, reply in zip(questions, replies, strict=True):
                try:
                    results[place] = self._parse(reply)
                except Unreadable as error:
                    earlier = results[place].raw if place in results else ()
                    results[place] = _Read(None, reason=str(error), raw=(*earlier, reply.text))
                    again[place] = self._again(chats[place], reply, str(error))
            questions = again
        return [results[place] for place in range(len(chats))]

    def _weigh(self, chats: list[list[dict[str, str]]]) -> list[_Read]:
        calls = [Request("judge", self.engine.name, chat, self.params, OPTIONS) for chat in chats]
        results = []
        for reply in self._replies(calls):
            weights = [math.exp(value) for value in reply.logprobs or ()]
            self.counts["low_mass"] += sum(weights) < LEAST_MASS
            if not sum(weights):
                results.append(_Read(None, reason="neither A nor B is among the likeliest tokens"))
                continue
            share = weights[0] / sum(weights)
            results.append(_Read(_larger(share, 1 - share), (share, 1 - share)))
        return results

    def _parse(self, reply: Response) -> _Read:
        truncated = reply.finish_reason == "length"
        try:
            if self.mode == "scores":
                scores = parse_scores(reply.text, truncated=truncated)
                return _Read(_larger(*scores), scores)
            names: dict[Verdict, Vote] = {"A": "first", "B": "second", "tie": "tie"}
            return _Read(names[parse_verdict(reply.text)])
        except Unreadable as error:
            cut = f", and it was cut off at {self.params.max_new_tokens} tokens" if truncated else ""
            raise Unreadable(f"{error}{cut}") from None

    def _again(self, chat: list[dict[str, str]], reply: Response, reason: str) -> list[dict[str, str]]:
        from jinja2 import Template

        template = Template(_PROMPTS.joinpath("judge_again.jinja").read_text(encoding="utf-8"))
        content = template.render(mode=self.mode, reason=reason)
        # Some chat templates refuse a turn without text
        said = {"role": "assistant", "content": reply.text or "(empty)"}
        return [*chat, said, {"role": "user", "content": content}]

    def _replies(self, calls: list[Request]) -> list[Response]:
        """The reply to each call: from the log, or from the engine, which is asked once for all that are missing."""
        from tqdm.auto import tqdm

        known = {call.key: reply for call in calls if self._log is not None and (reply := self._log.find(call))}
        missing = list({call.key: call for call in calls if call.key not in known}.values())
        self.counts["reused"] += len(known)
        with tqdm(total=len(missing), desc="judging", unit="call", disable=not missing) as bar:
            for place, reply in self._ask(missing):
                if self._log is not None:
                    self._log.add(missing[place], reply)
                known[missing[place].key] = reply
                self.counts["calls"] += 1
                bar.update()
        return [known[call.key] for call in calls]

    def _ask(self, calls: list[Request]) -> Iterator[tuple[int, Response]]:
        prompts = [call.prompt for call in calls]
        if not calls:
            return
        if self.mode == "logprobs":
            for place, generation, logprobs in self.engine.option_logprobs(prompts, OPTIONS):
                yield place, replace(Response.of(generation), logprobs=tuple(logprobs))
        else:
            for place, generation in self.engine.generate(prompts, self.params):
                yield place, Response.of(generation)


def summarise(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """Counts of judgments, and how far the judge goes by the place an answer stands in.

    Returns:
        JSON-ready: `pairs`; `first`, `second` (wins), `ties` and `unread`, which add up to them; of the ties, those
        that are `equal` answers and `contradictions`; `contradiction_share`, of the pairs that were read and not
        equal; and `first_place_share`: of all replies that prefer an answer, the share that prefer the one shown
        first, 0.5 for a judge without bias. Shares of nothing are None.
    """
    winners = Counter(judgment.winner for judgment in judgments)
    compared = [own for own in judgments if None not in own.votes and not _is_equal(own)]
    contradictions = sum(own.contradicts for own in judgments)
    places = Counter(
        vote == place for own in judgments for vote, place in zip(own.votes, ("first", "second"), strict=True)
        if vote in ("first", "second")
    )  # fmt: skip
    return {
        "pairs": len(judgments),
        "first": winners["first"],
        "second": winners["second"],
        "ties": winners["tie"],
        "unread": winners[None],
        "equal": sum(map(_is_equal, judgments)),
        "contradictions": contradictions,
        "contradiction_share": contradictions / len(compared) if compared else None,
        "first_place_share": places[True] / places.total() if places else None,
    }


def _is_equal(judgment: Judgment) -> bool:
    return judgment.winner == "tie" and judgment.reason is not None


def _equal(pair: Pair) -> bool:
    return pair.first.strip() == pair.second.strip()


def _larger(first: float, second: float) -> Vote:
    return "tie" if first == second else "first" if first > second else "second"


def _seen_from_pair(read: _Read, *, swapped: bool) -> _Read:
    """What a reply says of the answers as they are shown, said of the pair's first and second answer."""
    if not swapped or read.vote is None:
        return read
    other: dict[Vote, Vote] = {"first": "second", "second": "first", "tie": "tie"}
    return replace(read, vote=other[read.vote], scores=read.scores and read.scores[::-1])


def _judgment(id_: str, given: _Read, swapped: _Read) -> Judgment:
    votes = (given.vote, swapped.vote)
    if None in votes:
        reasons = dict.fromkeys(own.reason for own in (given, swapped) if own.reason)
        return Judgment(id_, None, None, votes, "; ".join(reasons), (*given.raw, *swapped.raw))
    scores = None
    if given.scores and swapped.scores:
        scores = tuple((one + two) / 2 for one, two in zip(given.scores, swapped.scores, strict=True))
    return Judgment(id_, given.vote if given.vote == swapped.vote else "tie", scores, votes)


def _load_template(path: str | os.PathLike | None, mode: str) -> Any:
    """The question, from the user's file or from the one that comes along."""
    import jinja2
    from jinja2 import meta

    file = _PROMPTS.joinpath(f"judge_{mode}.jinja") if path is None else Path(path)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    try:
        source = file.read_text(encoding="utf-8")
        used = meta.find_undeclared_variables(environment.parse(source))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template {file}: cannot be read ({error}); give the path of a Jinja file") from None
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template {file}, line {error.lineno}: {error.message}; correct it") from None
    if unknown := sorted(used - _VARIABLES):
        raise ValueError(f"template {file}: there is no {unknown[0]!r}; use {', '.join(sorted(_VARIABLES))}")
    if missing := sorted({"first", "second"} - used):
        raise ValueError(
            f"template {file}: {missing[0]!r} is not in it, so the judge would not see that answer; add it"
        )
    return environment.from_string(source)
