"""The steps of the codec (arXiv 2404.05875, section 3): what a model is asked, and what its reply says.

Every prompt is one user turn, as some models' chat templates refuse a system turn; worked examples are inside of it,
so that a user's file replaces them too. Small models hand in the example, or a line of the task, as their own: what
stands word for word in the prompt is no reply. Every `parse` takes `truncated`, whether the token limit cut the reply
off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ...core.generation.replies import Unreadable, without_thoughts
from ...core.judge.replies import expected_score, parse_scores
from .metadata import Metadata
from .reply_lists import read_list
from .reply_rewrite import read_instruction
from .reply_text import count_words, is_refusal, normal
from .step_replies import read_metadata, read_rubrics
from .templates import load_template, sample_values


Messages = list[dict[str, str]]
T = TypeVar("T")

ACTIONS = (
    "Add one condition or requirement that the answer has to meet, such as a limit, a form or a reader to write for.",
    "Ask for more depth: let the instruction go further into its subject, into causes, limits or consequences.",
    "Replace general notions in it by particular ones: name a case, a place, a person, a date or a quantity.",
    "Change it so that the answer takes several steps of reasoning, where it now takes one.",
    "Add input that the answer has to work with: a short table, a piece of code, a formula or a few records of data.",
    "Turn it into a rarer instruction of the same field and about the same length, which fewer people would think of.",
)
"""Rewrites for any instruction, in the manner of Evol-Instruct (arXiv 2304.12244), in place of Self-Rubrics."""

_LONGEST_QUOTE = 2000
_FEWEST_COPIED_WORDS = 5


@dataclass(frozen=True)
class Rubric:
    """A rubric of Self-Rubrics (arXiv 2404.05875, section 3.2).

    Args:
        rubric: An aspect by which to tell how demanding an instruction is.
        action: How to make an instruction more demanding in that aspect, as a sentence.
    """

    rubric: str
    action: str


class _Step:
    """A prompt of a name, from the user's folder if it is there."""

    name: str

    def __init__(self, prompt_folder: str | os.PathLike | None = None):
        self._template = load_template(self.name, prompt_folder)
        self._own_words = f" {normal(self._template.render(**sample_values(self.name)))} "

    def _is_copied(self, text: str) -> bool:
        """Whether a text of some length stands word for word in the prompt, whatever that is filled in with."""
        return count_words(text) >= _FEWEST_COPIED_WORDS and f" {normal(text)} " in self._own_words

    def _own(self, entries: list[T], key: Callable[[T], str] = str) -> list[T]:
        """The entries that are not copied. Raises `Unreadable` if all are."""
        own = [entry for entry in entries if not self._is_copied(key(entry))]
        if not own:
            raise Unreadable("it repeats the question")
        return own

    def _ask(self, **values: object) -> Messages:
        return [{"role": "user", "content": self._template.render(**values).strip()}]


class _MetadataStep(_Step):
    """A step whose reply is metadata.

    Args:
        prompt_folder: The user's prompts.
        max_skills: Most skills of a use case.
    """

    def __init__(self, prompt_folder: str | os.PathLike | None = None, *, max_skills: int = 3):
        super().__init__(prompt_folder)
        self.max_skills = max_skills


class Encode(_MetadataStep):
    """Instruction -> metadata (section 3.1)."""

    name = "encode"

    def messages(self, instruction: str) -> Messages:
        return self._ask(instruction=instruction, max_skills=self.max_skills)

    def parse(self, text: str, *, truncated: bool = False) -> Metadata:
        """The use case and its skills. Raises `Unreadable` if one of them is not there."""
        use_case, skills = read_metadata(text, truncated=truncated)[0]
        return Metadata(use_case, skills[: self.max_skills])


class Propose(_MetadataStep):
    """Description of what is wanted -> several metadata."""

    name = "propose"

    def messages(self, description: str, number: int) -> Messages:
        return self._ask(description=description, number=number, max_skills=self.max_skills)

    def parse(self, text: str, number: int | None = None, *, truncated: bool = False) -> list[Metadata]:
        """At least one metadata, at most `number`. Raises `Unreadable` if there is none."""
        records = read_metadata(text, truncated=truncated, several=True)
        return [Metadata(use_case, skills[: self.max_skills]) for use_case, skills in records][:number]


