"""Rows to signed tokens, chats and their templates, characters to tokens, and every way a row can be unusable.

Characters to tokens: hand-derived cases, and every token's bytes counted by a second path.
"""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer

from trl_extensions.core.training.encoding import encode_completion, encode_prompt, end_token_id
from trl_extensions.tnt.data import check_spans, cover_text, load_training_rows, negative_tokens, prepare_rows


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
USER = {"role": "user", "content": "Tell me of eggs."}


def prepare(rows, tokenizer, **settings):
    return prepare_rows(Dataset.from_list(rows), tokenizer, **({"max_length": None, "name": "eval"} | settings))


def row(completion="Put the egg here.", unwanted="egg", **changes):
    """A row of plain text, with the first occurrence of `unwanted` as its span."""
    start = completion.index(unwanted)
    spans = [[start, start + len(unwanted)]]
    return {"prompt": "Eggs?", "completion": completion, "negative_spans": spans} | changes


def chat(content="Put the egg here.", unwanted="egg", **changes):
    plain = row(content, unwanted)
    answer = {"role": "assistant", "content": content}
    return {**plain, "prompt": [USER], "completion": [answer]} | changes


def text_where(prepared, tokenizer, sign):
    """The tokens with this sign, decoded one after the other."""
    pairs = zip(prepared["input_ids"], prepared["token_weights"], strict=True)
    return tokenizer.decode([token for token, weight in pairs if weight == sign])


