"""A step on a 4-bit base has the gradients of the same step on its weights written out, whatever ran before it."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import trl_extensions
from tests.conftest import make_tiny_model
from tests.sami.conftest import sami_rows
from tests.tnt.conftest import tnt_rows


bitsandbytes = pytest.importorskip("bitsandbytes")

TEXTS = [{"text": f"Text number {i} of a few.", "soft_labels": [i / 4, 1 - i / 4]} for i in range(4)]
PAIRS = [{"chosen": f"Yes, {i}.", "rejected": f"No, not {i} times.", "preference": 0.5 + i / 8} for i in range(4)]
ANSWERS = [{"prompt": f"Question {i}?", "completion": f" Answer {i}, of some length."} for i in range(4)]
TRAINERS = {
    "SAMI": ("SAMITrainer", "SAMIConfig", sami_rows(4), {"beta": 0.1}),
    "TNT": ("TNTTrainer", "TNTConfig", tnt_rows()[:4], {}),
    "SFT": ("WeakToStrongSFTTrainer", "WeakToStrongSFTConfig", ANSWERS, {}),
    "tokens": ("WeakToStrongSFTTrainer", "WeakToStrongSFTConfig", ANSWERS, {}),
    "classes": ("WeakToStrongTrainer", "WeakToStrongConfig", TEXTS, {}),
    "reward": ("WeakToStrongRewardTrainer", "WeakToStrongRewardConfig", PAIRS, {}),
}


def gradients(kind: str, model, tokenizer, folder) -> dict[str, torch.Tensor]:
    """Of the adapter, in float32, in a step that follows an evaluation."""
    trainer_name, config_name, rows, settings = TRAINERS[kind]
    is_classifier = kind in ("classes", "reward")
    config = getattr(trl_extensions, config_name)(
        str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=4, **settings,
    )  # fmt: skip
    weak = {"weak_model": make_tiny_model(len(tokenizer), seed=3), "weak_processing_class": tokenizer}
    torch.manual_seed(0)
    trainer = getattr(trl_extensions, trainer_name)(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        # Random from the start: of an adapter that is zero, half of the gradients are
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM, r=4, lora_dropout=0.0,
            init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"],
        ),
        **(weak if kind == "tokens" else {}),
    )  # fmt: skip
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()  # which those on a 4-bit base are made to be
    trainer.evaluate()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def quantized_and_written_out(kind: str, vocabulary: int, folder):
    """A tiny model in 4 bits, and one in float32 with the same weights."""
    auto, options = AutoModelForCausalLM, {}
    if kind in ("classes", "reward"):
        auto, options = AutoModelForSequenceClassification, {"num_labels": 2 if kind == "classes" else 1}
    make_tiny_model(vocabulary, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    auto.from_pretrained(folder, **options).save_pretrained(folder)  # a head is random
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized, plain = auto.from_pretrained(folder, quantization_config=quantization), auto.from_pretrained(folder)
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    return quantized, plain


@pytest.mark.parametrize("kind", TRAINERS)
def test_gradients_are_those_of_the_weights_written_out(kind, tiny_tokenizer, tmp_path):
    quantized, plain = quantized_and_written_out(kind, len(tiny_tokenizer), tmp_path / "model")
    expected = gradients(kind, plain, tiny_tokenizer, tmp_path)
    found = gradients(kind, quantized, tiny_tokenizer, tmp_path)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() < 1e-3 * gradient.norm(), name


def test_weights_laid_out_for_inference_are_refused(tiny_tokenizer, tmp_path):
    quantized, _ = quantized_and_written_out("SAMI", len(tiny_tokenizer), tmp_path / "model")
    with torch.no_grad():
        quantized.eval()(input_ids=torch.arange(8)[None])
    if not any(
        getattr(p.quant_state, "packing_format_for_cpu", False)
        for p in quantized.parameters()
        if hasattr(p, "quant_state")
    ):
        pytest.skip("this processor has no avx512_bf16")
    with pytest.raises(ValueError, match="ran in eval mode before"):
        gradients("SAMI", quantized, tiny_tokenizer, tmp_path)