class Decode(_Step):
    """Metadata -> basic instructions (section 3.1)."""

    name = "decode"

    def messages(self, metadata: Metadata, number: int) -> Messages:
        return self._ask(use_case=metadata.use_case, skills=list(metadata.skills), number=number)

    def parse(self, text: str, number: int | None = None, *, truncated: bool = False) -> list[str]:
        """At least one instruction, at most `number`. Raises `Unreadable` if there is none."""
        return self._own(read_list(text, truncated=truncated, single=number == 1))[:number]


class Rubrics(_Step):
    """Metadata -> rubrics, each with an action (section 3.2)."""

    name = "rubrics"

    def messages(self, metadata: Metadata, number: int) -> Messages:
        return self._ask(use_case=metadata.use_case, skills=list(metadata.skills), number=number)

    def parse(self, text: str, number: int | None = None, *, truncated: bool = False) -> list[Rubric]:
        """At least one rubric, at most `number`. Raises `Unreadable` if there is none that has an action."""
        rubrics = [Rubric(*pair) for pair in read_rubrics(text, truncated=truncated)]
        return self._own(rubrics, key=lambda rubric: rubric.action)[:number]


class Rewrite(_Step):
    """Instruction and action -> a more demanding instruction (section 3.2)."""

    name = "rewrite"

    def messages(self, metadata: Metadata, instruction: str, action: str) -> Messages:
        return self._ask(
            use_case=metadata.use_case, skills=list(metadata.skills), instruction=instruction, action=action
        )

    def parse(self, text: str, instruction: str, action: str = "", *, truncated: bool = False) -> str:
        """The new instruction.

        Raises:
            Unreadable: There is none: the old one unchanged, the action, an answer, a refusal, or only its beginning.
        """
        return read_instruction(text, instruction, action, truncated=truncated)


class Evol(_Step):
    """Instruction and action -> a more demanding instruction, whatever its metadata."""

    name = "evol"
    ACTIONS = ACTIONS

    def messages(self, instruction: str, action: str) -> Messages:
        return self._ask(instruction=instruction, action=action)

    def parse(self, text: str, instruction: str, action: str = "", *, truncated: bool = False) -> str:
        """As `Rewrite.parse`."""
        return read_instruction(text, instruction, action, truncated=truncated)


class Answer(_Step):
    """Instruction -> answer."""

    name = "answer"

    def messages(self, instruction: str) -> Messages:
        return self._ask(instruction=instruction)

    def parse(self, text: str, *, truncated: bool = False) -> str:
        """The answer without thoughts, also one that was cut off. Raises `Unreadable` if it is empty or refuses."""
        answer = without_thoughts(text).strip()
        if not answer:
            raise Unreadable("cut off before the answer" if truncated else "the answer is empty")
        if is_refusal(answer):
            raise Unreadable("a refusal and nothing else")
        return answer


class Score(_Step):
    """Instruction and two answers -> two scores from 1 to 10, in one line (section 3.3)."""

    name = "score"

    def messages(self, instruction: str, first: str, second: str) -> Messages:
        return self._ask(instruction=instruction, first=first, second=second)

    def parse(self, text: str, *, truncated: bool = False) -> tuple[float, float]:
        """The scores of the first and the second answer. Raises `Unreadable`, see `core.judge_replies`."""
        return parse_scores(text, truncated=truncated)


class ScoreOne(_Step):
    """Instruction, two answers and one of them -> its expected score from 1 to 10, from probabilities of digits."""

    name = "score_one"

    def messages(self, instruction: str, first: str, second: str, which: Literal["first", "second"]) -> Messages:
        return self._ask(instruction=instruction, first=first, second=second, which=which)

    def parse(self, logprobs: Sequence[float]) -> tuple[float, float]:
        """The score, and the probability of the digits together; from the log-probability of each, in nats."""
        return expected_score(logprobs)


def again(
    messages: Messages, reply: str, reason: Unreadable | str, prompt_folder: str | os.PathLike | None = None
) -> Messages:
    """The same question once more, after a reply that could not be read.

    Args:
        messages: What was asked; left as it is.
        reply: What came back. It is quoted without thoughts, and only its beginning if it is long.
        reason: What was wrong with it, without a full stop.
        prompt_folder: The user's prompts.
    """
    note = load_template("again", prompt_folder).render(reason=str(reason).rstrip("."))
    quoted = without_thoughts(reply).strip()
    if len(quoted) > _LONGEST_QUOTE:
        quoted = quoted[:_LONGEST_QUOTE] + " ..."
    if not quoted:  # chat templates refuse an empty turn, and two of the user in a row
        last = messages[-1]
        return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{note}"}]
    return [*messages, {"role": "assistant", "content": quoted}, {"role": "user", "content": note}]
