"""SAMI on the embedded SmolLM2-135M-Instruct."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_extensions import SAMIConfig, SAMITrainer
from trl_extensions.sami.data import TRAINING_TEMPLATE, render


QUESTIONS = {
    "How do I keep bread fresh?": (
        "Keep it in a paper bag at room temperature.",
        "Bread stays fresh longest when it is kept away from air and moisture. Put it into a paper bag or a box, and "
        "leave it at room temperature. Slice only what you need. Freeze the rest.",
    ),
    "Why is the sky blue?": (
        "Air scatters blue light more than red light.",
        "Sunlight holds all colours. As it passes through the air, small molecules scatter the short blue waves far "
        "more than the long red ones. We see that scattered light from everywhere. So the sky looks blue.",
    ),
}
CONSTITUTIONS = ("1. Answer in one short sentence.", "1. Answer in four or five sentences.")


@pytest.mark.slow
def test_three_steps_teach_the_real_model_to_tell_constitutions_apart(tmp_path):
    from trl_extensions.embedded import ensure_embedded_model

    rows = Dataset.from_list([
        {
            "prompts": [
                render(TRAINING_TEMPLATE, query=question, constitution=text, conversational=True)
                for text in CONSTITUTIONS
            ],
            "completions": [[{"role": "assistant", "content": text}] for text in answers],
        }
        for question, answers in QUESTIONS.items()
    ])  # fmt: skip
    torch.manual_seed(0)
    args = SAMIConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2, max_steps=3,
        learning_rate=3e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SAMITrainer(
        str(ensure_embedded_model()),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # The untrained model already finds the right constitution a little likelier, and is its own original
    assert before["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert after["eval_mi/bound"] > before["eval_mi/bound"] + 0.02
    assert 0 < after["eval_kl"] < 0.5
