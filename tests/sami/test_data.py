"""Rows to token ids, and every way a row can be unusable."""

import pytest
from datasets import Dataset

from tests.sami.conftest import sami_rows
from trl_extensions.sami.data import prepare_rows


def prepare(rows, tokenizer, **settings):
    return prepare_rows(
        Dataset.from_list(rows), tokenizer, **({"max_length": None, "overlong_policy": "error"} | settings)
    )


def row(**changes):
    return {"prompts": ["Be brief: eggs?", "Be long: eggs?"], "completions": ["Yes.", "Well, yes."]} | changes


class TestTokens:
    def test_conversational_rows(self, tiny_tokenizer):
        first = prepare(sami_rows(1), tiny_tokenizer)[0]
        text = "<|im_start|>user\nBe brief. Tell me of eggs.<|im_end|>\n<|im_start|>assistant\n"
        assert tiny_tokenizer.decode(first["prompt_input_ids"][0]) == text
        assert tiny_tokenizer.decode(first["completion_input_ids"][0]) == "eggs: yes.<|im_end|>"

    def test_plain_rows(self, tiny_tokenizer):
        first = prepare([row()], tiny_tokenizer)[0]
        assert tiny_tokenizer.decode(first["prompt_input_ids"][1]) == "Be long: eggs?"
        assert tiny_tokenizer.decode(first["completion_input_ids"][1]) == "Well, yes.<|im_end|>"

    def test_query_and_constitutions_are_rendered(self, tiny_tokenizer):
        given = {"query": "Eggs {raw}?", "constitutions": ["Be brief.", "Be long."], "completions": ["Yes.", "Well."]}
        rendered = [[{"role": "user", "content": f"{c} Now: Eggs {{raw}}?"}] for c in given["constitutions"]]
        ours = prepare([given], tiny_tokenizer, prompt_template="{constitution} Now: {query}")[0]
        same = prepare([{"prompts": rendered, "completions": given["completions"]}], tiny_tokenizer)[0]
        assert ours["prompt_input_ids"] == same["prompt_input_ids"]
        tiny_tokenizer.chat_template = None
        plain = prepare([given], tiny_tokenizer, prompt_template="{constitution} Now: {query}")[0]
        assert tiny_tokenizer.decode(plain["prompt_input_ids"][0]) == "Be brief. Now: Eggs {raw}?"

    def test_truncated_responses_get_no_end(self, tiny_tokenizer):
        first = prepare([row(truncated=[True, False])], tiny_tokenizer)[0]
        ends = [ids[-1] == tiny_tokenizer.eos_token_id for ids in first["completion_input_ids"]]
        assert ends == [False, True]

    def test_ends_can_be_left_unscored(self, tiny_tokenizer):
        completions = ["Yes.", "はい。<|im_end|>"]
        scored, bare = (
            prepare([row(completions=completions)], tiny_tokenizer, score_end=end)[0] for end in (True, False)
        )
        assert bare["prompt_input_ids"] == scored["prompt_input_ids"]
        for with_end, without in zip(scored["completion_input_ids"], bare["completion_input_ids"], strict=True):
            assert with_end == [*without, tiny_tokenizer.eos_token_id]

    def test_constitutions_that_cannot_be_drawn_anew_are_said_so_once(self, tiny_tokenizer, caplog):
        given = {"query": "Eggs?", "constitutions": ["Be brief.", "Be long."], "completions": ["Yes.", "Well."]}
        prepare([given] * 3, tiny_tokenizer)
        assert caplog.text.count("are used as they are") == 1
        prepare([row()], tiny_tokenizer)
        assert caplog.text.count("are used as they are") == 1

    def test_an_end_that_is_there_is_not_doubled(self, tiny_tokenizer):
        first = prepare([row(completions=["Yes.<|im_end|>", "Well."])], tiny_tokenizer)[0]
        assert first["completion_input_ids"][0].count(tiny_tokenizer.eos_token_id) == 1

    def test_idempotent(self, tiny_tokenizer):
        once = prepare(sami_rows(2), tiny_tokenizer)
        assert prepare_rows(once, tiny_tokenizer, max_length=3, overlong_policy="error") is once


