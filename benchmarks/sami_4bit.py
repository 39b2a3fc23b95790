"""QLoRA beside LoRA: the same rows and steps on a 4-bit (nf4) and a float32 base, then the 4-bit adapter reloaded.

python benchmarks/sami_4bit.py runs/benchmark-sami/round_1/samples.jsonl runs/benchmark-4bit [steps] [queries a step]
"""

import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_extensions import SAMIConfig, SAMITrainer
from trl_extensions.embedded import ensure_embedded_model
from trl_extensions.sami.data import load_rows, to_dataset


def load(four_bit: bool):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        ensure_embedded_model(), dtype=torch.float32, quantization_config=quantization if four_bit else None
    )


def main(samples: str, output: str, steps: int = 3, queries: int = 4) -> None:
    rows = load_rows(samples)
    held_out, training = to_dataset(rows[:6]), to_dataset(rows[6 : 6 + steps * queries])
    tokenizer = AutoTokenizer.from_pretrained(ensure_embedded_model())

    def trainer(model, name, peft_config=None):
        args = SAMIConfig(
            f"{output}/{name}", max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=queries,
            learning_rate=3e-4, lr_scheduler_type="constant", logging_steps=1, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", gradient_checkpointing=False, log_kl=False,
        )  # fmt: skip
        return SAMITrainer(
            model, args, train_dataset=training, eval_dataset=held_out, processing_class=tokenizer,
            peft_config=peft_config,
        )  # fmt: skip

    print("| base | loss by step | held-out loss after | bound after | seconds |\n| --- | --- | --- | --- | --- |")
    for name, four_bit in (("float32", False), ("nf4", True)):
        adapted = trainer(load(four_bit), name, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        start = time.perf_counter()
        adapted.train()
        seconds = time.perf_counter() - start
        losses = [f"{float(entry['loss']):.4f}" for entry in adapted.state.log_history if "loss" in entry]
        after = adapted.evaluate()
        scores = f"{after['eval_loss']:.4f} | {after['eval_mi/bound']:.4f}"
        print(f"| {name} | {' '.join(losses)} | {scores} | {seconds:.0f} |")
        adapted.save_model(f"{output}/{name}/adapter")
    reloaded = trainer(PeftModel.from_pretrained(load(True), Path(output) / "nf4" / "adapter"), "reloaded").evaluate()
    print(f"| nf4, adapter reloaded | | {reloaded['eval_loss']:.4f} | {reloaded['eval_mi/bound']:.4f} | |")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