class TestTokens:
    def test_plain_rows(self, tiny_tokenizer):
        first = prepare([row()], tiny_tokenizer)[0]
        assert tiny_tokenizer.decode(first["input_ids"]) == "Eggs?Put the egg here.<|im_end|>"
        assert text_where(first, tiny_tokenizer, 0) == "Eggs?"
        assert text_where(first, tiny_tokenizer, -1) == " egg"
        assert text_where(first, tiny_tokenizer, 1) == "Put the here.<|im_end|>"

    def test_conversational_rows(self, tiny_tokenizer):
        first = prepare([chat()], tiny_tokenizer)[0]
        opening = "<|im_start|>user\nTell me of eggs.<|im_end|>\n<|im_start|>assistant\n"
        assert text_where(first, tiny_tokenizer, 0) == opening
        assert text_where(first, tiny_tokenizer, -1) == " egg"
        assert text_where(first, tiny_tokenizer, 1) == "Put the here.<|im_end|>"

    @pytest.mark.parametrize("truncated", [False, True])
    @pytest.mark.parametrize("text", ["Put the egg here.", "Put the egg here.<|im_end|>", "naïve 👩‍👩‍👧 egg ", "egg"])
    @pytest.mark.parametrize("make", [row, chat])
    def test_the_tokens_are_those_of_scoring(self, tiny_tokenizer, make, text, truncated):
        given = make(text, truncated=truncated)
        first = prepare([given], tiny_tokenizer)[0]
        end_id = end_token_id(tiny_tokenizer, make is chat)
        prompt = encode_prompt(tiny_tokenizer, given["prompt"], "p")
        completion = encode_completion(tiny_tokenizer, text, end_id, truncated=truncated)
        assert first["input_ids"] == prompt + completion
        assert [weight == 0 for weight in first["token_weights"]] == [True] * len(prompt) + [False] * len(completion)
        assert (first["input_ids"][-1] == end_id) is not truncated

    def test_the_end_is_kept_even_where_a_span_covers_its_text(self, tiny_tokenizer):
        text = "egg<|im_end|>"
        first = prepare([row(text, text)], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, 1) == "<|im_end|>"
        assert text_where(first, tiny_tokenizer, -1) == "egg"

    def test_an_empty_completion_is_its_end(self, tiny_tokenizer):
        for given in (row("", ""), chat("", ""), row("", "", truncated=True)):
            first = prepare([given], tiny_tokenizer)[0]
            assert text_where(first, tiny_tokenizer, 1) == "<|im_end|>"

    def test_rows_without_spans_are_kept_whole(self, tiny_tokenizer):
        rows = [row(), row(negative_spans=[]), row(negative_spans=None)]
        prepared = prepare(rows, tiny_tokenizer, name="train")
        without = prepare([{"prompt": "Eggs?", "completion": "Put the egg here."}], tiny_tokenizer)
        for one in (prepared[1], prepared[2], without[0]):
            assert text_where(one, tiny_tokenizer, 1) == "Put the egg here.<|im_end|>"
            assert -1 not in one["token_weights"]
        assert text_where(prepared[0], tiny_tokenizer, -1) == " egg"

    def test_earlier_messages_of_a_completion_are_prompt(self, tiny_tokenizer):
        earlier = [{"role": "assistant", "content": "An egg?"}, {"role": "user", "content": "Yes, an egg."}]
        last = {"role": "assistant", "content": "Put the egg here."}
        long = prepare([chat(completion=[*earlier, last])], tiny_tokenizer)[0]
        same = prepare([chat(prompt=[USER, *earlier])], tiny_tokenizer)[0]
        assert long["input_ids"] == same["input_ids"] and long["token_weights"] == same["token_weights"]
        assert text_where(long, tiny_tokenizer, -1) == " egg"
        assert text_where(long, tiny_tokenizer, 0).count("egg") == 3

    def test_a_chat_may_have_a_text_as_completion(self, tiny_tokenizer):
        as_text = prepare([chat(completion="Put the egg here.")], tiny_tokenizer)[0]
        assert as_text["input_ids"] == prepare([chat()], tiny_tokenizer)[0]["input_ids"]

    def test_a_completion_that_normalisation_shortens(self, tiny_tokenizer):
        tiny_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        first = prepare([row("cafe\u0301 egg here", "egg")], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, -1) == " egg"
        accent = prepare([row("cafe\u0301 egg here", "\u0301")], tiny_tokenizer)[0]
        assert text_where(accent, tiny_tokenizer, -1) == "é"

    def test_idempotent(self, tiny_tokenizer):
        once = prepare([row()], tiny_tokenizer, name="train")
        assert prepare_rows(once, tiny_tokenizer, max_length=2) is once

    def test_other_columns_stay(self, tiny_tokenizer):
        columns = prepare([row(id="a")], tiny_tokenizer).column_names
        assert columns == ["prompt", "completion", "negative_spans", "id", "input_ids", "token_weights"]

    @pytest.mark.parametrize("form", ["numpy", "torch"])
    def test_formats_of_a_dataset_do_not_matter(self, tiny_tokenizer, form):
        plain = Dataset.from_list([row(), row("A lone egg.")])
        formatted = prepare_rows(plain.with_format(form), tiny_tokenizer, max_length=None)
        assert list(formatted) == list(prepare_rows(plain, tiny_tokenizer, max_length=None))

    def test_several_processes(self, tiny_tokenizer):
        rows = [row(), row("A lone egg.")]
        assert list(prepare(rows, tiny_tokenizer, num_proc=2)) == list(prepare(rows, tiny_tokenizer))
        with pytest.raises(ValueError, match=r"eval row 1: `negative_spans\[0\]` is .* reversed"):
            prepare([row(), row(negative_spans=[[3, 2]])], tiny_tokenizer, num_proc=2)


