"""One rank of a test: two SGD steps of SAMI on the tiny model; rank 0 writes losses, norms, metrics and weights."""

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_dir: str, output: str, per_device: int, accumulation: int, adapter: bool) -> None:
    from tests.distributed.launch import join
    from tests.sami.conftest import sami_rows
    from trl_extensions import SAMIConfig, SAMITrainer

    join()
    args = SAMIConfig(
        output + "/run", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, max_steps=2, logging_steps=1, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", save_strategy="no", beta=0.5, per_device_eval_batch_size=2,
        gradient_checkpointing=False, data_seed=0, eval_strategy="no",
    )  # fmt: skip
    trainer = SAMITrainer(
        AutoModelForCausalLM.from_pretrained(model_dir),
        args,
        train_dataset=Dataset.from_list(sami_rows(4)),
        eval_dataset=Dataset.from_list(sami_rows(7)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if adapter else None,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        names = ("loss", "grad_norm", "mi/bound", "mi/accuracy_rows", "logps/matched", "kl", "num_tokens")
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "processes": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
            "steps": [{name: float(entry[name]) for name in names} for entry in steps],
            "evaluation": {f"eval_{name}": evaluation[f"eval_{name}"] for name in ("mi/bound", "kl", "logps/matched")},
        }
        with open(output + "/result.json", "w") as file:
            json.dump(result, file)
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save(trained, output + "/weights.pt")
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "adapter")
