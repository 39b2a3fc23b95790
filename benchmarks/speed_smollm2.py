"""Shared prompts on SmolLM2-135M: a step of `SAMITrainer` and of `TNTTrainer` with and without, LoRA.

    python -m benchmarks.speed_smollm2 --data ../shared/data --rounds 5

SAMI: two queries of `sami_hh/helpful_pairs_iter1`, two constitutions, with KL to the original. TNT: one post of
`sami_tldr/eval_responses` with four summaries, their first word unwanted. Both trainers of a method have the same
weights and get the same rows; a step is loss and backward, as the training loop calls them. Steps alternate, and a
ratio is taken within a round. Loss and gradient of the two are compared too.
"""

import argparse
import gzip
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed.measure import timed
from trl_extensions import SAMIConfig, SAMITrainer, TNTConfig, TNTTrainer
from trl_extensions.core.modeling.head import last_hidden_states
from trl_extensions.embedded import resolve_model_name


MODEL = "embedded:smollm2-135m-instruct"
LORA = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0}
PER_PROMPT = 4  # summaries of a post


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds sami_hh and sami_tldr")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/speed_smollm2"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = resolve_model_name(MODEL)
    print("| step | tokens, apart and shared | apart / shared, CPU time | losses | gradients differ by |")
    print("| --- | --- | --- | --- | --- |")
    for name, build, rows in (
        ("SAMI", sami_trainer, sami_rows(args.data)),
        ("TNT", tnt_trainer, tnt_rows(args.data)),
    ):
        trainers = {share: build(path, rows, share, args.output) for share in (False, True)}
        print(f"| {name} | {compare(trainers, args.rounds)} |", flush=True)
    print(f"\nforward of the original, no_grad / inference_mode: {inference_mode(path, args.rounds)}")


def compare(trainers: dict[bool, SAMITrainer | TNTTrainer], rounds: int) -> str:
    steps, tokens = {}, {}
    for share, trainer in trainers.items():
        batch = trainer.data_collator(list(trainer.train_dataset))
        tokens[share] = int(batch["attention_mask"].sum())
        steps[share] = step_of(trainer, batch)
    (loss, gradient), (shared_loss, shared_gradient) = steps[False](), steps[True]()
    ratios = []
    for number in range(rounds):
        order = (False, True) if number % 2 else (True, False)
        seconds = {share: timed(steps[share])["cpu"] for share in order}
        ratios.append(seconds[False] / seconds[True])
    losses = f"{loss.item():.6f}, {shared_loss.item():.6f}"
    difference = ((shared_gradient - gradient).norm() / gradient.norm()).item()
    return f"{tokens[False]}, {tokens[True]} | {spread(ratios)} | {losses} | {difference:.1e}"


def step_of(trainer: SAMITrainer | TNTTrainer, batch: dict[str, torch.Tensor]) -> Callable:
    """Loss and gradient of a batch, as the training loop takes them."""
    model = trainer.model.train()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return loss.detach(), torch.cat(grads)

    return step


def inference_mode(path: str, rounds: int) -> str:
    model, ratios = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval(), []
    ids = torch.arange(4 * 256).view(4, 256)
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}

    def forward(context: Callable) -> None:
        with context():
            last_hidden_states(model, input_ids=ids)

    forward(torch.no_grad)
    for number in range(rounds):
        order = list(contexts) if number % 2 else list(contexts)[::-1]
        seconds = {name: timed(lambda name=name: forward(contexts[name]))["cpu"] for name in order}
        ratios.append(seconds["no_grad"] / seconds["inference_mode"])
    return spread(ratios)


def sami_trainer(path: str, rows: Dataset, share: bool, output: Path) -> SAMITrainer:
    args = SAMIConfig(**settings(output), share_prefix=share, log_kl=True, max_length=1024)
    return SAMITrainer(**inputs_of(path), args=args, train_dataset=rows)


def tnt_trainer(path: str, rows: Dataset, share: bool, output: Path) -> TNTTrainer:
    args = TNTConfig(**settings(output), share_prefix=share, max_length=2048)
    return TNTTrainer(**inputs_of(path), args=args, train_dataset=rows)


def settings(output: Path) -> dict:
    return {
        "output_dir": str(output), "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False,
    }  # fmt: skip


def inputs_of(path: str) -> dict:
    torch.manual_seed(0)  # of the adapter
    return {
        "model": AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        "processing_class": AutoTokenizer.from_pretrained(path),
        "peft_config": LoraConfig(**LORA),
    }


def sami_rows(data: Path, number: int = 2) -> Dataset:
    rows = [row for row in read(data / "sami_hh" / "helpful_pairs_iter1.jsonl") if not any(row["echo"])][:number]
    return Dataset.from_list(
        [
            {"query": row["query"], "constitutions": row["constitutions"], "completions": row["responses"]}
            for row in rows
        ]
    )


def tnt_rows(data: Path, number: int = 1) -> Dataset:
    rows = []
    for row in read(data / "sami_tldr" / "eval_responses.jsonl")[:number]:
        for text in sorted(set(row["responses"].values()), key=len)[:PER_PROMPT]:
            prompt = [{"role": "user", "content": f"Summarize this post:\n\n{row['post']}"}]
            completion = [{"role": "assistant", "content": text.strip()}]
            span = [0, len(text.split()[0])]
            rows.append({"prompt": prompt, "completion": completion, "negative_spans": [span]})
    return Dataset.from_list(rows)


def read(path: Path) -> list[dict]:
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        with gzip.open(f"{path}.gz", "rt", encoding="utf-8") as file:
            lines = file.readlines()
    return [json.loads(line) for line in lines]


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)})"


if __name__ == "__main__":
    main()
