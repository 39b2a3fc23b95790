"""Prompts and ends as tokens, with templates that end a turn in different ways."""

import pytest
from tokenizers import processors

from trl_extensions.core.training.encoding import encode_completion, encode_prompt, end_token_id


GEMMA_LIKE = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture
def gemma_like(tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tiny_tokenizer.chat_template = GEMMA_LIKE
    return tiny_tokenizer


class TestEnd:
    def test_a_template_that_ends_turns_with_the_end_of_sequence(self, tiny_tokenizer):
        assert end_token_id(tiny_tokenizer, True) == tiny_tokenizer.eos_token_id

    def test_a_template_with_an_end_of_its_own(self, gemma_like):
        assert end_token_id(gemma_like, True) == gemma_like.convert_tokens_to_ids("<end_of_turn>")
        assert end_token_id(gemma_like, False) == gemma_like.eos_token_id

    def test_a_template_that_writes_no_end(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        assert end_token_id(tiny_tokenizer, True) == tiny_tokenizer.eos_token_id

    def test_no_end_at_all(self, tiny_tokenizer):
        tiny_tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no end-of-sequence token"):
            end_token_id(tiny_tokenizer, False)

    def test_completions(self, gemma_like):
        end = end_token_id(gemma_like, True)
        text = gemma_like("Yes.", add_special_tokens=False)["input_ids"]
        assert encode_completion(gemma_like, "Yes.", end) == [*text, end]
        assert encode_completion(gemma_like, "Yes.<end_of_turn>", end) == [*text, end]
        assert encode_completion(gemma_like, "Yes.", end, truncated=True) == text
        assert encode_completion(gemma_like, "", end, truncated=True) == [end]  # there must be a token to score


class TestPrompt:
    def test_text_gets_its_beginning_once(self, tiny_tokenizer):
        tiny_tokenizer.add_special_tokens({"bos_token": "<s>"})
        bos = tiny_tokenizer.bos_token_id
        tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        plain = encode_prompt(tiny_tokenizer, "Be brief.", "p")
        rendered = encode_prompt(tiny_tokenizer, "<s>Be brief.", "p")
        assert plain == rendered and plain.count(bos) == 1

    def test_an_end_added_by_the_tokenizer_is_taken_off(self, tiny_tokenizer):
        expected = encode_prompt(tiny_tokenizer, "Be brief.", "p")
        tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|im_end|>", special_tokens=[("<|im_end|>", tiny_tokenizer.eos_token_id)]
        )
        assert encode_prompt(tiny_tokenizer, "Be brief.", "p") == expected

    def test_chats_open_the_assistants_turn(self, tiny_tokenizer):
        ids = encode_prompt(tiny_tokenizer, [{"role": "user", "content": "Hi"}], "p")
        assert tiny_tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    def test_nothing_to_begin_with(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="prompt 3 is empty"):
            encode_prompt(tiny_tokenizer, "", "prompt 3")