class TestPretokenised:
    def tokens(self, **changes):
        given = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "negative_mask": [0, 1, 0, 0]}
        return given | changes

    def test_signs(self):
        """Needs no tokenizer, so a slow one is no hindrance."""
        first = prepare([self.tokens()], ByT5Tokenizer())
        assert first.column_names == ["input_ids", "token_weights"]
        assert first[0] == {"input_ids": [5, 6, 7, 8], "token_weights": [0, -1, 0, 1]}

    def test_masks_of_other_kinds(self, tiny_tokenizer):
        rows = [self.tokens(negative_mask=mask) for mask in ([False, True, False, False], None)]
        assert prepare(rows, tiny_tokenizer)["token_weights"] == [[0, -1, 0, 1], [0, 1, 0, 1]]

    def test_the_first_token_is_not_scored(self, tiny_tokenizer, caplog):
        given = self.tokens(labels=[5, 6, 7, 8], negative_mask=[1, 0, 0, 0])
        assert prepare([given], tiny_tokenizer)[0]["token_weights"] == [0, 1, 1, 1]
        assert "1 have negative spans that touch no scored token" in caplog.text
        with pytest.raises(ValueError, match="nothing to remove"):
            prepare([given], tiny_tokenizer, name="train")

    def test_marks_that_are_not_scored_are_counted(self, tiny_tokenizer, caplog):
        rows = [self.tokens(), self.tokens(negative_mask=[0, 0, 1, 0])]
        assert prepare(rows, tiny_tokenizer)["token_weights"] == [[0, -1, 0, 1], [0, 1, 0, 1]]
        assert "Of 2 eval rows, 1 have negative spans that touch no scored token (first: row 1)." in caplog.text

    def test_a_limit(self, tiny_tokenizer, caplog):
        rows = [self.tokens(), self.tokens(labels=[-100, -100, -100, 8], negative_mask=[0, 0, 0, 1])]
        prepared = prepare(rows, tiny_tokenizer, max_length=3)
        assert list(prepared) == [{"input_ids": [5, 6, 7], "token_weights": [0, -1, 0]}]
        assert (
            "Of 2 eval rows, 2 are longer than max_length=3 and were cut on the right (first: row 0); 1 of these had "
            "no completion left and were dropped; 1 negative spans lay behind the cut, wholly or in part."
            in caplog.text
        )

    def test_rows_with_nothing_to_score_are_dropped(self, tiny_tokenizer, caplog):
        nothing = self.tokens(labels=[-100] * 4, negative_mask=[0] * 4)
        assert len(prepare([self.tokens(), nothing], tiny_tokenizer)) == 1
        assert "Of 2 eval rows, 1 have no scored token and were dropped." in caplog.text
        with pytest.raises(ValueError, match=r"No eval row is left, .*: check `labels`, which are all -100"):
            prepare([nothing], tiny_tokenizer)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": [-100, 6, -100]}, "`labels` must be a list, one entry per token, got 3 for 4 `input_ids`"),
            ({"negative_mask": [0, 1]}, "`negative_mask` must be a list, one entry per token, got 2 for 4"),
            ({"labels": [6, 7, 8, -100]}, r"`labels\[0\]` is 6, which is neither -100 .* nor `input_ids\[0\]` \(5\)"),
            ({"labels": None}, "`labels` must be a list, one entry per token, got None"),
            ({"input_ids": None}, "`input_ids` must be a list"),
        ],
    )
    def test_unusable_rows_are_named(self, tiny_tokenizer, changes, message):
        with pytest.raises(ValueError, match=f"^eval row 1: {message}"):
            prepare([self.tokens(), self.tokens(**changes)], tiny_tokenizer)


