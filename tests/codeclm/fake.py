"""Models that answer every prompt of the codec by rule: the same question and seed, the same reply, in any process.

What is asked is recognised by the prompts that come along, whatever their wording. An instruction says itself what
becomes of it:

- "grade 2": strong and target differ (9 and 3 points instead of 6 and 5) once it was rewritten twice or more;
- "upside down": it is the target that is better;
- "flattery": the scorer says that both are great, however often it is asked;
- "wavering": it says so once, and writes numbers when asked again.

The scorer likes the first answer better by a point, so that only the mean over both orders is right.
"""

import hashlib
import json
import math
import random
import re
from dataclasses import dataclass

from trl_extensions.codeclm.pipeline.steps import PromptTemplate
from trl_extensions.core.generation.types import Generation, sum_by_option


USES = ("trip planning", "poem writing", "bug fixing", "recipe ideas")
SKILLS = ("patience", "geography", "rhyme", "logic", "cooking", "arithmetic")
_MANY = 987654321
_NAMES = ("instruction", "use_case", "skills", "action", "first", "second")


@dataclass(frozen=True)
class Answered:
    """A reply of a model, its length in words, and the likeliest first tokens with their log-probabilities."""

    text: str
    finish_reason: str
    read: int
    written: int
    top: tuple[tuple[str, float], ...]


class Rules:
    """What all models answer.

    Args:
        basics: By use case: the basic instructions that are decoded from it; made up of random words if left out.
    """

    def __init__(self, basics: dict[str, list[str]] | None = None):
        self.basics = basics
        self._patterns = [(step, pattern) for step in _STEPS for pattern in _patterns_of(step)]

    def answer(self, model: str, messages: list[dict[str, str]], seed: int | None, max_tokens: int) -> Answered:
        """The reply of a model whose name has "strong" in it, of any other, or of "either", as the seed has it."""
        step, fields = self._recognise(messages[0]["content"])
        fields |= {"model": model, "seed": seed, "again": len(messages) > 1 or bool(fields.get("note"))}
        read = sum(len(message["content"].split()) for message in messages)
        if step == "score_one":
            return Answered("", "length", read, 1, _digits(**fields))
        words = getattr(self, step)(**fields).split(" ")
        cut = len(words) > max_tokens
        text = " ".join(words[:max_tokens])
        return Answered(text, "length" if cut else "stop", read, min(len(words), max_tokens), ())

    def may_be_asked_again(self, model: str, messages: list[dict[str, str]]) -> bool:
        """Whether this is the first time, and the answer is the same under the seed of the second."""
        if len(messages) > 1 or self._recognise(messages[0]["content"])[1].get("note"):
            return False
        one, two = (self.answer(model, messages, seed, 999) for seed in (1, 2))
        return one == two and bool(one.text)

    def _recognise(self, prompt: str) -> tuple[str, dict]:
        for (step, fixed), pattern in self._patterns:
            if match := pattern.fullmatch(prompt):
                return step, match.groupdict() | fixed
        return "respond", {"instruction": prompt}

    def encode(self, instruction, **_):
        draw = random.Random(instruction)
        return json.dumps({"use_case": draw.choice(USES), "skills": draw.sample(SKILLS, 2)})

    def decode(self, use_case, skills, seed, number=1, **_):
        if self.basics is not None:
            own = self.basics[use_case][: int(number)]
        else:
            draw = random.Random(f"{use_case}/{skills}/{seed}")
            own = [_made_up(draw) for _ in range(int(number))]
        return json.dumps({"instructions": own})

    def rubrics(self, use_case, skills, number=1, **_):
        draw = random.Random(f"{use_case}/{skills}")
        return json.dumps({"rubrics": [
            {"rubric": f"Depth of {_word(draw)}", "action": f"Ask for more about {_word(draw)} and {_word(draw)}."}
            for _ in range(int(number))
        ]})  # fmt: skip

    def rewrite(self, instruction, action, **_):
        word = _word(random.Random(instruction + action))
        return json.dumps({"new_instruction": f"{instruction} Also mention {word}."})

    evol = rewrite

    def respond(self, model, instruction, seed, **_):
        strong, target = 6, 5
        grade = re.search(r"grade (\d)", instruction)
        if grade and instruction.count("Also mention") >= int(grade[1]):
            strong, target = (3, 9) if "upside down" in instruction else (9, 3)
        quality = strong if "strong" in model or ("either" in model and seed % 2) else target
        return f"{model} answers with quality {quality} under seed {seed}: {instruction}"

    def score(self, instruction, first, second, again, **_):
        if "flattery" in instruction or ("wavering" in instruction and not again):
            return "Both are great."
        return json.dumps({"score_1": _quality(first) + 1, "score_2": _quality(second)})


class FakeEngine:
    """The rules in this process, behind the protocol of `core.generation`; results come in any order."""

    def __init__(self, rules: Rules, model: str):
        self.rules, self.model, self.name = rules, model, f"endpoint:{model}"
        self.calls = 0

    def generate(self, prompts, params, seeds=None):
        for place in random.sample(range(len(prompts)), len(prompts)):
            self.calls += 1
            own = self.rules.answer(self.model, prompts[place], seeds[place], params.max_new_tokens)
            yield place, Generation(own.text, own.finish_reason, own.written, own.read)

    def option_logprobs(self, prompts, options):
        for place, prompt in enumerate(prompts):
            self.calls += 1
            own = self.rules.answer(self.model, prompt, None, 1)
            yield place, Generation("", "length", own.written, own.read), sum_by_option(own.top, options)


def _digits(instruction, first, second, which, **_):
    """Half of the probability on the digit of the quality, and 0.3 on the same behind a space: 0 stands for 1."""
    if "flattery" in instruction:
        return ("Both", math.log(0.9)), ("7", math.log(0.001))
    digit = str(_quality(first if which == "first" else second) - 1)
    return (digit, math.log(0.5)), (" " + digit, math.log(0.3)), ("Well", math.log(0.2))


def _quality(answer):
    return int(re.search(r"quality (\d+)", answer)[1])


def _word(draw):
    return "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(3))


def _made_up(draw):
    marks = (f"at grade {draw.choice('001122345')}",)
    marks += ("upside down",) * (draw.random() < 0.15)
    marks += draw.choice([(), (), (), (), (), (), (), (), (), (), (), (), ("with flattery",), ("when wavering",)])
    return f"Describe {' '.join(_word(draw) for _ in range(8))} {' '.join(marks)}."


# "decode" asks for one instruction in other words than for several
_STEPS = [
    (name, {**own})
    for name in ("encode", "decode", "rubrics", "rewrite", "evol", "score", "score_one")
    for own in ([{"which": "first"}, {"which": "second"}] if name == "score_one" else [{}])
]


def _patterns_of(step):
    name, fixed = step
    template = PromptTemplate(name)
    for number in (1, _MANY):
        values = {own: f"@@{own}@@" for own in _NAMES} | {"skills": ["@@skills@@"], "number": number, "max_skills": 3}
        pattern = re.escape(template.render(**values, **fixed))
        for own in _NAMES:
            pattern = pattern.replace(f"@@{own}@@", f"(?P<{own}>.*)", 1).replace(f"@@{own}@@", ".*")
        pattern = pattern.replace(str(_MANY), r"(?P<number>\d+)", 1).replace(str(_MANY), r"\d+")
        yield re.compile(pattern + r"(?P<note>\n\n.*)?", re.DOTALL)


def digest(text: str) -> str:
    """A short stand-in for a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
