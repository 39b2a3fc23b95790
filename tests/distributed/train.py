"""One rank of a test: a few SGD steps on the tiny model, case by case; rank 0 writes what came of each."""

import json
import sys
from functools import partial

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_dir: str, cases: str) -> None:
    """Carry out `cases`, a JSON list of the further arguments of `train`, in one process group."""
    from tests.distributed.launch import join, leave

    join()
    trainers = [train(model_dir, *case) for case in json.loads(cases)]
    trainers[-1].end()
    leave()


def train(model_dir: str, output: str, method: str, kind: str, per_device: int, accumulation: int):
    """One case; returns its trainer, which has to live until all ranks are through."""
    trainer_class, config_class, rows, metrics, settings = parts_of(method)
    if kind == "probe":
        settings = settings | {"linear_probe": True}
    args = config_class(
        output + "/run", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, logging_steps=1, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", save_strategy="no", per_device_eval_batch_size=2, gradient_checkpointing=False,
        data_seed=0, eval_strategy="no", **({"max_steps": 2} | settings),
    )  # fmt: skip
    trainer = trainer_class(
        model_of(method, model_dir),
        args,
        train_dataset=Dataset.from_list(rows(8 if method.startswith("WeakToStrong") else 4)),
        eval_dataset=Dataset.from_list(rows(7)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if kind == "adapter" else None,
        **more_of(method, model_dir),
    )
    trainer.train()
    evaluation = trainer.evaluate()
    losses = []
    for size in (8, 3, 1):  # 7 rows: the last batch is ragged, in one process and in two
        trainer.args.per_device_eval_batch_size = size
        trainer._eval_dataloaders = {}
        losses.append(trainer.evaluate()["eval_loss"])
    tested = trainer.predict(trainer.eval_dataset).metrics.get("test_loss", losses[0])
    again = trainer.evaluate()  # of which a prediction has left nothing behind
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        names = ("loss", "grad_norm", *({"num_tokens"} & steps[0].keys()), *metrics)
        result = {
            "shared": getattr(trainer.data_collator, "share_prefix", None),
            "processes": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
            "steps": [{name: float(entry[name]) for name in names} for entry in steps],
            "evaluation": {f"eval_{name}": evaluation[f"eval_{name}"] for name in ("loss", *metrics)},
            "again": {f"eval_{name}": again[f"eval_{name}"] for name in ("loss", *metrics)},
            "losses": [*losses, tested],
        }
        with open(output + "/result.json", "w") as file:
            json.dump(result, file)
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save(trained, output + "/weights.pt")
    return trainer


def model_of(method: str, model_dir: str):
    """The tiny model as a method trains it."""
    from tests.weak_to_strong.conftest import make_classifier

    classes = {"WeakToStrong": 3, "WeakToStrongReward": 1}.get(method.partition(":")[0])
    return make_classifier(classes=classes) if classes else AutoModelForCausalLM.from_pretrained(model_dir)


def more_of(method: str, model_dir: str) -> dict:
    """What else a method's trainer is given."""
    from tests.conftest import make_tiny_model

    if method != "WeakToStrongSFT:":
        return {}
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return {"weak_model": make_tiny_model(len(tokenizer), seed=1), "weak_processing_class": tokenizer}


def pair_rows(number: int) -> list[dict]:
    from tests.weak_to_strong.conftest import w2s_rows

    rows = w2s_rows(number)
    return [
        {
            "chosen": row["text"],
            "rejected": row["text"][::-1],
            "preference": row["soft_labels"][0],
            "weight": 1 + i % 2,
        }
        for i, row in enumerate(rows)
    ]


def shared_rows(number: int) -> list[dict]:
    """Rows of TNT of which two at a time have one prompt."""
    from tests.tnt.conftest import tnt_rows

    rows = tnt_rows(number)
    return [row | {"prompt": rows[i - i % 2]["prompt"]} for i, row in enumerate(rows)]


def completion_rows(number: int) -> list[dict]:
    from tests.weak_to_strong.conftest import w2s_rows

    return [
        {"prompt": "Say: ", "completion": row["text"], "weight": 0.5 + i} for i, row in enumerate(w2s_rows(number))
    ]


def parts_of(method: str):
    """Trainer, configuration, rows, metrics to compare and further settings of a method, or of `method:loss`."""
    import trl_extensions
    from tests.sami.conftest import sami_rows
    from tests.tnt.conftest import tnt_rows
    from tests.weak_to_strong.conftest import w2s_rows

    method, _, loss = method.partition(":")
    rows, metrics, settings = {
        "SAMI": (sami_rows, ("mi/bound", "mi/accuracy_rows", "logps/matched", "kl"), {"beta": 0.5}),
        "TNT": (
            shared_rows if loss == "shared" else tnt_rows,
            ("prob/negative", "kl/negative", "kl/kept", "entropy", "tokens/negative"),
            {"alpha": 3.0, "share_prefix": loss == "shared"},
        ),
        "WeakToStrong": (
            partial(w2s_rows, classes=3),
            ("agreement", "confidence", "loss_coef"),
            {"loss_type": loss, "loss_warmup_ratio": 0.0, "max_steps": 3},
        ),
        "WeakToStrongReward": (
            pair_rows,
            ("agreement",),
            {"loss_type": loss, "loss_warmup_ratio": 0.0, "max_steps": 3},
        ),
        "WeakToStrongSFT": (completion_rows, () if loss == "text" else ("kl/weak",), {}),
    }[method]
    trainer, config = (getattr(trl_extensions, f"{method}{part}") for part in ("Trainer", "Config"))
    return trainer, config, rows, metrics, settings


if __name__ == "__main__":
    main(*sys.argv[1:])
