"""The steps of the codec (arXiv 2404.05875, section 3): what a model is asked, what its reply says, and who asks.

A prompt is a Jinja file, one user turn, as some models' chat templates refuse a system turn; worked examples are in
it, so that a user's file replaces them too. A reply that a program reads is JSON of a schema. Small models hand in the
example, or a line of the task, as their own: what stands word for word in the prompt is no reply.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field

from ...core.generation.ask import ask_again, ask_client, load_template
from ...core.generation.client import CallFailed, LLMClient, Response
from ...core.generation.replies import Unreadable, answer_text, read_reply
from ...core.generation.types import GenerationParams, Prompt, request_seed
from ...core.judge.pairwise import LEAST_MASS, Scores, read_scores
from ..config import CodecLMConfig, base_language
from .filters import count_words, plain_words
from .metadata import Metadata, one_line


Messages = list[dict[str, str]]
T = TypeVar("T")

MAX_USE_CASE_WORDS, MAX_SKILL_WORDS = 25, 6
MAX_RUBRIC = 500  # characters
# Rewrites for any instruction, in the manner of Evol-Instruct (arXiv 2304.12244), in place of Self-Rubrics
ACTIONS = (
    "Add one condition or requirement that the answer has to meet, such as a limit, a form or a reader to write for.",
    "Ask for more depth: let the instruction go further into its subject, into causes, limits or consequences.",
    "Replace general notions in it by particular ones: name a case, a place, a person, a date or a quantity.",
    "Change it so that the answer takes several steps of reasoning, where it now takes one.",
    "Add input that the answer has to work with: a short table, a piece of code, a formula or a few records of data.",
    "Turn it into a rarer instruction of the same field and about the same length, which fewer people would think of.",
)
SCALE = tuple("0123456789")  # one of these digits stands for a score: 0 for 1, up to 9 for 10

_FEWEST_COPIED_WORDS = 5
_PLACEHOLDERS = ("", "none", "n a", "nil", "なし", "无", "無")


# The forms of replies. Their bounds are for engines that are held to a schema: small models write on without an end,
# and what was cut there is too long for the steps. Instructions have none: a grammar of thousands of places is slow


def _at_most(number: int, what: str = "maxItems") -> Any:
    return Field(json_schema_extra={what: number})


class MetadataReply(BaseModel):
    use_case: str = _at_most(300, "maxLength")
    skills: list[Annotated[str, _at_most(100, "maxLength")]] = _at_most(20)

    def read(self, max_skills: int) -> Metadata:
        """The use case and the first distinct skills. Raises `Unreadable` where a name is missing or too long."""
        use_case = one_line(self.use_case).rstrip(".。")
        if _normal(use_case) in _PLACEHOLDERS or _length(use_case) > MAX_USE_CASE_WORDS:
            raise Unreadable(f"there is no use case of at most {MAX_USE_CASE_WORDS} words")
        skills: dict[str, str] = {}
        for skill in map(one_line, self.skills):
            if _normal(skill) not in _PLACEHOLDERS and _length(skill) <= MAX_SKILL_WORDS:
                skills.setdefault(_normal(skill), skill)
        if not skills:
            raise Unreadable(f"there is no skill of at most {MAX_SKILL_WORDS} words")
        return Metadata(use_case, tuple(skills.values())[:max_skills])


class ProposedReply(BaseModel):
    metadata: list[MetadataReply] = _at_most(50)


class InstructionsReply(BaseModel):
    instructions: list[str] = _at_most(100)


class Rubric(BaseModel):
    rubric: str = _at_most(MAX_RUBRIC, "maxLength")
    action: str = _at_most(MAX_RUBRIC, "maxLength")


class RubricsReply(BaseModel):
    rubrics: list[Rubric] = _at_most(50)


class RewriteReply(BaseModel):
    new_instruction: str


class Step:
    """A prompt of a name, from the user's folder if it is there, and how its reply is read: `schema` and `form` are
    what it is, as a model and as an example (None: any text), `limit` and `temperature` the settings for it."""

    name: str
    schema: type[BaseModel] | None = None
    form: str | None = None
    limit, temperature = "max_new_tokens", "temperature"
    is_text = False  # whether what is read is a text, which has a language

    def __init__(self, prompt_folder: str | os.PathLike | None = None):
        self._template = PromptTemplate(self.name, prompt_folder)
        self._own_words = f" {_normal(self._template.sample)} "

    def messages(self, **values: Any) -> Messages:
        """What is asked: `_VARIABLES` says with which values."""
        return [{"role": "user", "content": self._template.render(**values).strip()}]

    def parse(self, text: str, *, truncated: bool = False, **values: Any) -> Any:
        """What the reply to `messages(**values)` says. Raises `Unreadable` if it says nothing of use."""
        raise NotImplementedError

    def _own(self, text: str) -> str:
        """A text on one line or several; empty where it is a placeholder, or stands word for word in the prompt."""
        plain = _normal(text)
        copied = _length(text) >= _FEWEST_COPIED_WORDS and f" {plain} " in self._own_words
        return "" if copied or not any(map(str.isalnum, plain)) else text.strip()


class Encode(Step):
    """Instruction -> metadata (section 3.1)."""

    name, schema, form = "encode", MetadataReply, '{"use_case": "...", "skills": ["...", "..."]}'

    def parse(self, text, *, truncated=False, max_skills=3, **_) -> Metadata:
        return read_reply(text, MetadataReply, truncated=truncated).read(max_skills)


class Propose(Step):
    """Description of what is wanted -> several metadata, at most `number`."""

    name, schema, form = "propose", ProposedReply, '{"metadata": [{"use_case": "...", "skills": ["...", "..."]}, ...]}'

    def parse(self, text, *, truncated=False, number=None, max_skills=3, **_) -> list[Metadata]:
        found, reason = list[Metadata](), Unreadable("there are no use cases")
        for entry in read_reply(text, ProposedReply, truncated=truncated).metadata:
            try:
                found.append(entry.read(max_skills))
            except Unreadable as error:
                reason = error
        if not found:
            raise reason
        return found[:number]


class Decode(Step):
    """Metadata -> basic instructions (section 3.1), at most `number`."""

    name, schema, form = "decode", InstructionsReply, '{"instructions": ["...", "..."]}'

    def parse(self, text, *, truncated=False, number=None, **_) -> list[str]:
        found = read_reply(text, InstructionsReply, truncated=truncated).instructions
        own = [instruction for instruction in map(self._own, found) if instruction]
        if not own:
            raise Unreadable("it repeats the question" if found else "there are no instructions")
        return own[:number]


class Rubrics(Step):
    """Metadata -> rubrics, each with an action (section 3.2), at most `number`."""

    name, schema, form = "rubrics", RubricsReply, '{"rubrics": [{"rubric": "...", "action": "..."}, ...]}'

    def parse(self, text, *, truncated=False, number=None, **_) -> list[Rubric]:
        own: dict[str, Rubric] = {}
        for entry in read_reply(text, RubricsReply, truncated=truncated).rubrics:
            rubric, action = self._own(entry.rubric), self._own(entry.action)
            too_long = max(len(rubric), len(action)) >= MAX_RUBRIC
            if rubric and action and not too_long and _normal(rubric) != _normal(action):
                own.setdefault(_normal(action), Rubric(rubric=rubric, action=action))
        if not own:
            raise Unreadable("there is no rubric with an action of its own")
        return list(own.values())[:number]


class Rewrite(Step):
    """Instruction and action -> a more demanding instruction (section 3.2)."""

    name, schema, form = "rewrite", RewriteReply, '{"new_instruction": "..."}'
    is_text = True

    def parse(self, text, *, truncated=False, instruction="", action="", **_) -> str:
        if truncated:
            raise Unreadable("cut off by the token limit")
        new = _LABEL.sub("", read_reply(text, RewriteReply).new_instruction).strip()
        words, before = _length(new), _length(instruction)
        for wrong, reason in (
            (not self._own(new), "there is no new instruction"),
            (_normal(new) == _normal(instruction), "unchanged"),
            (_normal(new) == _normal(action), "the change was repeated instead of made"),
            (is_refusal(new), "a refusal and nothing else"),
            (_ABOUT.search(new) and not _ABOUT.search(instruction), "it talks about the old instruction"),
            (_ANSWER.match(new) and not _ANSWER.match(instruction), "it looks like an answer, not an instruction"),
            (words > 3 * before + 250, f"{words} words are too many for an instruction made of {before}"),
        ):
            if wrong:
                raise Unreadable(reason)
        return new


class Evol(Rewrite):
    """As `Rewrite`, by one of `ACTIONS`, whatever the metadata."""

    name = "evol"


class Answer(Step):
    """Instruction -> answer: any text without thoughts, also one that was cut off, but no bare refusal."""

    name = "answer"
    limit, temperature, is_text = "max_answer_tokens", "answer_temperature", True

    def parse(self, text, *, truncated=False, **_) -> str:
        answer = answer_text(text)
        if is_refusal(answer):
            raise Unreadable("a refusal and nothing else")
        return answer


class Score(Step):
    """Instruction and two answers -> a score from 1 to 10 for each (section 3.3)."""

    name, schema, form = "score", Scores, '{"score_1": 3, "score_2": 6}'
    limit, temperature = "max_score_tokens", "score_temperature"

    def parse(self, text, *, truncated=False, **_) -> tuple[float, float]:
        return read_scores(text, truncated=truncated)


class ScoreOne(Step):
    """Instruction, two answers and one of them -> its expected score from 1 to 10, from probabilities of digits."""

    name = "score_one"

    def expected(self, logprobs: Sequence[float]) -> float:
        """1 + the expected digit under the log-probability of each, in nats; `Unreadable` below `LEAST_MASS`."""
        weights = [math.exp(value) for value in logprobs]
        if sum(weights) < LEAST_MASS:
            raise Unreadable(f"the digits have less than {LEAST_MASS:.0%} of the probability")
        return 1 + sum(digit * weight for digit, weight in enumerate(weights)) / sum(weights)


def again(messages: Prompt, reply: str, reason: str, *, step: Step, folder: str | None = None) -> Prompt:
    """The same question once more, after a reply that could not be read, in the words of `again.jinja`."""
    note = PromptTemplate("again", folder).render(reason=reason.rstrip("."), form=step.form)
    return ask_again(messages, reply, reason, note)


def _normal(text: str) -> str:
    return " ".join(plain_words(text))


def _length(text: str) -> int:
    return count_words(plain_words(text))


class Rejected(Exception):  # noqa: N818 (it is a row that is)
    """What was asked twice in vain: the step, why its replies cannot be read or the call failed, and the replies as
    they came. `retryable`: the server failed rather than the reply, and another run may be luckier."""

    def __init__(self, step: str, reason: str, raw: list[str], *, retryable: bool = False):
        super().__init__(f"{step}: {reason}")
        self.step, self.reason, self.raw, self.retryable = step, reason, raw, retryable


@dataclass(frozen=True)
class StepClient:
    """Asks the engines of a run; `heard` is called with every response that has come, and `foreign` says of a text
    which language it is in, if it should not be."""

    client: LLMClient
    config: CodecLMConfig
    seed: int
    heard: Callable[[Response], None] = lambda response: None
    foreign: Callable[[str], str | None] = lambda text: None

    @cached_property
    def reader(self) -> dict[str, str | None]:
        """What every prompt may say of those that instructions come from: the language by its name, the audience."""
        code = language = self.config.language
        if code:
            from ..._compat import LANGUAGES

            base = base_language(code)
            language = LANGUAGES[base].title() if base in LANGUAGES else f"the language of the ISO 639 code {base}"
            language += f" ({code})" * (code.lower() != base)
        return {"language": language, "audience": self.config.audience}

    async def generate(self, step: Step, about: str, *, role: str = "strong", **values: Any) -> tuple[Any, bool]:
        """What the engine of a role says of `values`, and whether the token limit cut it off.

        `about` is an id: another one is another sample. Raises `Rejected` where neither of two replies can be read or
        the call failed, and what `LLMClient.call` raises for all calls.
        """
        config, responses = self.config, list[Response]()
        # A seed also where nothing is drawn: two servers may serve different models under one name
        seed = request_seed(self.seed, f"{about}/{step.name}")
        limit, temperature = getattr(config, step.limit), getattr(config, step.temperature)
        params = GenerationParams(limit, temperature, config.top_p, seed=seed)

        def answered(response: Response) -> None:
            responses.append(response)
            self.heard(response)

        def read(text: str, *, truncated: bool = False) -> Any:
            value = step.parse(text, truncated=truncated, **values)
            # A target that slips into another language is what pairs are made of: its answers are scored as they are
            checked = step.is_text and config.language and role != "target"
            if checked and (found := self.foreign(value)):
                raise Unreadable(f"it is in the language {found}, not in {config.language}")
            return value

        try:
            answer = await ask_client(
                self.client, role, step.messages(**values, **self.reader), params, step.schema, step=step.name,
                finished=answered, read=read, again=partial(again, step=step, folder=config.prompt_folder),
            )  # fmt: skip
        except CallFailed as error:
            raw = [own.text for own in responses]
            raise Rejected(step.name, str(error), raw, retryable=error.retryable) from None
        reason, finished = answer.reason, responses[-1].finish_reason
        if finished not in ("stop", "length"):  # a filter, or a failure behind the server: half an answer at best
            reason = f"the server ended it: {finished}"
        elif reason and finished == "length":
            reason += f"; `{step.limit}` is {limit}"
        if reason:
            raise Rejected(step.name, reason, list(answer.raw))
        return answer.value, finished == "length"

    async def score(self, step: ScoreOne, **values: Any) -> float:
        """The score by the scorer's probabilities of the ten digits. Raises as `generate`, without asking again."""
        try:
            question, params = step.messages(**values, **self.reader), GenerationParams(1)
            response = await self.client.call("scorer", step.name, question, params, SCALE)
            self.heard(response)
            return step.expected(response.logprobs or ())
        except (CallFailed, Unreadable) as error:
            raise Rejected(step.name, str(error), [], retryable=getattr(error, "retryable", False)) from None


