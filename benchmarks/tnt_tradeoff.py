"""The trade-off of targeted negative training: how much of a phrase goes, against how much else stays, by variant.

    python benchmarks/tnt_tradeoff.py --annotated runs/tnt/annotated.jsonl --phrases "here's" "here is" "here are" \
        --points ff:1 ff:5 rr:1 ul:1 sft --output runs/tnt_tradeoff

Every point trains a fresh LoRA adapter on the same rows of the annotated outputs (`trl-ext tnt annotate`), in the same
order, and answers the same held-out prompts greedily. `sft` is plain SFT (TRL's) on the clean rows alone, with as many
steps. Points are appended to `points.jsonl` as they are made; a point that is there already is not made again.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from trl_extensions import TNTConfig, TNTTrainer
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.sampling import completion_text
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl
from trl_extensions.core.runs.run import check_resume
from trl_extensions.embedded import resolve_model_name
from trl_extensions.tnt.annotate import merge_spans
from trl_extensions.tnt.annotate.phrases import PhraseAnnotator
from trl_extensions.tnt.data import prepare_rows
from trl_extensions.tnt.evaluation import preservation, unwanted
from trl_extensions.tnt.scores import score_rows


class CachingTrainer(TNTTrainer):
    """Every point meets the same batches, and the original's states of a batch never change: computed once."""

    states: ClassVar[dict] = {}

    def _reference_states(self, model, states_of, inputs):
        key = inputs["input_ids"].numpy().tobytes()
        if key not in self.states:
            self.states[key] = super()._reference_states(model, states_of, inputs)
        return self.states[key]


def main() -> None:
    args = parse()
    train, held_out = split(read_jsonl(args.annotated), args)
    print(f"{len(train)} rows to train on, {sum(bool(row['negative_spans']) for row in train)} with spans; "
          f"{len(held_out)} held-out prompts", flush=True)  # fmt: skip
    path = resolve_model_name(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    points = args.output / "points.jsonl"
    settings = {name: value for name, value in vars(args).items() if name not in ("points", "output", "save")}
    check_resume(args.output / "settings.json", settings, made=str(points), started=points.exists())
    done = {row["point"] for row in read_jsonl(points)} if points.exists() else set()
    with JsonlWriter(points) as writer:
        for point in args.points:
            if point not in done:
                model, result = measure(point, model, tokenizer, train, held_out, args)
                writer.append(result)
                print(json.dumps(result), flush=True)
    rows = read_jsonl(points)
    reduced = [row for row in rows if row["reduction"] is not None]
    draw_tradeoff(reduced, args.output / "tradeoff.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotated", required=True)
    parser.add_argument("--phrases", nargs="+", required=True)
    parser.add_argument("--points", nargs="+", required=True, help="variant:alpha, or sft")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--num_eval_prompts", type=int, default=200)
    parser.add_argument("--eval_limit", type=int, help="use only this many of the held-out prompts")
    parser.add_argument("--score_limit", type=int, default=40, help="original outputs to measure KL on")
    parser.add_argument("--max_rows", type=int, help="use only this many rows, clean and flagged in proportion")
    parser.add_argument("--clean_ratio", type=float, default=2.0, help="clean rows per row with a span")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--adam_epsilon", type=float, default=1e-8)
    parser.add_argument("--lora_target_modules", default="all-linear", help="or a regular expression")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="keep the adapters")
    return parser.parse_args()


def split(rows: list[dict], args) -> tuple[list[dict], list[dict]]:
    """Training rows, and the original's greedy rows of held-out prompts."""
    prompts = sorted({row["index"] for row in rows})
    random.Random(0).shuffle(prompts)
    held_out = set(prompts[: args.num_eval_prompts])
    train = [row for row in rows if row["index"] not in held_out and completion_text(row["completion"]).strip()]
    flagged = [row for row in train if row["negative_spans"]]
    clean = [row for row in train if not row["negative_spans"]]
    random.Random(1).shuffle(clean)
    random.Random(1).shuffle(flagged)
    if args.max_rows:
        flagged = flagged[: round(args.max_rows / (1 + args.clean_ratio))]
    train = flagged + clean[: round(args.clean_ratio * len(flagged))]
    random.Random(2).shuffle(train)
    greedy = sorted((row for row in rows if row["index"] in held_out and row["sample"] == 0), key=lambda r: r["id"])
    return train, greedy[: args.eval_limit]


