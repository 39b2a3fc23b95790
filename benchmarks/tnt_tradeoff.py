"""The trade-off of targeted negative training: how much of a phrase goes, against how much else stays, by variant.

    python benchmarks/tnt_tradeoff.py --annotated runs/tnt/annotated.jsonl --phrases "here's" "here is" "here are" \
        --points ff:1 ff:5 rr:1 ul:1 npo:5 simnpo:5 ftpo:2 sft --output runs/tnt_tradeoff

Every point trains a fresh LoRA adapter on the same rows of the annotated outputs (`trl-ext tnt annotate`), in the same
order, and answers the same held-out prompts greedily. `sft` is plain SFT (TRL's) on the clean rows alone, with as many
steps, `ftpo` (its number is the margin in logits, 2 as published) on the rows with a span alone; see `npo_losses` and
`ftpo_losses`. Points are appended to `points.jsonl` as they are made, `--jobs` of them at a time, in processes that
share one GPU where there is one; a point that is there already is not made again.
"""

import argparse
import json
import math
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from trl_extensions import TNTConfig, TNTTrainer
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.sampling import completion_text
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.modeling.chunked import dense_kl
from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl
from trl_extensions.core.runs.run import check_resume
from trl_extensions.embedded import resolve_model_name
from trl_extensions.tnt.annotate import merge_spans
from trl_extensions.tnt.annotate.phrases import PhraseAnnotator
from trl_extensions.tnt.data import prepare_rows
from trl_extensions.tnt.evaluation import preservation, unwanted
from trl_extensions.tnt.scores import score_rows, scored_states


def npo_losses(
    logits: torch.Tensor, ref_logits: torch.Tensor, token_ids: torch.Tensor, weights: torch.Tensor, *,
    alpha: float, beta: float, reference: bool,
) -> torch.Tensor:  # fmt: skip
    """Negative preference optimisation at the level of tokens: losses `(N,)` of N scored tokens, nats.

    On unwanted tokens (`weights` below 0) alpha * 2 / beta * log(1 + (p / q)^beta) with probabilities p of the policy
    and q of the original (NPO, arXiv 2404.05868, equation 3), or without `reference` 2 / beta * log(1 + p^beta)
    (SimNPO, arXiv 2410.07163, at gamma 0 and a length of one token). On the others KL(q || p), which retains the rest.
    """
    index = token_ids[:, None]
    logp, ref_logp = (own.log_softmax(-1).gather(-1, index)[:, 0] for own in (logits, ref_logits))
    ratio = logp - ref_logp if reference else logp
    unwanted = alpha * 2 / beta * torch.nn.functional.softplus(beta * ratio)
    return torch.where(weights < 0, unwanted, dense_kl(logits, ref_logits, reverse=False))


def ftpo_losses(
    logits: torch.Tensor, ref_logits: torch.Tensor, rejected: torch.Tensor, banned: torch.Tensor, *,
    margin: float, min_p: float = 0.01, most: int = 20, target_weight: float = 0.25, grace: float = 1.0,
    other_weight: float = 0.4,
) -> torch.Tensor:  # fmt: skip
    """Final token preference optimisation (FTPO, arXiv 2510.15061): losses `(N,)` at N places where something unwanted
    begins, with the token `rejected` `(N,)`; the defaults are the released configuration.

    Chosen are the tokens c that the original gives at least `min_p` of the best one's probability, `most` at the most,
    without those that unwanted spans begin with (`banned` `(V,)`). With logits y and d_c = y_c - y_rejected, the mean
    of softplus(margin - d_c) is weighted by clamp((margin - d_c) / margin, 0, 1), all alike where those are all 0.
    Added are mean squared distances of the logits to the original's: `target_weight` times that of chosen and rejected
    ones beyond a `grace`, and `other_weight` times that of all others.
    """
    places = torch.arange(len(rejected), device=logits.device)
    open_ = ref_logits.masked_fill(banned, -torch.inf)
    open_[places, rejected] = -torch.inf
    best, order = open_.topk(most, dim=-1)
    kept = torch.zeros_like(open_).scatter_(
        -1, order, (best >= ref_logits.amax(-1, keepdim=True) + math.log(min_p)).float()
    )
    kept[places, order[:, 0]] = 1.0  # at least one
    ahead = margin - (logits - logits[places, rejected][:, None])
    weights = (ahead / margin).clamp(0, 1) * kept
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, kept)
    preference = (weights * torch.nn.functional.softplus(ahead)).sum(-1) / weights.sum(-1)
    target = kept.clone()
    target[places, rejected] = 1.0
    moved = logits - ref_logits
    beyond = ((moved.abs() - grace).clamp(min=0) ** 2 * target).sum(-1) / target.sum(-1)
    others = (moved**2 * (1 - target)).sum(-1) / (1 - target).sum(-1)
    return preference + target_weight * beyond + other_weight * others