async def gather(jobs: Iterable[Callable[[], Awaitable[T]]], at_once: int = 1024) -> list[T]:
    """Results in order, a bounded number of jobs at once; the first error ends them all, and is raised by itself."""
    waiting = enumerate(jobs)
    results: dict[int, Any] = {}

    async def work() -> None:
        for place, job in waiting:
            results[place] = await job()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[place] for place in range(len(results))]


# What a rewritten instruction is not
_LABEL = re.compile(
    r"(?i)\A[\s#*_]*(?:(?:the\s+)?(?:new|rewritten)\s+(?:instruction|prompt)|新しい(?:指示文?|プロンプト))[\s#*_]*[:：][\s*_]*"
)
_ABOUT = re.compile(
    r"(?i)\b(?:the|this) (?:old|new|original|given|rewritten|previous) (?:instruction|prompt)\b|(?:元|上記|以前)の指示"
)
_ANSWER = re.compile(
    r"(?i)```|def \w+\(|#include|the (?:correct )?answer (?:is|to)|as an ai\b|(?:yes|no)[,.]\s|once upon a time|"
    r"certainly|sure[,!]|of course|step 1\b|here(?:['’]s| is| are)\b|"
    r"(?:はい|いいえ|もちろん)[、。！]|承知(?:しま|いたしま)した"
)