class TestLimit:
    def test_what_fits_is_not_cut(self, tiny_tokenizer, caplog):
        rows = [row(), row("egg " * 20)]
        longest = max(map(len, prepare(rows, tiny_tokenizer)["input_ids"]))
        assert list(prepare(rows, tiny_tokenizer, max_length=longest)) == list(prepare(rows, tiny_tokenizer))
        assert not caplog.text
        assert len(prepare(rows, tiny_tokenizer, max_length=longest - 1)[1]["input_ids"]) == longest - 1
        assert "1 are longer than" in caplog.text

    def test_the_right_end_is_cut(self, tiny_tokenizer):
        whole = prepare([row()], tiny_tokenizer)[0]
        for length in range(len(whole["input_ids"]) - 1, 8, -1):
            cut = prepare([row()], tiny_tokenizer, max_length=length)[0]
            assert cut["input_ids"] == whole["input_ids"][:length]
            assert cut["token_weights"] == whole["token_weights"][:length]

    def test_everything_is_counted_in_one_warning(self, tiny_tokenizer, caplog):
        """Prompt: "Eggs?" in n tokens; the limit leaves the tokens "Put" and " the"."""
        limit = len(encode_prompt(tiny_tokenizer, "Eggs?", "p")) + 2
        long = "Put the egg here."
        rows = [
            row("Put", "Put", truncated=True),  # fits
            row(long, "egg"),  # its span is lost
            row(long, "the egg"),  # its span is half lost
            row(long, "Put"),  # cut, but its span is not touched by that
            row(long, negative_spans=[[0, 3], [9, 10], [12, 13]]),  # two of three lost
            row(prompt="Eggs? " * 9),  # nothing left but prompt, its span lost
            row("Put", "", negative_spans=[[1, 1]]),  # empty span
        ]
        rows = [{"truncated": False} | one for one in rows]
        prepared = prepare(rows, tiny_tokenizer, max_length=limit, name="train")
        assert len(caplog.records) == 1
        assert caplog.records[0].getMessage() == (
            f"Of 7 train rows, 5 are longer than max_length={limit} and were cut on the right (first: row 1); 1 of "
            "these had no completion left and were dropped; 5 negative spans lay behind the cut, wholly or in part; "
            "1 have negative spans that touch no scored token (first: row 6)."
        )
        signs = [[w for w in weights if w] for weights in prepared["token_weights"]]
        assert signs == [[-1], [1, 1], [1, -1], [-1, 1], [-1, 1], [1, 1]]

    def test_nothing_left(self, tiny_tokenizer):
        with pytest.raises(ValueError, match=r"^No eval row is left, .*: raise max_length=1\.$") as caught:
            prepare([row(), row(prompt="Eggs, tell me")], tiny_tokenizer, max_length=1)
        assert "\n" not in str(caught.value)

    def test_a_cut_that_leaves_nothing_to_remove(self, tiny_tokenizer):
        limit = len(encode_prompt(tiny_tokenizer, "Eggs?", "p")) + 2
        with pytest.raises(ValueError, match=f"nothing to remove: 1 negative spans lay behind max_length={limit}, so"):
            prepare([row()], tiny_tokenizer, max_length=limit, name="train")


