"""Replies of language models as text: what is thought, what is fenced, what cannot be read; and chats as text."""

import re

from .types import Prompt


# Where a chat template opens the thoughts, only their end is in the reply.
_THOUGHTS = re.compile(r"\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```(?:[A-Za-z0-9_+#.-]*[ \t]*\r?\n|[A-Za-z]*[ \t]+)?(.*?)(?:```|\Z)", re.DOTALL)


class Unreadable(ValueError):  # noqa: N818 (it is the reply that is)
    """A reply that cannot be read; as a string, the reason in one short line."""


def without_thoughts(text: str) -> str:
    """A reply without `<think>...</think>`: also without thoughts that were cut off, or begun before the reply."""
    return _THOUGHTS.sub("", text)


def without_fences(text: str) -> str:
    """A reply without the marks of Markdown code fences and their languages; what is inside them stays."""
    return _FENCE.sub(r"\1", text)


def fenced_parts(text: str) -> list[str]:
    """What is inside each Markdown code fence of a reply."""
    return _FENCE.findall(text)


def as_text(prompt: Prompt) -> str:
    """A prompt to be quoted inside another: a text as it is, a chat as `role: content` lines, "(none)" if empty."""
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return prompt or "(none)"
