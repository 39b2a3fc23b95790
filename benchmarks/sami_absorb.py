"""A constitution absorbed: obedience without it before and after, by learning rate and epochs.

    python -m benchmarks.sami_absorb --prompts queries.jsonl --principles principles.yaml \
        --points 1e-4:1 3e-4:1 3e-4:3 --output runs/sami_absorb --jobs 4

`--model` (the original, or the `model` folder of a SAMI run) answers training queries under every principle's
definition; every point `learning_rate:epochs` trains a fresh LoRA adapter, asked the bare query, towards that, and
answers the same held-out queries, bare. Beside it the model before, without and with the constitution. Points are kept
in `points.jsonl` and not made again.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.tnt_tradeoff import in_processes, load, process
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.sampling import load_outputs
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.inputs import Query, load_queries
from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl
from trl_extensions.core.runs.run import check_resume
from trl_extensions.sami.absorb import AbsorbTrainer, absorb_rows, desired_obedience, sample_bare, sample_desired
from trl_extensions.sami.config import SAMIConfig
from trl_extensions.sami.data import TRAINING_TEMPLATE
from trl_extensions.sami.principles import load_principles
from trl_extensions.sami.sampling import ResponseFilters


def main() -> None:
    args = parse()
    path = args.output / "points.jsonl"
    settings = {name: value for name, value in vars(args).items() if name not in ("points", "output", "jobs")}
    check_resume(args.output / "settings.json", settings, made=str(path), started=path.exists())
    done = {row["point"] for row in read_jsonl(path)} if path.exists() else set()
    if not path.exists():
        sample_before(args)
    with JsonlWriter(path) as writer:
        for result in in_processes(measure, [point for point in args.points if point not in done], prepare, args):
            writer.append(result)
            print(json.dumps(result), flush=True)
    rows = [summary(args, "before, without", "bare.jsonl"), summary(args, "before, with it", "prompted.jsonl")]
    rows += sorted(read_jsonl(path), key=lambda row: row["point"])
    names = list(rows[0]["obedience"])
    print(
        f"| lr:epochs | {' | '.join(names)} | tokens | KL, first and last step |\n" + "| --- " * (len(names) + 3) + "|"
    )
    for row in rows:
        obeyed = [row["obedience"][name]["definition"]["obeyed"] for name in names]
        cells = " | ".join("{value:.0%} ({low:.0%} to {high:.0%})".format_map(own) for own in obeyed)
        kl = " to ".join(f"{own:.3f}" for own in row.get("kl", ()))
        print(f"| {row['point']} | {cells} | {row['length']:.0f} | {kl} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--principles", required=True)
    parser.add_argument("--points", nargs="+", required=True, help="learning_rate:epochs")
    parser.add_argument("--num_prompts", type=int, default=600, help="training queries")
    parser.add_argument("--num_eval_prompts", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the training responses; held-out are greedy"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--generation_tokens", type=int, default=65536, help="padded tokens in a batch that samples")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, each in a process")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def queries_of(args) -> tuple[list[Query], list[Query]]:
    queries = load_queries(args.prompts)
    random.Random(args.seed).shuffle(queries)
    held_out = args.num_eval_prompts
    return queries[held_out : held_out + args.num_prompts], queries[:held_out]


def sample_before(args) -> None:
    """Training responses, and held-out ones with and without the constitution, of the model as it is."""
    (model, tokenizer), (training, held_out) = load(args), queries_of(args)
    engine = TransformersEngine(model, tokenizer, batch_tokens=args.generation_tokens)
    principles, how = load_principles(args.principles), {"conversational": tokenizer.chat_template is not None}
    desired, greedy = {"template": TRAINING_TEMPLATE, "seed": args.seed} | how, GenerationParams(args.max_new_tokens)
    params = GenerationParams(args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    sample_desired(engine, training, principles, params, args.output / "samples.jsonl", **desired)
    sample_desired(engine, held_out, principles, greedy, args.output / "prompted.jsonl", **desired)
    sample_bare(engine, held_out, greedy, args.output / "bare.jsonl", **how)


def prepare(args) -> None:
    model, tokenizer = load(args)
    process.update(args=args, model=model, tokenizer=tokenizer)


def measure(point: str) -> dict[str, Any]:
    """Absorb with a learning rate for some epochs, and answer the held-out queries without a constitution."""
    args, model, tokenizer = process["args"], process["model"], process["tokenizer"]
    learning_rate, epochs = map(float, point.split(":"))
    training, held_out = queries_of(args)
    how = {"conversational": tokenizer.chat_template is not None}
    rows = absorb_rows(
        load_outputs(args.output / "samples.jsonl"), training, load_principles(args.principles),
        template=TRAINING_TEMPLATE, seed=args.seed, filters=ResponseFilters(drop_truncated=False), **how,
    )  # fmt: skip
    config = SAMIConfig(
        str(args.output / "train"), learning_rate=learning_rate, num_train_epochs=epochs, report_to="none", bf16=False,
        per_device_train_batch_size=args.batch, lr_scheduler_type="cosine", warmup_steps=3, logging_steps=1,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", gradient_checkpointing=False, seed=args.seed,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = AbsorbTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    engine = TransformersEngine(trainer.model, tokenizer, batch_tokens=args.generation_tokens)
    name = f"{point.replace(':', '_')}.jsonl"
    (args.output / name).unlink(missing_ok=True)  # of a start that was killed before the point was written
    sample_bare(engine, held_out, GenerationParams(args.max_new_tokens), args.output / name, **how)
    process["model"] = trainer.model.unload()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return summary(args, point, name) | {"kl": [losses[0], losses[-1]], "steps": len(losses), "rows": len(rows)}


def summary(args, point: str, name: str) -> dict[str, Any]:
    held_out, principles = queries_of(args)[1], load_principles(args.principles)
    outputs, before = (load_outputs(args.output / own) for own in (name, "bare.jsonl"))
    obeyed = desired_obedience(outputs, before, held_out, principles)
    return {"point": point, "obedience": obeyed, "length": fmean(row["num_tokens"] for row in outputs)}


if __name__ == "__main__":
    main()