class TestSigns:
    @pytest.mark.parametrize("spans", [None, [], [[2, 2]]])
    def test_nothing_to_remove(self, tiny_tokenizer, spans):
        with pytest.raises(
            ValueError, match=r"No token of the train dataset is negative, .*: mark what is unwanted in"
        ):
            prepare([row(negative_spans=spans)] * 2, tiny_tokenizer, name="train")
        assert len(prepare([row(negative_spans=spans)] * 2, tiny_tokenizer, name="eval")) == 2

    def test_nothing_to_keep(self, tiny_tokenizer):
        rows = [row("egg", "egg", truncated=True)] * 2
        with pytest.raises(ValueError, match=r"Every scored token of the train dataset is negative, .*: mark only"):
            prepare(rows, tiny_tokenizer, name="train")
        assert len(prepare(rows, tiny_tokenizer, name="eval")) == 2
        assert len(prepare([*rows, row("A", "", truncated=True)], tiny_tokenizer, name="train")) == 3

    def test_a_span_that_touches_nothing_is_no_error(self, tiny_tokenizer, caplog):
        rows = [row(), row(negative_spans=[[4, 4], [0, 3]]), row(negative_spans=[])]
        assert len(prepare(rows, tiny_tokenizer, name="train")) == 3
        assert "Of 3 train rows, 1 have negative spans that touch no scored token (first: row 1)." in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_spans": [[4, 18]]}, r"`negative_spans\[0\]` is \[4, 18\), .*outside the completion, of 17"),
        ({"negative_spans": [[0, 1], [4, 2]]}, r"`negative_spans\[1\]` is .* reversed"),
        ({"negative_spans": [[1, 2, 3]]}, r"`negative_spans\[0\]` must be a pair"),
        ({"negative_spans": [[-1, 2]]}, r"`negative_spans\[0\]` is \[-1, 2\), .*outside"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": None}, "`prompt` must be a text or a list of chat messages, got None"),
        ({"completion": None}, "`completion` must be a text or a list of chat messages, got None"),
        ({"truncated": "no"}, "`truncated` must be true or false, got 'no'"),
    ],
)
def test_unusable_rows_are_named(tiny_tokenizer, changes, message):
    good = row(truncated="") | {"truncated": None}
    with pytest.raises(ValueError, match=f"^eval row 1: {message}") as caught:
        prepare([good, good | changes], tiny_tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spans", [[[0.0, 2.0]], [[False, True]], [["0", "2"]], ["02"], [{"start": 0, "end": 2}]])
def test_spans_of_other_kinds(tiny_tokenizer, spans):
    with pytest.raises(ValueError, match=r"^eval row 0: `negative_spans\[0\]` must"):
        prepare([row(negative_spans=spans)], tiny_tokenizer)


def test_spans_written_by_numpy(tiny_tokenizer):
    given = row(negative_spans=np.array([[8, 11]], dtype=np.int32))
    assert prepare([given], tiny_tokenizer)[0] == prepare([row()], tiny_tokenizer)[0]


def test_missing_columns_are_named(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"^The eval dataset has the columns \['text'\]; TNT needs `prompt` and"):
        prepare([{"text": "a"}], tiny_tokenizer)
    with pytest.raises(ValueError, match=r"has the columns \['input_ids', 'labels'\]; .*`labels` and `negative_mask`"):
        prepare([{"input_ids": [1], "labels": [1]}], tiny_tokenizer)
    with pytest.raises(ValueError, match="has images, which TNT does not support"):
        prepare([row(images="a")], tiny_tokenizer)


def test_slow_tokenizers_are_refused_first():
    """Before any row is read: the second one would be an error too."""
    with pytest.raises(ValueError, match=r"^ByT5Tokenizer is a slow tokenizer, .*: load the fast one, or") as caught:
        prepare([row(), row(negative_spans=[[9, 1]])], ByT5Tokenizer())
    assert "\n" not in str(caught.value)


def test_no_rows(tiny_tokenizer):
    with pytest.raises(ValueError, match="The eval dataset has no rows"):
        prepare_rows(Dataset.from_list([row()]).select([]), tiny_tokenizer, max_length=None, name="eval")


def test_tokenizer_without_end_of_sequence(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        prepare([row()], tiny_tokenizer)


# Chats: what the template writes of a completion


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
            "{{ m['content'] | replace(' ', '  ') }}",
            "<think></think>{{ m['content'] }}",
            "{{ m['content'].split('egg')[-1] }}",
        ],
    )
    def test_one_that_changes_it_has_no_say(self, tiny_tokenizer, content):
        tiny_tokenizer.chat_template = template(content)
        first = prepare([chat_of("\n Put the[ egg] here.")], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, 1) == "\n Put the here.<|im_end|>"
        assert text_where(first, tiny_tokenizer, -1) == " egg"

    def test_one_whose_prompt_is_another_with_an_answer(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = TEMPLATE.replace("CONTENT", "{{ m['content'] }}").replace(
            "assistant", "assistent"
        )
        first = prepare([chat()], tiny_tokenizer)[0]
        assert text_where(first, tiny_tokenizer, -1) == " egg"

    def test_reasoning_beside_the_content(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = template("{{ m['reasoning'] if 'reasoning' in m }}{{ m['content'] }}")
        message = {"role": "assistant", "content": "Put the egg here."}
        own = ({}, {"reasoning": None}, {"reasoning": "Where?"})  # datasets fill up with None what other rows have
        first, *others = (prepare([chat(completion=[message | more])], tiny_tokenizer)[0] for more in own)
        assert all(other["token_weights"] == first["token_weights"] for other in others)

    @pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen2_5", "gemma3", "llama3_2"])
    def test_chats_of_several_turns_under_templates_in_use(self, tiny_tokenizer, name):
        tiny_tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        said = [("user", "卵?"), ("assistant", "うん"), ("user", "卵は?"), ("assistant", "はい、申し訳ありません。")]
        messages = [{"role": role, "content": text} for role, text in said]
        shared = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in said]
        for columns in ({"messages": messages}, {"conversations": shared}):
            first = prepare([columns | {"negative_spans": [[3, 11]]}], tiny_tokenizer)[0]
            assert text_where(first, tiny_tokenizer, -1) == "申し訳ありません"
            assert text_where(first, tiny_tokenizer, 1).startswith("はい、。<")

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
        ({"negative_spans": [[4, 18]]}, r"`negative_spans\[0\]` is \[4, 18\), .*outside"),
    ],
)
def test_unusable_chats_are_named(tiny_tokenizer, changes, message):
    with pytest.raises(ValueError, match=f"^eval row 0: {message}") as caught:
        prepare([chat(**changes)], tiny_tokenizer)
    assert "\n" not in str(caught.value)