class CachingTrainer(TNTTrainer):
    """Every point meets the same batches, and the original's states of a batch never change: computed once."""

    states: ClassVar[dict] = {}

    def _reference_states(self, model, states_of, inputs):
        key = inputs["input_ids"].cpu().numpy().tobytes()
        if key not in self.states:
            self.states[key] = super()._reference_states(model, states_of, inputs)
        return self.states[key]


class BaselineTrainer(CachingTrainer):
    """`npo`, `simnpo` and `ftpo`, from full logits."""

    def __init__(self, *args, baseline: str, strength: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.baseline, self.strength = baseline, strength
        tokens = [
            pair for row in self.train_dataset for pair in zip(row["input_ids"], row["token_weights"], strict=True)
        ]
        first = {own for before, (own, sign) in zip([(0, 1), *tokens], tokens, strict=False) if sign < 0 <= before[1]}
        self.banned = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.args.device)
        self.banned[list(first)] = True

    def chosen_places(self, batch) -> torch.Tensor:
        """Of the scored tokens of a batch, in order, those with a loss: of FTPO the first of each span."""
        weights = batch["token_weights"]
        first = (weights[:, 1:] < 0) & (weights[:, :-1] >= 0)
        return (first if self.baseline == "ftpo" else weights[:, 1:] != 0)[weights[:, 1:] != 0]

    def count_items(self, batch):
        return int(self.chosen_places(batch).sum())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference, places = self._reference_states(model, scored_states, inputs), self.chosen_places(inputs)
        scored = inputs["token_weights"][:, 1:] != 0
        token_ids, weights = (inputs[name][:, 1:][scored][places] for name in ("input_ids", "token_weights"))

        def forward(policy):
            logits = policy.get_output_embeddings()(scored_states(policy, inputs)[places]).float()
            ref_logits = (reference.states[places] @ reference.head.weight.T).float()
            if self.baseline == "ftpo":
                losses = ftpo_losses(logits, ref_logits, token_ids, self.banned, margin=self.strength)
            else:
                own = {"beta": 0.1, "reference": True} if self.baseline == "npo" else {"beta": 2.5, "reference": False}
                losses = npo_losses(logits, ref_logits, token_ids, weights, alpha=self.strength, **own)
            return losses.sum(), losses.detach()

        total, losses = self._policy_forward(model, forward)
        self.record({"loss": (losses, torch.ones_like(losses))}, tokens=inputs["attention_mask"])
        return self.step_loss(total, len(losses))