# A refusal begins with one of these, says one of those, and is short
_SORRY = re.compile(
    r"(?:(?:i['’]?m|i am|we are|we['’]re)(?: \w+)? sorry|sorry|i (?:do )?apologi[sz]e|my apologies|unfortunately|as "
    r"an ai\b|as a (?:large )?language model|i (?:can['’]?t|cannot|can not|won['’]?t|will not|must decline|do not "
    r"feel|don['’]t feel)|i['’]?m (?:unable|not able|not comfortable|just an ai|an ai)|i am (?:unable|not able|not "
    r"comfortable|an ai)|es tut mir leid|tut mir leid|ich kann (?:dir |ihnen )?(?:dabei |das |nicht)|je suis "
    r"désolée?|désolée?|je ne (?:peux|suis)|lo siento|no puedo|mi dispiace|non posso|desculpe|sinto muito|não posso|"
    r"не могу|к сожалению|извините|很抱歉|抱歉|对不起|我无法|我不能|(?:大変|誠に)?(?:申し訳|恐れ入り)|죄송)",
    re.IGNORECASE,
)
_UNABLE = re.compile(
    r"can['’]?t|cannot|can not|unable|not able|won['’]?t|will not|not comfortable|decline|against my|don['’]t have|"
    r"do not have|kann|nicht|ne peux|ne suis|no puedo|non posso|não posso|не могу|无法|不能|できません|できかねます|"
    r"없습니다|an ai\b|language model",
    re.IGNORECASE,
)
_MOST_REFUSING_WORDS = 60