# Characters to tokens


# One character of 1, 2, 3 and 4 bytes, a flag (two characters), a skin tone, a family joined by U+200D, a loose accent
TEXTS = [
    "Put the egg here, not there.",
    "naïve café — 日本語 eggs",
    "👩‍👩‍👧 eggs 🇩🇪 and 👍🏽!",
    "e\u0301clair\n\n  two  spaces\tand tabs ",
    "👧",
]


def byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: printable ones themselves, others from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def negative_by_bytes(tokens: list[str], text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """Reads the tokens one by one into bytes and marks those that hold a byte of a span."""
    letters, data = byte_of(), b""
    unwanted = {
        byte
        for start, end in spans
        for byte in range(len(text[:start].encode()), len(text[:end].encode()))
    }  # fmt: skip
    marks = []
    for token in tokens:
        begin = len(data)
        data += bytes(letters[letter] for letter in token)
        marks.append(not unwanted.isdisjoint(range(begin, len(data))))
    assert data.decode() == text
    return marks


def tokens_and_offsets(tokenizer, text):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["offset_mapping"]


class TestOverlap:
    """The tokens of "not here": "not" and " here", as byte-level tokenizers cut it."""

    OFFSETS = ((0, 3), (3, 8))

    @pytest.mark.parametrize(
        ("spans", "expected"),
        [
            ([], [False, False]),
            ([(4, 8)], [False, True]),  # "here": the token with its space
            ([(0, 3)], [True, False]),  # "not": its end is the beginning of " here"
            ([(3, 4)], [False, True]),  # the space alone belongs to " here"
            ([(2, 4)], [True, True]),  # "t "
            ([(6, 7)], [False, True]),  # in the middle of " here"
            ([(0, 1), (1, 2)], [True, False]),  # touching
            ([(0, 2), (1, 5)], [True, True]),  # overlapping
            ([(5, 6), (0, 1)], [True, True]),  # in any order
            ([(1, 1)], [False, False]),  # empty, inside a token
            ([(3, 3)], [False, False]),  # empty, between two
            ([(0, 8)], [True, True]),
        ],
    )
    def test_by_hand(self, spans, expected):
        assert negative_tokens(self.OFFSETS, spans) == expected

    def test_tokens_without_characters(self):
        assert negative_tokens([(0, 0), (0, 3), (2, 2), (3, 3)], [(0, 3)]) == [False, True, False, False]

    def test_the_bytes_of_a_character_share_its_fate(self, tiny_tokenizer):
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, "x日y")
        assert len(tokens) == 5  # three of them bytes of one character
        assert negative_tokens(offsets, [(1, 2)]) == [False, True, True, True, False]
        assert negative_tokens(offsets, [(0, 1)]) == [True, False, False, False, False]

    def test_a_part_of_a_joined_emoji(self, tiny_tokenizer):
        """A family is woman (4 bytes), joiner (3), woman (4), joiner (3), girl (4); the span is the first joiner."""
        text = "👩‍👩‍👧"
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        assert len(text) == 5 and len(tokens) == 18
        assert negative_tokens(offsets, [(1, 2)]) == [False] * 4 + [True] * 3 + [False] * 11

    @pytest.mark.parametrize("text", TEXTS)
    def test_all_spans_against_bytes(self, tiny_tokenizer, text):
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        for start in range(len(text) + 1):
            for end in range(start, len(text) + 1):
                expected = negative_by_bytes(tokens, text, [(start, end)])
                assert negative_tokens(cover_text(offsets, text), [(start, end)]) == expected, (start, end)

    @pytest.mark.parametrize("text", TEXTS)
    def test_many_spans_against_bytes(self, tiny_tokenizer, text):
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        rng = random.Random(0)
        for _ in range(100):
            spans = [tuple(sorted(rng.choices(range(len(text) + 1), k=2))) for _ in range(rng.randint(0, 4))]
            expected = negative_by_bytes(tokens, text, spans)
            assert negative_tokens(cover_text(offsets, text), spans) == expected, spans


