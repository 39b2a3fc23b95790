"""What a judge of two answers replies: two scores, a verdict, or the probabilities of the digits."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from ..generation.replies import Unreadable, without_fences, without_thoughts


Verdict = Literal["A", "B", "tie"]

SCALE = tuple("0123456789")
"""The digits of which one stands for a score: 0 for 1, up to 9 for 10."""

LEAST_MASS = 0.01
"""Least probability of all options together: small models seldom write one and yet rank by it; below this is noise."""

_MARKS = r"[\s*_`\"'“”‘’()\[\]{}|#>~-]*"
_NUMBER = r"\d+(?:\.\d+)?"
_OUT_OF = r"(?:\s*(?:/|out\s+of)\s*10(?:\.0+)?(?![\d.]))?"
_NAME = r"(?:assistant|answer|response|reply|model|score|rating|ai|antwort|réponse|respuesta|resposta|risposta)"
_LABELLED = re.compile(
    rf"(?<!\w){_NAME}[\s_#*-]*(?P<label>[12]|[AB](?![a-z]))['’]?s?{_MARKS}"
    rf"(?:(?:score|rating|is|gets|receives|deserves)\b{_MARKS}){{0,3}}[:=–—]?{_MARKS}"
    rf"(?P<number>(?<![\d.]){_NUMBER}){_OUT_OF}(?![\w%]|\.\d|\s*/|\s*out\s+of)",
    re.IGNORECASE,
)
_BETWEEN = rf"(?:[\s*_`]*(?:,|;|\||&|\band\b|\bund\b|\bet\b|\by\b|\bvs\b\.?|\s[-–—]\s){_MARKS}|[\s*_`]+)"
_PAIR = re.compile(
    rf"{_MARKS}(?:[^\d\n]{{0,40}}\b(?:scores?|ratings?)\b[^\d\n]{{0,20}}?)?{_MARKS}"
    rf"(?P<first>{_NUMBER}){_OUT_OF}{_BETWEEN}(?P<second>{_NUMBER}){_OUT_OF}{_MARKS}\.?{_MARKS}",
    re.IGNORECASE,
)

_ANSWER = r"(?:(?:the\s+)?(?:answer|response|assistant|option)\s*)?"
_EQUAL = (
    r"(?:a\s+|it['’]?s\s+a\s+|it\s+is\s+a\s+)?(?:tie|draw)|tied|equal(?:ly\s+\w+)?|neither|"
    r"(?:they|both)(?:\s+(?:answers?|responses?))?\s+(?:are\s+)?(?:about\s+)?(?:the\s+same|equal\w*|tied)[^.\n]*|"
    r"(?:answers?\s+)?A\s+and\s+(?:answer\s+)?B\s+are\s+(?:about\s+)?(?:the\s+same|equal\w*|tied)[^.\n]*|\[\[C\]\]"
)
_VERDICT = re.compile(
    rf"{_MARKS}(?P<named>(?:my\s+|the\s+)?(?:final\s+)?(?:verdict|winner|answer|choice|decision|judge?ment|"
    rf"(?:better|best)(?:\s+(?:one|answer|response|assistant))?)\s*(?:is|[:=]){_MARKS})?"
    rf"(?:{_ANSWER}{_MARKS}(?P<side>[AB])|(?P<equal>{_EQUAL})){_MARKS}"
    rf"(?P<rest>(?:[.:,;!–—]|wins\b|because\b|since\b|as\b|is\s+(?:\w+ly\s+|much\s+|the\s+|a\s+bit\s+)*"
    rf"(?:better|best|more|stronger|superior|preferable|preferred|(?:clear\s+)?winner)\b).*)?",
    re.IGNORECASE,
)
# "Assistant 1:\n1. It is clear": the number of an entry of a list, no score
_LIST_NUMBER = re.compile(r"[.)][ \t]*[^\W\d]")
_RUN = re.compile(r"([^\w\n])\1{3,}")
_BRACKETED = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)


def parse_scores(text: str, *, truncated: bool = False) -> tuple[float, float]:
    """Read two scores from 1 to 10, for the first answer and for the second.

    Strict, since a number somewhere in a text may mean anything. Understood are two numbers labelled with the answers
    they are for (`Assistant 1: 8`, `"answer_b": 7`, in any order), or else a line of nothing but two numbers (`8 7`,
    `8/10, 7/10`, `Scores: **8** and **7**`): the first line, or the only such line.

    Args:
        text: The reply; thoughts inside `<think>` are not read.
        truncated: The token limit cut it off, so that a number at its end may be half of one.

    Raises:
        Unreadable: There are no two such numbers, there are several, or one is outside of 1 to 10.
    """
    plain = _plain(text)
    if truncated:
        plain = re.sub(r"[\d.]+\Z", "", plain)
    first, second = _labelled_scores(plain) or _pair_of_lines(plain)
    for score in (first, second):
        if not 1 <= score <= 10:
            raise Unreadable(f"{score:g} is not within 1 to 10")
    return first, second


def _labelled_scores(text: str) -> tuple[float, float] | None:
    found: dict[str, set[float]] = {"1": set(), "2": set()}
    for match in _LABELLED.finditer(text):
        if _LIST_NUMBER.match(text, match.end()) and "\n" in text[match.start() : match.start("number")]:
            continue
        found[{"A": "1", "B": "2"}.get(match["label"].upper(), match["label"])].add(float(match["number"]))
    if not (found["1"] and found["2"]):
        return None
    if any(len(scores) > 1 for scores in found.values()):
        raise Unreadable("several scores for one answer")
    return found["1"].pop(), found["2"].pop()


def _pair_of_lines(text: str) -> tuple[float, float]:
    lines = [line for line in text.splitlines() if line.strip()]
    for head in (lines[:1], lines[:2]):
        if match := _PAIR.fullmatch(_points(" ".join(head))):
            return float(match["first"]), float(match["second"])
    pairs = {(match["first"], match["second"]) for line in lines if (match := _PAIR.fullmatch(_points(line)))}
    if len(pairs) != 1:
        raise Unreadable("several pairs of scores" if pairs else "there are no two scores")
    [(first, second)] = pairs
    return float(first), float(second)


def _points(line: str) -> str:
    """Decimal commas as points, where both numbers have one: `8,5 7,5`, but not `8,7`."""
    numbers = re.findall(r"(?<![\d,.])\d{1,2},\d(?![\d,])", line)
    return re.sub(r"(\d),(\d)", r"\1.\2", line) if len(numbers) == 2 else line


def parse_verdict(text: str) -> Verdict:
    """Read which of two answers is better.

    Understood are `[[A]]`, and a line of a letter or "tie" alone, in any emphasis, behind "Winner:" or "Answer" or
    before a reason. Where there are several, `[[A]]` counts first, then a line without a reason or with "Winner:",
    then others: `A: ...` may just be the name of an answer that is talked about.

    Args:
        text: The reply; thoughts inside `<think>` are not read.

    Raises:
        Unreadable: There is no verdict, or there are different ones.
    """
    plain = _plain(text)
    found = [match for line in plain.splitlines() if (match := _VERDICT.fullmatch(line.strip()))]
    clear = [match for match in found if match["named"] or len(match["rest"] or "") <= 1]
    verdicts = {_side(match[1]) for match in _BRACKETED.finditer(plain)}
    verdicts = verdicts or {_side(match["side"]) for match in clear or found}
    if len(verdicts) != 1:
        raise Unreadable("different verdicts" if verdicts else "there is no verdict")
    return verdicts.pop()


def _side(word: str | None) -> Verdict:
    return {"A": "A", "B": "B"}.get((word or "").upper(), "tie")


def expected_score(logprobs: Sequence[float]) -> tuple[float, float]:
    """The expected score under a model's probabilities of the digits, for models that cannot write one.

    Args:
        logprobs: The log-probability of each digit of `SCALE`, in nats; minus infinity where there is none.

    Returns:
        1 + the expected digit, in [1, 10], the digits' probabilities scaled to a sum of 1; and that sum before.

    Raises:
        Unreadable: The digits have less than `LEAST_MASS` together.
        ValueError: There are not ten numbers, or one is none.
    """
    if len(logprobs) != len(SCALE) or any(math.isnan(value) for value in logprobs):
        raise ValueError(f"expected ten log-probabilities, of the digits 0 to 9, got {list(logprobs)}")
    weights = [math.exp(value) for value in logprobs]
    mass = sum(weights)
    if mass < LEAST_MASS:
        raise Unreadable(f"the digits have less than {LEAST_MASS:.0%} of the probability")
    return 1 + sum(digit * weight for digit, weight in enumerate(weights)) / mass, min(mass, 1.0)


def _plain(text: str) -> str:
    """The reply as it is read: without thoughts and fences, full-width digits and letters as plain ones."""
    plain = unicodedata.normalize("NFKC", without_fences(without_thoughts(text))).strip()
    if not plain:
        raise Unreadable("the reply is empty")
    return _RUN.sub(r"\1\1\1", plain)  # "*****..." at length would cost the patterns above quadratic time