def is_refusal(text: str) -> bool:
    """Whether a reply says that it will not do it, and nothing else."""
    plain = one_line(text).strip(" *_\"'“”")
    refuses = _SORRY.match(plain) and _UNABLE.search(plain)
    return bool(refuses) and _length(plain) <= _MOST_REFUSING_WORDS and "```" not in text


# Prompts: Jinja files that come along, each of which a file of the user's can take the place of
PROMPTS = Path(__file__).parent.with_name("prompts")

# What a prompt is about (a file that leaves one of these out would ask the same whatever it is given), and what else
# it may use
_VARIABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "encode": (("instruction",), ("max_skills",)),
    "decode": (("use_case", "skills"), ("number",)),
    "rubrics": (("use_case", "skills"), ("number",)),
    "rewrite": (("instruction", "action"), ("use_case", "skills")),
    "evol": (("instruction", "action"), ()),
    "answer": (("instruction",), ()),
    "score": (("instruction", "first", "second"), ()),
    "score_one": (("instruction", "first", "second", "which"), ()),
    "propose": (("description",), ("number", "max_skills")),
    "again": ((), ("reason", "form")),
}
_READER = ("language", "audience")  # what every prompt may use; None where it is not set
_SAMPLES: dict[str, Any] = {"skills": ["reading", "writing"], "number": 2, "max_skills": 3, "which": "first"}