class TestCover:
    """Characters that a tokenizer reports for no token."""

    def test_by_hand(self):
        assert cover_text([(0, 2), (3, 5)], "ab cd") == [(0, 2), (2, 5)]  # a space goes to the token behind it
        assert cover_text([(0, 1), (2, 3)], "e\u0301x") == [(0, 2), (2, 3)]  # an accent to the one before
        assert cover_text([(0, 1), (0, 1), (3, 4)], "e\u0301 x") == [(0, 2), (0, 2), (2, 4)]  # both bytes of it
        assert cover_text([(1, 2)], "\u0301x") == [(0, 2)]  # nothing before it
        assert cover_text([(0, 1)], "e\u0301") == [(0, 2)]  # nothing behind it
        assert cover_text([(0, 1), (2, 2)], "a ") == [(0, 1), (1, 2)]  # a space whose offsets were trimmed away
        assert cover_text([], "") == []

    @pytest.mark.parametrize(
        "offsets", [[(0, 2), (2, 5)], [(0, 1), (0, 1), (1, 5)], [(0, 5), (0, 5)], [(0, 5), (0, 3)]]
    )
    def test_what_covers_everything_stays(self, offsets):
        assert cover_text(offsets, "ab cd") == offsets

    @pytest.mark.parametrize("text", TEXTS)
    def test_trimmed_offsets_are_restored(self, tiny_tokenizer, text):
        whole = tokens_and_offsets(tiny_tokenizer, text)
        tiny_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        trimmed = tokens_and_offsets(tiny_tokenizer, text)
        assert trimmed[0] == whole[0] and (trimmed[1] != whole[1]) == (" " in text)
        assert cover_text(trimmed[1], text) == whole[1]

    def test_an_accent_that_normalisation_merges(self, tiny_tokenizer):
        """Under NFC e + U+0301 is one character of two bytes, and its two tokens must know of both."""
        tiny_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        text = "ae\u0301 b"
        tokens, offsets = tokens_and_offsets(tiny_tokenizer, text)
        assert tokens[:3] == ["a", "Ã", "©"]
        for span in [(1, 2), (2, 3), (1, 3)]:
            marks = negative_tokens(cover_text(offsets, text), [span])
            assert marks[:3] == [False, True, True] and not any(marks[3:])

    def test_a_vocabulary_of_words_and_fallback_bytes(self):
        """As Llama 2 cuts text: a space is part of the word behind it, and unknown characters are bytes."""
        vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
        vocab |= {piece: 257 + i for i, piece in enumerate(["▁", "e", "g", "s", "eg", "▁eg", "▁egg"])}
        merges = [("e", "g"), ("▁", "eg"), ("▁eg", "g")]
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        text = "egg 👧 eggs"
        encoded = backend.encode(text)
        assert encoded.tokens == ["▁egg", "▁", "<0xF0>", "<0x9F>", "<0x91>", "<0xA7>", "▁egg", "s"]
        offsets = cover_text(encoded.offsets, text)
        assert negative_tokens(offsets, [(4, 5)]) == [False, False, True, True, True, True, False, False]
        assert negative_tokens(offsets, [(8, 9)]) == [False] * 6 + [True, False]
        assert negative_tokens(offsets, [(0, 1)]) == [True] + [False] * 7