class TestOverlong:
    def rows(self):
        return [row(), row(completions=["Yes.", "Well " * 50])]

    def test_error_names_row_and_excess(self, tiny_tokenizer):
        fine = prepare(self.rows(), tiny_tokenizer)
        longest = max(map(len, fine[1]["prompt_input_ids"])) + max(map(len, fine[1]["completion_input_ids"]))
        assert len(prepare(self.rows(), tiny_tokenizer, max_length=longest)) == 2
        with pytest.raises(
            ValueError, match="train row 1: its longest prompt and response together are 1 tokens over"
        ):
            prepare(self.rows(), tiny_tokenizer, max_length=longest - 1)

    def test_drop_is_counted(self, tiny_tokenizer, caplog):
        kept = prepare(self.rows(), tiny_tokenizer, max_length=60, overlong_policy="drop")
        assert [r["completions"][1] for r in kept] == ["Well, yes."]
        assert "1 of 2 train rows are longer than max_length=60 and are left out (first: row 1)" in caplog.text

    def test_truncation_is_counted_and_cuts_responses_only(self, tiny_tokenizer, caplog):
        whole = prepare(self.rows(), tiny_tokenizer)[1]
        cut = prepare(self.rows(), tiny_tokenizer, max_length=60, overlong_policy="truncate")[1]
        assert cut["prompt_input_ids"] == whole["prompt_input_ids"]
        room = 60 - max(map(len, whole["prompt_input_ids"]))
        assert cut["completion_input_ids"] == [ids[:room] for ids in whole["completion_input_ids"]]
        assert "Responses of 1 of 2 train rows were cut to max_length=60" in caplog.text

    def test_nothing_left(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="No train row is left: all 2 are longer than max_length=3"):
            prepare(self.rows(), tiny_tokenizer, max_length=3, overlong_policy="drop")

    def test_a_prompt_that_fills_everything(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="alone fills max_length=5"):
            prepare([row()], tiny_tokenizer, max_length=5, overlong_policy="truncate")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["Be brief: eggs?"], "completions": ["Yes."]}, "at least 2 prompts"),
        ({"completions": ["Yes.", "No.", "Well."]}, "lists of equal length"),
        ({"completions": ["Yes.", "  "]}, r"`completions\[1\]` is empty"),
        ({"prompts": ["Same.", "Same."]}, "not all equal"),
        ({"prompts": ["", "Be long."]}, r"`prompts\[0\]` is empty"),
        ({"truncated": [True]}, "`truncated` has 1 entries"),
        ({"completions": [[{"role": "user", "content": "Hm"}], [{"role": "user", "content": "Ah"}]]}, "assistant"),
    ],
)
def test_unusable_rows_are_named(tiny_tokenizer, changes, message):
    bad = row(**changes)
    good = row()
    if isinstance(bad["completions"][0], list):
        good["completions"] = [[{"role": "assistant", "content": text}] for text in good["completions"]]
    if "truncated" in bad:
        good["truncated"] = [False, False]
    with pytest.raises(ValueError, match=f"train row 1: .*{message}") as caught:
        prepare([good, bad], tiny_tokenizer)
    assert "\n" not in str(caught.value)


def test_rows_the_sampler_rejected_are_left_out(tiny_tokenizer, caplog):
    rows = [row(kept=True), row(kept=False, completions=["", "Well."]), row(kept=True)]
    assert len(prepare(rows, tiny_tokenizer)) == 2
    assert "1 of 3 train rows are marked `kept: false`" in caplog.text
    with pytest.raises(ValueError, match="No train row is left"):
        prepare([row(kept=False)], tiny_tokenizer)


def test_missing_columns_are_named(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"has the columns \['prompt', 'completion'\]; SAMI needs"):
        prepare([{"prompt": "a", "completion": "b"}], tiny_tokenizer)


def test_messages_without_a_template(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prepare(sami_rows(1), tiny_tokenizer)


def test_tokenizer_without_end_of_sequence(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        prepare([row()], tiny_tokenizer)
