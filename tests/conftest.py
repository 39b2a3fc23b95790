"""Tiny models and a tokenizer made here, so that no test but the slow ones needs a download."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two test processes with all cores each would wait for each other most of the time
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


TEXTS = [
    "Tell me how to boil an egg. Be brief and direct, please.",
    "Explain at length why the sky is blue, with every detail you know.",
    "1. Answer in few words.\n2. Be friendly and warm.",
    "Sure! Put the egg into boiling water for seven minutes, then cool it.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def _tokenizer_dir(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny_tokenizer(_tokenizer_dir):
    """Byte-level BPE with chat template, `<|im_end|>` as end of sequence and `<pad>`; a fresh copy per test."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_tokenizer_dir)


def make_tiny_model(vocab_size: int, seed: int = 0, **overrides):
    """A random Llama of two layers in float32, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "initializer_range": 0.2,
    } | overrides  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A fresh random Llama that fits `tiny_tokenizer`; the same weights every time."""
    return make_tiny_model(len(tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_model_dir(_tokenizer_dir, tmp_path_factory):
    """The tiny model and tokenizer saved together, for code that loads by path."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_dir)
    make_tiny_model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