class TestCheck:
    @pytest.mark.parametrize(
        "spans",
        [
            [[0, 2], [2, 5]],
            [(0, 2), (2, 5)],
            ([0, 2], [2, 5]),
            np.array([[0, 2], [2, 5]]),
            [np.array([0, 2], dtype=np.int32), [np.int64(2), np.uint8(5)]],
        ],
    )
    def test_what_is_accepted(self, spans):
        checked = check_spans(spans, 5, "row 0")
        assert checked == [(0, 2), (2, 5)]
        assert {type(offset) for span in checked for offset in span} == {int}

    def test_none_and_nothing(self):
        assert check_spans(None, 5, "row 0") == check_spans([], 5, "row 0") == []
        assert check_spans([[0, 0], [5, 5]], 5, "row 0") == [(0, 0), (5, 5)]
        assert check_spans([[0, 0]], 0, "row 0") == [(0, 0)]

    @pytest.mark.parametrize(
        ("span", "message"),
        [
            ([3, 2], r"is \[3, 2\), reversed"),
            ([-1, 2], r"is \[-1, 2\), .*outside the completion, of 5 characters"),
            ([2, 6], r"is \[2, 6\), .*outside the completion, of 5 characters"),
            ([7, 9], r"outside the completion"),
            ([0.0, 2.0], r"must be a pair of integers .*, got \[0.0, 2.0\]"),
            ([0, True], "must be a pair of integers"),
            ([np.float32(0), np.float32(2)], "must be a pair of integers"),
            (np.array([False, True]), "must be a pair of integers"),
            (["0", "2"], "must be a pair of integers"),
            ([0, None], "must be a pair of integers"),
            ([0, 1, 2], r"must be a pair of integers \[start, end\]"),
            ([0], r"must be a pair"),
            (3, r"must be a pair"),
            (None, r"must be a pair"),
            ("02", r"must be a pair"),
            ({"start": 0, "end": 2}, r"must be a pair .*'start': 0"),
            ([0, "a" * 500 + "\n"], "must be a pair of integers"),
        ],
    )
    def test_errors_name_row_and_span(self, span, message):
        with pytest.raises(ValueError, match=message) as caught:
            check_spans([[0, 2], span], 5, "train row 7")
        assert str(caught.value).startswith("train row 7: `negative_spans[1]` ")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300

    @pytest.mark.parametrize("spans", ["0-2", 3, {"start": 0, "end": 2}])
    def test_no_list_at_all(self, spans):
        with pytest.raises(ValueError, match=r"row 7: `negative_spans` must be a list of \[start, end\] pairs"):
            check_spans(spans, 5, "row 7")


# Which outputs are trained on


ANNOTATED = [row(), row("All clean.", "", negative_spans=[]), row("So is this.", "", negative_spans=[]), row("", "")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_rows_of_every_format_without_empty_ones(tmp_path, name):
    data = Dataset.from_list([one | {"id": i} for i, one in enumerate(ANNOTATED)])
    path = str(tmp_path / name)
    data.to_parquet(path) if name.endswith("parquet") else data.to_json(path, lines=name.endswith("l"))
    rows = load_training_rows(path, "train")
    assert rows["completion"][:] == ["Put the egg here.", "All clean.", "So is this."]
    assert set(rows.column_names) == {"prompt", "completion", "negative_spans", "severities", "truncated"}
    thinned = load_training_rows(path, "train", clean_ratio=1.0)
    assert [bool(spans) for spans in thinned["negative_spans"]] == [True, False]


def test_tokenised_rows_are_taken_as_they_are(tmp_path):
    tokens = {"input_ids": [5, 6], "labels": [-100, 6], "negative_mask": [False, True]}
    Dataset.from_list([tokens]).save_to_disk(tmp_path / "saved")
    assert load_training_rows(str(tmp_path / "saved"), "train")[0] == tokens
    with pytest.raises(ValueError, match="`clean_ratio` does not apply"):
        load_training_rows(str(tmp_path / "saved"), "train", clean_ratio=1.0)


def test_files_that_cannot_be_trained_on(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    for rows, message in (([{"prompt": "a"}], "row 1 has no `completion`"), ([row("", "")], "no rows to train on")):
        Dataset.from_list(rows).to_json(path)
        with pytest.raises(ValueError, match=message):
            load_training_rows(path, "train")
    with pytest.raises(ValueError, match="no such file"):
        load_training_rows(str(tmp_path / "nowhere.jsonl"), "train")
