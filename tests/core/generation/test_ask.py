"""What is asked, asked again, and set aside, of an engine and through the client."""

import asyncio
from collections import Counter

from pydantic import BaseModel

from trl_extensions.core.generation.ask import RETRY_TEMPERATURE, ask_again, ask_client, ask_until_read
from trl_extensions.core.generation.client import LLMClient, ResponseCache
from trl_extensions.core.generation.replies import Unreadable, schema_json
from trl_extensions.core.generation.types import Generation, GenerationParams


class Word(BaseModel):
    word: str


class Scripted:
    """Replies from a list to each first message of a chat; a reply that ends in ... is cut off."""

    name = "scripted"

    def __init__(self, **replies):
        self.replies, self.asked = {key: list(value) for key, value in replies.items()}, []

    def generate(self, prompts, params, seeds=None):
        for place in reversed(range(len(prompts))):
            self.asked.append((prompts[place], params))
            text = self.replies[prompts[place][0]["content"]].pop(0)
            yield place, Generation(text.removesuffix("..."), "length" if text.endswith("...") else "stop", 1)


def chat(text):
    return [{"role": "user", "content": text}]


GOOD = ['{"word": "yes"}']


def test_asks_all_and_the_unread_once_more():
    engine, counts = Scripted(a=GOOD, b=["<think>hm</think>perhaps", '{"word": "late"}'], c=["?", "??"]), Counter()
    prompts = [chat("a"), chat("b"), chat("c"), chat("a")]
    a, b, c, other = ask_until_read(engine, prompts, GenerationParams(9, seed=4), Word, counts=counts)
    assert (a.value.word, a.reason, a.raw) == ("yes", None, (GOOD[0],)) and other == a
    assert b.value.word == "late" and len(b.raw) == 2
    assert c.value is None and c.reason and c.raw == ("?", "??")
    assert counts == {"calls": 5, "retried": 2, "cache_hits": 0}  # what is alike is asked once
    first, last = engine.asked[0][1], engine.asked[-1][1]
    assert first == GenerationParams(9, seed=4, schema=schema_json(Word))
    assert (last.seed, last.temperature, last.schema) == (5, RETRY_TEMPERATURE, schema_json(Word))
    [asked_again] = [prompt for prompt, _ in engine.asked if len(prompt) > 1 and prompt[0] == chat("b")[0]]
    assert asked_again[1] == {"role": "assistant", "content": "perhaps"} and "not JSON" in asked_again[2]["content"]


def test_a_reader_and_a_second_question_of_ones_own():
    def read(text, *, truncated):
        if truncated or text != "好":
            raise Unreadable("no")
        return text

    engine = Scripted(a=["好...", "好"], other=["好"])
    [a] = ask_until_read(engine, [chat("a")], GenerationParams(), None, read=read, again=lambda *_: chat("other"))
    assert a.value == "好" and a.raw == ("好", "好") and engine.asked[-1][0] == chat("other")
    [a] = ask_until_read(Scripted(a=["x", "y"]), [chat("a")], GenerationParams(), None, read=read, tries=1)
    assert a.raw == ("x",) and a.reason == "no"


def test_a_cut_is_named():
    [a] = ask_until_read(Scripted(a=['{"wo...'] * 2), [chat("a")], GenerationParams(), Word)
    assert a.value is None and "length" in a.reason


def test_finished_calls_are_not_made_again(tmp_path):
    for made, hits in ((2, 0), (0, 2)):
        engine, counts = Scripted(a=["?", *GOOD]), Counter()
        with ResponseCache(tmp_path / "calls.sqlite") as cache:
            [a] = ask_until_read(engine, [chat("a")], GenerationParams(), Word, cache=cache, step="s", counts=counts)
            steps = [row["step"] for row in cache.rows()]
        assert a.value.word == "yes" and (counts["calls"], counts["cache_hits"]) == (made, hits)
        assert steps == ["s", "s:again"]


def test_through_the_client(tmp_path):
    async def ask(engine):
        finished = []
        with ResponseCache(tmp_path / "calls.sqlite") as cache:
            async with LLMClient({"strong": engine}, cache) as client:
                answer = await ask_client(
                    client, "strong", chat("a"), GenerationParams(9), Word, step="s", finished=finished.append
                )
        return answer, [one.text for one in finished]

    engine = Scripted(a=["?", *GOOD])
    answer, texts = asyncio.run(ask(engine))
    assert answer.value.word == "yes" and texts == list(answer.raw) == ["?", GOOD[0]]
    assert asyncio.run(ask(Scripted()))[0] == answer  # from the cache


def test_ask_again():
    assert ask_again("continue this", "x", "no") == "continue this"
    # chat templates refuse an empty turn, and two of the user in a row
    [only] = ask_again(chat("a"), "<think>b", "empty")
    assert only["content"].startswith("a\n\n") and "empty" in only["content"]
    *_, said, note = ask_again(chat("a"), "b" * 3000, "too long", note="Shorter!")
    assert len(said["content"]) < 2100 and note["content"] == "Shorter!"