class PromptTemplate:
    """The prompt of a step, `<name>.jinja`, from a folder of the user if it is there: it may include the others.

    Raises a `ValueError` if the file cannot be read or filled in, has a variable that this step does not, or leaves
    out one it needs; or if the folder holds a prompt of which there is no step. `unused` are those of `language` and
    `audience` that it says nothing of.
    """

    def __init__(self, name: str, folder: str | os.PathLike | None = None):
        folders = [PROMPTS] if folder is None else [Path(folder), PROMPTS]
        for path in sorted(folders[0].glob("*.jinja")):
            if path.stem not in _VARIABLES:
                raise ValueError(f"{path} is no prompt's name; rename it to one of {', '.join(_VARIABLES)}")
        self.path = next(place for own in folders if (place := own / f"{name}.jinja").is_file())
        needed, optional = _VARIABLES[name]
        variables = (*needed, *optional, *_READER)
        self._fill = load_template(self.path, variables, folders=folders, trim_blocks=True, lstrip_blocks=True)
        # What is wrong with it shows now and not after the first thousand calls
        values = {key: _SAMPLES.get(key, f"({key})") for key in variables}
        self.sample = self.render(**values)
        self.unused = [key for key in _READER if self.render(**{**values, key: None}) == self.sample]
        for key in needed:
            # Used in whatever way: joined, shortened or compared, another value must give another prompt.
            other = {"skills": ["counting"], "which": "second"}.get(key, "[another]")
            if self.render(**{**values, key: other}) == self.sample:
                raise ValueError(f"{self.path} does not depend on {key!r}; write {{{{ {key} }}}} where it belongs")

    def render(self, **values: Any) -> str:
        """The prompt with its values; braces inside these are left alone."""
        return self._fill(dict.fromkeys(_READER) | values)
