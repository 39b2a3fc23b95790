"""Models that lack a padding or an end token, or bring their first token twice."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from trl import ModelConfig

from trl_extensions import (
    WeakToStrongConfig,
    WeakToStrongRewardConfig,
    WeakToStrongRewardTrainer,
    WeakToStrongSFTConfig,
    WeakToStrongSFTTrainer,
    WeakToStrongTrainer,
)
from trl_extensions.weak_to_strong.data.examples import Example, Pair
from trl_extensions.weak_to_strong.data.prepare import encode_text, end_token, prepare_rows
from trl_extensions.weak_to_strong.labels.transformer_learner import TransformerLearner, predict_saved
from trl_extensions.weak_to_strong.trainers.features import FeatureStore


TEXTS = ["The quick brown fox", "Lazy", "A dog sleeps.", "猫が眠る", "おはよう", "0123456789"]
QUIET = {
    "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    "per_device_train_batch_size": 6, "gradient_checkpointing": False,
}  # fmt: skip


def byte_level(**special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<unk>", "</s>", "<s>"]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module", params=["gpt1", "llama"])
def model_dir(request, tmp_path_factory):
    """GPT-1, which has neither a padding nor an end token, or a Llama, which has no padding token."""
    import torch
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    from tests.conftest import make_tiny_model

    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "gpt1":
        tokenizer = byte_level(unk_token="<unk>")
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(tokenizer), **sizes))
    else:
        tokenizer = byte_level(eos_token="</s>")
        model = make_tiny_model(len(tokenizer), pad_token_id=None, bos_token_id=None, eos_token_id=1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def alone_and_together(predict, rows):
    """Padding changes nothing: each row asked by itself, and all of them at once."""
    together = predict(rows)
    assert np.allclose(together, np.concatenate([predict([row]) for row in rows]), atol=1e-5)
    assert np.ptp(together[:, 0]) > 1e-4  # of rows that are told apart at all


def test_classifier(model_dir, tmp_path):
    rows = Dataset.from_list([{"text": text, "soft_labels": [0.25, 0.75]} for text in TEXTS])
    config = WeakToStrongConfig(output_dir=str(tmp_path / "out"), **QUIET)
    trainer = WeakToStrongTrainer(model_dir, config, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    ask = lambda rows: predict_saved(str(tmp_path / "model"), rows, 2, config, ModelConfig())  # noqa: E731
    alone_and_together(ask, [Example(text, text, 0) for text in TEXTS])


def test_reward_model(model_dir, tmp_path):
    rows = Dataset.from_list([{"chosen": text, "rejected": text + " no", "preference": 0.75} for text in TEXTS])
    config = WeakToStrongRewardConfig(output_dir=str(tmp_path / "out"), **QUIET)
    trainer = WeakToStrongRewardTrainer(model_dir, config, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    ask = lambda rows: predict_saved(str(tmp_path / "model"), rows, 2, config, ModelConfig())  # noqa: E731
    alone_and_together(ask, [Pair(text, text, text + " 猫 a", 0) for text in TEXTS])


@pytest.mark.parametrize("teacher", [False, True])
def test_language_model_learns_to_end(model_dir, tmp_path, teacher):
    rows = Dataset.from_list([{"prompt": text, "completion": " yes はい"} for text in TEXTS])
    config = WeakToStrongSFTConfig(output_dir=str(tmp_path / "out"), **QUIET)
    weak = {"weak_model": model_dir} if teacher else {}
    trainer = WeakToStrongSFTTrainer(model_dir, config, train_dataset=rows, **weak)
    assert config.eos_token is None  # what the caller gave is left alone
    tokenizer = trainer.processing_class
    end = tokenizer.convert_tokens_to_ids(end_token(tokenizer))
    assert {row[-1] for row in trainer.train_dataset["input_ids"]} == {end}
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    from trl_extensions.core.generation import GenerationParams, TransformersEngine

    engine = TransformersEngine(str(tmp_path / "model"))
    assert engine.tokenizer.eos_token_id == end
    assert len(dict(engine.generate(TEXTS[:3], GenerationParams(4, temperature=0.0)))) == 3


@pytest.mark.parametrize("probe", [False, True])
def test_learner(model_dir, tmp_path, probe):
    config = WeakToStrongConfig(output_dir=str(tmp_path / "out"), linear_probe=probe, **QUIET)
    store = FeatureStore(Path(tmp_path) / "states.npz") if probe else None
    learner = TransformerLearner(model_dir, config, ModelConfig(model_name_or_path=model_dir), ["a", "b"], store)
    rows = [Example(text, text, place % 2) for place, text in enumerate(TEXTS)]
    learner.fit(rows, np.full((len(rows), 2), 0.5), seed=0, folder=tmp_path / "fit")
    alone_and_together(learner.predict, rows)


def test_without_an_unknown_token_either_it_says_what_to_set():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"set `tokenizer\.eos_token`"):
        end_token(tokenizer)


@pytest.mark.parametrize("text", ["hello", "こんにちは"])
def test_a_rendered_text_has_one_first_token(text):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    first, last = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    template = {"single": "<s> $A </s>", "special_tokens": [("<s>", first), ("</s>", last)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**template)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = Dataset.from_list([{"text": "<s>" + text, "label": 0}, {"text": text, "label": 1}])
    assert list(prepare_rows(rows, tokenizer, num_labels=2)["input_ids"]) == [[first, *own, last]] * 2
    # Cut to a limit, what ends a text stays
    for written in (text, "<s>" + text):
        assert encode_text(tokenizer, written, len(own) + 1) == ([first, *own[:-1], last], True)
        assert encode_text(tokenizer, written, len(own) + 2) == ([first, *own, last], False)
