"""A judge that follows a rule, for tests."""

import re

from trl_extensions.core.generation.types import Generation


class RuleJudge:
    """An engine that replies what `rule(first, second)` says of the answers as they are shown.

    Args:
        rule: From the two answers to the text of the reply, or to the log-probabilities of A and B.
        again: The same for questions that are asked again; default: `rule`.
    """

    def __init__(self, rule, again=None, name="rule"):
        self.rule, self.again, self.name = rule, again or rule, name
        self.questions: list[list[dict]] = []
        self.batches = 0

    def generate(self, prompts, params, seeds=None):
        self.batches += 1
        for index in reversed(range(len(prompts))):  # engines answer in any order
            yield index, Generation(self._reply(prompts[index]), "stop", 3)

    def option_logprobs(self, prompts, options):
        assert tuple(options) == ("A", "B")
        self.batches += 1
        for index in reversed(range(len(prompts))):
            yield index, Generation("", "length", 1), list(self._reply(prompts[index]))

    def _reply(self, prompt):
        self.questions.append(prompt)
        shown = re.findall(r"<answer_\w>\n(.*?)\n</answer_\w>", prompt[0]["content"], re.DOTALL)
        return (self.rule if len(prompt) == 1 else self.again)(*shown)


def shorter(first, second):
    """Two scores: the shorter answer gets 8, the longer 4, answers of one length 6 each."""
    if len(first) == len(second):
        return "6 6"
    return "8 4" if len(first) < len(second) else "4 8"