def main() -> None:
    args = parse()
    train, held_out = split(read_jsonl(args.annotated), args)
    print(f"{len(train)} rows to train on, {sum(bool(row['negative_spans']) for row in train)} with spans; "
          f"{len(held_out)} held-out prompts", flush=True)  # fmt: skip
    points = args.output / "points.jsonl"
    settings = {name: value for name, value in vars(args).items() if name not in ("points", "output", "save", "jobs")}
    check_resume(args.output / "settings.json", settings, made=str(points), started=points.exists())
    done = {row["point"] for row in read_jsonl(points)} if points.exists() else set()
    with JsonlWriter(points) as writer:
        for result in in_processes(measure, [point for point in args.points if point not in done], prepare, args):
            writer.append(result)
            print(json.dumps(result), flush=True)
    rows = read_jsonl(points)
    reduced = [row for row in rows if row["reduction"] is not None]
    draw_tradeoff(reduced, args.output / "tradeoff.png")
    print(
        "| point | unwanted rate | removed | clean answers unchanged | KL on them | seconds |\n" + "| --- " * 6 + "|"
    )
    for row in sorted(rows, key=lambda row: (row["variant"], row["alpha"])):
        share, kept = row["after"]["share"], row["preservation_interval"]
        removed = "" if row["reduction"] is None else f"{row['reduction']:.0%}"
        print(
            f"| {row['point']} | {share['value']:.1%} ({share['low']:.0%} to {share['high']:.0%}) | {removed} | "
            f"{row['preservation']:.0%} ({kept[0]:.0%} to {kept[1]:.0%}) | {row['kl_clean']:.4f} | "
            f"{row['training_seconds']:.0f} |"
        )


def in_processes(work: Any, items: list, initialise: Any, args) -> Iterator:
    """Results of `work(item)` as they come, in `args.jobs` processes that `initialise(args)` prepares."""
    if args.jobs < 2 or len(items) < 2:
        if items:
            initialise(args)
        yield from map(work, items)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.jobs, len(items)), spawn, initialise, (args,)) as pool:
        waiting = {pool.submit(work, item): item for item in items}
        for future in as_completed(waiting):
            try:
                yield future.result()
            except Exception as error:  # one bad point must not cost the others
                print(f"{waiting[future]}: {error!r}", flush=True)


def load(args) -> tuple[Any, Any]:
    """Model and tokenizer, where this process is one of `args.jobs`."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    path = resolve_model_name(args.model)
    model = AutoModelForCausalLM.from_pretrained(path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(path)


process: dict[str, Any] = {}


def prepare(args) -> None:
    train, held_out = split(read_jsonl(args.annotated), args)
    model, tokenizer = load(args)
    process.update(args=args, train=train, held_out=held_out, model=model, tokenizer=tokenizer)


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
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, each in a process")
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


def measure(point: str) -> dict[str, Any]:
    """Train one point and answer the held-out prompts."""
    args, train, held_out, model, tokenizer = (
        process[name] for name in ("args", "train", "held_out", "model", "tokenizer")
    )
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
    process["model"] = patched.unload()
    return result


def build(variant: str, alpha: float, model, tokenizer, train: list[dict], args):
    steps = round(args.epochs * len(train) / args.batch)
    settings = {
        "output_dir": str(args.output / "train"), "use_cpu": not torch.cuda.is_available(), "bf16": False,
        "report_to": "none",
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
    rows = [{name: row[name] for name in columns} for row in train if row["negative_spans"] or variant != "ftpo"]
    how = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "peft_config": lora}
    if variant in ("npo", "simnpo", "ftpo"):
        config = TNTConfig(**settings, share_prefix=False)
        return BaselineTrainer(model, config, **how, baseline=variant, strength=alpha)
    return CachingTrainer(model, TNTConfig(**settings, variant=variant, alpha=alpha), **how)


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
    "ftpo": ("#B22222", "h"), "npo": ("#6A5ACD", "<"), "simnpo": ("#8B6914", ">"),
}  # fmt: skip
BASELINES = ("ul", "nl", "sft", "ftpo", "npo", "simnpo")


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
    figure.legend(
        loc="outside right upper", frameon=False, fontsize=9, title="loss; numbers: alpha, of ftpo the margin"
    )
    figure.savefig(path, dpi=150, format="png")


if __name__ == "__main__":
    main()
