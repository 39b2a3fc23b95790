"""Rows to signed tokens, what a length limit does to them, and every way a row can be unusable."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import ByT5Tokenizer

from trl_extensions.core.training.encoding import encode_completion, encode_prompt, end_token_id
from trl_extensions.tnt.data import prepare_rows


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
        from tokenizers import normalizers

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
        with pytest.raises(ValueError, match=r"eval row 1: `negative_spans\[0\]` is reversed"):
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
        ({"negative_spans": [[4, 18]]}, r"`negative_spans\[0\]` is \[4, 18\), outside the completion, which has 17"),
        ({"negative_spans": [[0, 1], [4, 2]]}, r"`negative_spans\[1\]` is reversed"),
        ({"negative_spans": [[1, 2, 3]]}, r"`negative_spans\[0\]` must be a pair"),
        ({"negative_spans": [[-1, 2]]}, r"`negative_spans\[0\]` is \[-1, 2\), outside"),
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
