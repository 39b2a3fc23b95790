"""One rank of a test: two SGD steps on the tiny model; rank 0 writes losses, norms, metrics and weights."""

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(method: str, model_dir: str, output: str, per_device: int, accumulation: int, adapter: bool) -> None:
    from tests.distributed.launch import join

    trainer_class, config_class, rows, metrics, settings = parts_of(method)
    join()
    args = config_class(
        output + "/run", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, max_steps=2, logging_steps=1, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", save_strategy="no", per_device_eval_batch_size=2, gradient_checkpointing=False,
        data_seed=0, eval_strategy="no", **settings,
    )  # fmt: skip
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(model_dir),
        args,
        train_dataset=Dataset.from_list(rows(4)),
        eval_dataset=Dataset.from_list(rows(7)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if adapter else None,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        names = ("loss", "grad_norm", "num_tokens", *metrics)
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "processes": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
            "steps": [{name: float(entry[name]) for name in names} for entry in steps],
            "evaluation": {f"eval_{name}": evaluation[f"eval_{name}"] for name in metrics},
        }
        with open(output + "/result.json", "w") as file:
            json.dump(result, file)
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save(trained, output + "/weights.pt")
    trainer.end()


def parts_of(method: str):
    """Trainer, configuration, rows, metrics to compare and further settings of a method."""
    import trl_extensions
    from tests.sami.conftest import sami_rows
    from tests.tnt.conftest import tnt_rows

    rows, metrics, settings = {
        "SAMI": (sami_rows, ("mi/bound", "mi/accuracy_rows", "logps/matched", "kl"), {"beta": 0.5}),
        "TNT": (tnt_rows, ("prob/negative", "kl/negative", "kl/kept", "entropy", "tokens/negative"), {"alpha": 3.0}),
    }[method]
    trainer, config = (getattr(trl_extensions, f"{method}{part}") for part in ("Trainer", "Config"))
    return trainer, config, rows, metrics, settings


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "adapter")