def measure(point: str, model, tokenizer, train: list[dict], held_out: list[dict], args):
    """Train one point and answer the held-out prompts; returns the bare model and the result."""
    variant, _, alpha = point.partition(":")
    alpha = float(alpha or 1)
    start = time.perf_counter()
    trainer = build(variant, alpha, model, tokenizer, train, args)
    trainer.train()
    seconds = time.perf_counter() - start
    if args.save:
        trainer.save_model(str(args.output / point.replace(":", "_")))
    patched = trainer.model
    outputs = answer(patched, tokenizer, held_out, args)
    texts = [completion_text(row["completion"]) for row in outputs]
    found = PhraseAnnotator(args.phrases).annotate(texts, [row["prompt"] for row in outputs])
    for row, spans in zip(outputs, found, strict=True):
        row["negative_spans"] = merge_spans(spans)
    before, after, kept = unwanted(held_out), unwanted(outputs), preservation(held_out, outputs)
    scored = held_out[: args.score_limit]
    scores = score_rows(patched, tokenizer, scored)
    clean = [score for score, row in zip(scores, scored, strict=True) if not row["negative_spans"]]
    share = before["share"]["value"]
    result = {
        "point": point, "variant": variant, "alpha": alpha,
        "reduction": 1 - after["share"]["value"] / share if share else None,
        "preservation": kept["clean"]["exact_match"]["value"],
        "preservation_interval": [kept["clean"]["exact_match"][bound] for bound in ("low", "high")],
        "before": before, "after": after, "preserved": kept,
        "kl_target": sum(s["kl_target"] for s in scores)
        / sum(s["kept_tokens"] + s["negative_tokens"] for s in scores),
        "kl_clean": sum(s["kl_kept"] for s in clean) / sum(s["kept_tokens"] for s in clean),
        "prob_negative": sum(s["prob_negative"] for s in scores) / max(1, sum(s["negative_tokens"] for s in scores)),
        "steps": trainer.state.global_step, "training_seconds": seconds,
    }  # fmt: skip
    saved = args.output / "outputs" / f"{point.replace(':', '_')}.jsonl"
    saved.unlink(missing_ok=True)  # of a start that was killed before the point was written
    with JsonlWriter(saved) as writer:
        for row in outputs:
            writer.append(row)
    return patched.unload(), result


def build(variant: str, alpha: float, model, tokenizer, train: list[dict], args):
    steps = round(args.epochs * len(train) / args.batch)
    settings = {
        "output_dir": str(args.output / "train"), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": args.batch, "max_steps": steps, "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 20), "save_strategy": "no", "logging_steps": 5,
        "gradient_checkpointing": False, "seed": 0, "max_length": 512,
        "adam_epsilon": args.adam_epsilon,
    }  # fmt: skip
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=args.lora_target_modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    columns = ("prompt", "completion", "negative_spans", "truncated")
    if variant == "sft":
        rows = [{name: row[name] for name in columns} for row in train if not row["negative_spans"]]
        # The very tokens TNT sees: TRL would end an output that was cut off as if it were complete
        tokens = prepare_rows(Dataset.from_list(rows), tokenizer, max_length=512, name="clean")
        tokens = [
            {"input_ids": row["input_ids"], "completion_mask": [int(w != 0) for w in row["token_weights"]]}
            for row in tokens
        ]
        set_seed(0)
        config = SFTConfig(**settings, completion_only_loss=True)
        return SFTTrainer(
            get_peft_model(model, lora), config, train_dataset=Dataset.from_list(tokens), processing_class=tokenizer
        )
    rows = Dataset.from_list([{name: row[name] for name in columns} for row in train])
    config = TNTConfig(**settings, variant=variant, alpha=alpha)
    return CachingTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def answer(model, tokenizer, held_out: list[dict], args) -> list[dict]:
    engine = TransformersEngine(model, tokenizer, batch_tokens=8192)
    generations = dict(engine.generate([row["prompt"] for row in held_out], GenerationParams(args.max_new_tokens)))
    return [
        row
        | {
            "completion": [{"role": "assistant", "content": generations[i].text}],
            "truncated": generations[i].finish_reason == "length",
            "num_tokens": generations[i].num_tokens,
        }
        for i, row in enumerate(held_out)
    ]


# Colours of Okabe and Ito, told apart by colour-blind readers, and a marker each; targeted variants first.
STYLES = {
    "ff": ("#0072B2", "o"), "rr": ("#D55E00", "s"), "rf": ("#009E73", "^"), "fll": ("#CC79A7", "D"),
    "rll": ("#56B4E9", "v"), "ul": ("#E69F00", "P"), "nl": ("#000000", "X"), "sft": ("#808080", "*"),
}  # fmt: skip
BASELINES = ("ul", "nl", "sft")


def draw_tradeoff(points: list[dict], path: Path) -> None:
    """Reduction of the unwanted rate against preservation in percent, a line per variant over alpha."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    for variant, (colour, marker) in STYLES.items():
        own = sorted((point for point in points if point["variant"] == variant), key=lambda point: point["alpha"])
        x, y = ([100 * point[name] for point in own] for name in ("reduction", "preservation"))
        ends = [
            [abs(100 * point["preservation_interval"][i] - at) for point, at in zip(own, y, strict=True)]
            for i in (0, 1)
        ]
        if own:
            style = {"color": colour, "marker": marker, "linestyle": "--" if variant in BASELINES else "-"}
            axes.errorbar(x, y, ends, elinewidth=0.6, label=variant, **style)
        for point, *place in zip(own, x, y, strict=True):
            if variant != "sft":
                axes.annotate(f"{point['alpha']:g}", place, (5, 5), textcoords="offset points", fontsize=7.5)
    axes.set(xlabel="unwanted rate removed (% of the original's)", ylabel="clean greedy outputs unchanged (%)")
    axes.grid(color="0.9", linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title="loss; numbers: alpha")
    figure.savefig(path, dpi=150, format="png")


if __name__ == "__main__":
    main()
