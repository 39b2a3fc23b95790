"""Chats: what the template writes of a completion, and every way a chat can be unusable."""

import re

import pytest

from tests.tnt.test_data import USER, chat, prepare, text_where


REWRITTEN = "the chat template rewrites the completion, so character offsets cannot be mapped"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\nCONTENT<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(content: str) -> str:
    return TEMPLATE.replace("CONTENT", content)


def chat_of(text):
    """Reads a text that marks its negative spans by `[...]`."""
    parts = re.split(r"[\[\]]", text)
    spans, content = [], ""
    for i, part in enumerate(parts):
        spans += [[len(content), len(content) + len(part)]] if i % 2 else []
        content += part
    return chat(content, content, negative_spans=spans)


class TestTemplates:
    """Offsets are only worth something where the template writes the message as it is."""

    def test_one_that_strips(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = template("{{ m['content'] | trim }}")
        first = prepare([chat_of(" \n Put the[ egg] here.\n")], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, 1) == "Put the here.<|im_end|>"
        assert text_where(first, tiny_tokenizer, -1) == " egg"

    def test_one_that_strips_some(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = template("{{ m['content'].lstrip('\n').rstrip('\n') }}")
        first = prepare([chat_of("\n\n Put the[ egg] here. \n")], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, 1) == " Put the here. <|im_end|>"
        assert text_where(first, tiny_tokenizer, -1) == " egg"

    def test_one_that_leaves_white_space(self, tiny_tokenizer):
        first = prepare([chat_of("\n Put the[ egg] here.\n\n")], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, 1) == "\n Put the here.\n\n<|im_end|>"
        assert text_where(first, tiny_tokenizer, -1) == " egg"

    def test_one_that_adds_a_space(self, tiny_tokenizer):
        """As Mistral's do: the completion's tokens are still those of the completion, as the sampler read them."""
        tiny_tokenizer.chat_template = template("{{ ' ' + m['content'] }}")
        first = prepare([chat_of("[Put ]the egg here.")], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, -1) == "Put the"
        assert text_where(first, tiny_tokenizer, 1) == " egg here.<|im_end|>"

    def test_spans_in_what_was_stripped_are_counted(self, tiny_tokenizer, caplog):
        tiny_tokenizer.chat_template = template("{{ m['content'] | trim }}")
        first = prepare([chat_of("[ \n] Put the egg here.[\n]")], tiny_tokenizer)[0]
        assert -1 not in first["token_weights"]
        assert "1 have negative spans that touch no scored token (first: row 0)" in caplog.text

    @pytest.mark.parametrize(
        "content",
        [
            "{{ m['content'] | upper }}",
            "{{ m['content'] | replace(' ', '  ') }}",
            "<think></think>{{ m['content'] }}",
            "{{ m['content'].split('egg')[-1] }}",
        ],
    )
    def test_one_that_rewrites(self, tiny_tokenizer, content):
        tiny_tokenizer.chat_template = template(content)
        with pytest.raises(ValueError, match=f"^eval row 0: {REWRITTEN}: give pretokenised rows") as caught:
            prepare([chat()], tiny_tokenizer)
        assert "\n" not in str(caught.value)

    def test_one_whose_prompt_is_another_with_an_answer(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = TEMPLATE.replace("CONTENT", "{{ m['content'] }}").replace(
            "assistant", "assistent"
        )
        with pytest.raises(ValueError, match=f"eval row 0: {REWRITTEN}"):
            prepare([chat()], tiny_tokenizer)

    def test_reasoning_beside_the_content(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = template("{{ m['reasoning'] if 'reasoning' in m }}{{ m['content'] }}")
        message = {"role": "assistant", "content": "Put the egg here."}
        for none in ({}, {"reasoning": None}):  # datasets fill up with None what other rows have
            assert len(prepare([chat(completion=[message | none])], tiny_tokenizer)) == 1
        with pytest.raises(ValueError, match=REWRITTEN):
            prepare([chat(completion=[message | {"reasoning": "Where?"}])], tiny_tokenizer)

    def test_one_that_refuses(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = "{{ raise_exception('Roles must alternate.') }}"
        with pytest.raises(ValueError, match=r"eval row 0: the chat template refuses .*: Roles must alternate\.$"):
            prepare([chat()], tiny_tokenizer)

    def test_none_at_all(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = None
        with pytest.raises(ValueError, match="eval row 0: `prompt` is a chat, but the tokenizer has no chat template"):
            prepare([chat()], tiny_tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": [USER]}, "`completion` must end with an assistant message"),
        ({"completion": [{"role": "assistant", "content": None}]}, "`completion` must end with an assistant message"),
        ({"completion": []}, "`completion` must be a text or a list of chat messages"),
        ({"prompt": []}, "`prompt` must be a text or a list of chat messages"),
        ({"prompt": [{"content": "Hm"}]}, "`prompt` must be a text or a list of chat messages"),
        ({"prompt": "Eggs?"}, "`completion` is a chat and `prompt` a text: give both in the same form"),
        (
            {"completion": [{"role": "assistant", "content": "Here.", "tool_calls": [{"name": "egg"}]}]},
            "`completion` ends with tool calls",
        ),
        ({"negative_spans": [[4, 18]]}, r"`negative_spans\[0\]` is \[4, 18\), outside"),
    ],
)
def test_unusable_chats_are_named(tiny_tokenizer, changes, message):
    with pytest.raises(ValueError, match=f"^eval row 0: {message}") as caught:
        prepare([chat(**changes)], tiny_tokenizer)
    assert "\n" not in str(caught.value)
