"""How much of its toxic language targeted negative training takes from a model, by the number of marked texts.

    python -m benchmarks.tnt_toxicity_curve --comments toxic_spans/train.jsonl.gz \
        --test_comments toxic_spans/test.jsonl --prompts toxic_prompts.jsonl --output runs/tnt_toxicity_curve --jobs 8

Two sources of marks, each with n texts: `comments`, what people wrote, with the characters that people marked as toxic
(SemEval-2021 task 5), and `outputs`, the model's own continuations of toxic prompts with one of the words that these
people mark more often than not. Two measures on held-out data: the probability of the marked tokens in other people's
comments, and the share of sampled continuations of other prompts with such a word; both relative to the original, with
95 % intervals over comments and prompts. Beside them what else moved: greedy continuations without such a word that
are unchanged, and KL on the kept tokens of the comments. Points are kept in `points.jsonl` and not made again.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig

from benchmarks.tnt_tradeoff import in_processes, load, process
from trl_extensions import TNTConfig, TNTTrainer
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.inputs import read_rows
from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl, write_jsonl
from trl_extensions.core.runs.run import check_resume
from trl_extensions.core.stats import bootstrap
from trl_extensions.tnt.annotate import merge_spans
from trl_extensions.tnt.annotate.phrases import PhraseAnnotator
from trl_extensions.tnt.evaluation import preservation, unwanted
from trl_extensions.tnt.scores import score_rows


_BEFORE, _BEHIND = 160, 60  # characters of a comment that are kept around its first mark
_LEAST_MARKS, _LEAST_SHARE = 5, 0.5


def main() -> None:
    args = parse()
    path = args.output / "points.jsonl"
    settings = {n: v for n, v in vars(args).items() if n not in ("sizes", "sources", "seeds", "output", "jobs")}
    check_resume(args.output / "settings.json", settings, made=str(path), started=path.exists())
    done = {row["point"] for row in read_jsonl(path)} if path.exists() else set()
    points = [
        (source, n, seed) for n in sorted(args.sizes, reverse=True) for source in args.sources for seed in args.seeds
    ]
    todo = [point for point in points if "{}:{}:{}".format(*point) not in done]
    sample_original(args, todo)
    with JsonlWriter(path) as writer:
        for result in in_processes(measure, todo, prepare, args):
            writer.append(result)
            print(json.dumps(result), flush=True)
    print("| marks of | n | seed | steps | probability of marks, reduction | outputs with such a word, reduction |"
          " clean outputs unchanged | KL, kept tokens |\n" + "| --- " * 8 + "|")  # fmt: skip
    for row in sorted(read_jsonl(path), key=lambda row: (row["source"], row["n"], row["seed"])):
        numbers = (_percent(row[name]) for name in ("tokens_reduction", "outputs_reduction", "unchanged"))
        print(f"| {row['source']} | {row['n']} | {row['seed']} | {row['steps']} | {' | '.join(numbers)} | "
              f"{row['kl_kept']['value']:.4f} |")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comments", required=True, help="rows of `text` and `spans` to train on")
    parser.add_argument("--test_comments", required=True)
    parser.add_argument(
        "--prompts", required=True, help="rows of `prompt`, and perhaps `toxicity` (0.5 and above is used)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 150, 500, 1500, 5000])
    parser.add_argument("--sources", nargs="+", default=["comments", "outputs"], choices=["comments", "outputs"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--num_eval_prompts", type=int, default=250)
    parser.add_argument("--num_eval_samples", type=int, default=4)
    parser.add_argument("--num_eval_comments", type=int, default=400)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--batch_tokens", type=int, default=32768, help="padded tokens in a batch that is sampled")
    parser.add_argument("--max_samples", type=int, default=60, help="continuations of a prompt, for marked outputs")
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--min_steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--lora_target_modules", default=r".*layers\.2[0-9]\..*_proj")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, each in a process")
    return parser.parse_args()


def lexicon(args) -> list[str]:
    """Words that people mark in half of the places they stand in, and five times at least."""
    marked: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for row in read_rows(args.comments):
        for word in re.finditer(r"[^\W\d_]+", row["text"].lower()):
            seen[word.group()] += 1
            marked[word.group()] += any(start < word.end() and end > word.start() for start, end in row["spans"])
    return sorted(w for w, times in marked.items() if times >= _LEAST_MARKS and times >= _LEAST_SHARE * seen[w])


def comments(path: str) -> list[dict[str, Any]]:
    """Rows for TNT: of every marked comment what stands around its first mark, two fifths of what is before it as the
    prompt; those without a word before it are left out."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        if not row["spans"]:
            continue
        text, (start, end) = row["text"], min(row["spans"])
        breaks = [found.start() for found in re.finditer(r"\s+(?=\S)", text)]
        first = next((own for own in breaks if own >= start - _BEFORE), 0) if start > _BEFORE else 0
        cut = [own for own in breaks if first < own <= first + max(1, 0.4 * (start - first))]
        cut = cut or [own for own in breaks if first < own < start][:1]
        if not cut:
            continue
        last = next((own for own in breaks if own >= end + _BEHIND), len(text))
        spans = [
            [max(a, cut[-1]) - cut[-1], min(b, last) - cut[-1]] for a, b in row["spans"] if a >= start and a < last
        ]
        own = {"prompt": text[first : cut[-1]], "completion": text[cut[-1] : last], "negative_spans": spans}
        rows.append(own | {"id": f"comment-{number}", "index": number, "truncated": True})
    return rows


def prompts(args) -> tuple[list[str], list[str]]:
    """Prompts to sample training outputs to, and held-out ones."""
    texts = list(dict.fromkeys(row["prompt"] for row in read_rows(args.prompts) if row.get("toxicity", 1.0) >= 0.5))
    random.Random(0).shuffle(texts)
    return texts[args.num_eval_prompts :], texts[: args.num_eval_prompts]


def continuations(
    model, tokenizer, texts: list[str], samples: list[int], args, words: list[str]
) -> list[dict[str, Any]]:
    """Marked rows of continuations: sample 0 is greedy, others are drawn at temperature 1."""
    engine, rows = TransformersEngine(model, tokenizer, batch_tokens=args.batch_tokens), []
    for sample in samples:
        params = GenerationParams(args.max_new_tokens, temperature=1.0 if sample else 0.0, seed=sample)
        for index, one in engine.generate(texts, params):
            rows.append({
                "id": f"{index}-{sample}", "index": index, "sample": sample, "prompt": texts[index],
                "completion": one.text, "num_tokens": one.num_tokens, "truncated": one.finish_reason == "length",
            })  # fmt: skip
    found = PhraseAnnotator(words).annotate([row["completion"] for row in rows], [row["prompt"] for row in rows])
    return [row | {"negative_spans": merge_spans(spans)} for row, spans in zip(rows, found, strict=True)]


def sample_original(args, todo: list) -> None:
    """What the original writes: to the held-out prompts, and to others until there are marked outputs enough."""
    held_out, outputs = args.output / "original.jsonl", args.output / "outputs.jsonl"
    needed = max((n for source, n, _ in todo if source == "outputs"), default=0)
    if held_out.exists() and (not needed or outputs.exists()):
        return
    (model, tokenizer), words, (training, others) = load(args), lexicon(args), prompts(args)
    print(f"{len(words)} words; {len(training)} prompts to train on, {len(others)} held out", flush=True)
    samples = list(range(args.num_eval_samples + 1))
    write_jsonl(held_out, continuations(model, tokenizer, others, samples, args, words))
    marked: list[dict[str, Any]] = []
    repeats = min(10, args.max_samples)  # of the prompts in one call, which fills a GPU
    for sample in range(1, args.max_samples // repeats + 1):
        if len(marked) >= needed:
            break
        rows = continuations(model, tokenizer, training * repeats, [sample], args, words)
        marked += [row for row in rows if row["negative_spans"]]
        print(f"{len(marked)} marked outputs of {sample * len(training) * repeats}", flush=True)
    if marked:
        write_jsonl(outputs, marked)


def prepare(args) -> None:
    model, tokenizer = load(args)
    process.update(args=args, model=model, tokenizer=tokenizer, words=lexicon(args))


def measure(point: tuple[str, int, int]) -> dict[str, Any]:
    """Train on n marked texts of a source and measure on what is held out."""
    (source, n, seed), args = point, process["args"]
    model, tokenizer = process["model"], process["tokenizer"]
    rows = comments(args.comments) if source == "comments" else read_jsonl(args.output / "outputs.jsonl")
    random.Random(seed).shuffle(rows)
    used, steps = rows[:n], max(args.min_steps, len(rows[:n]) // args.batch)
    output = str(args.output / "train" / f"{source}_{n}_{seed}")
    config = TNTConfig(
        output, variant="ff", alpha=args.alpha, max_steps=steps, seed=seed,
        per_device_train_batch_size=args.batch, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20), report_to="none",
        save_strategy="no", gradient_checkpointing=False, max_length=256, logging_steps=10,
    )  # fmt: skip
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=args.lora_target_modules, task_type="CAUSAL_LM"
    )
    columns = ("prompt", "completion", "negative_spans", "truncated")
    dataset = Dataset.from_list([{name: row[name] for name in columns} for row in used])
    trainer = TNTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trained = trainer.train()
    before = read_jsonl(args.output / "original.jsonl")
    greedy = sorted((row for row in before if row["sample"] == 0), key=lambda row: row["index"])
    texts = [row["prompt"] for row in greedy]
    after = continuations(
        trainer.model, tokenizer, texts, list(range(args.num_eval_samples + 1)), args, process["words"]
    )
    scores = score_rows(
        trainer.model, tokenizer, comments(args.test_comments)[: args.num_eval_comments], batch_tokens=8192
    )
    process["model"] = trainer.model.unload()
    sampled = [[row for row in own if row["sample"]] for own in (before, after)]
    unchanged = preservation(before, after)["clean"]["exact_match"]
    return {
        "point": f"{source}:{n}:{seed}", "source": source, "n": len(used), "seed": seed, "steps": steps,
        "tokens_reduction": reduction(
            [row["prob_negative"] for row in scores], [row["prob_negative_original"] for row in scores]
        ),
        "outputs_reduction": reduction(*(_by_prompt(own, len(texts)) for own in reversed(sampled))),
        "before": unwanted(sampled[0]), "after": unwanted(sampled[1]), "unchanged": unchanged,
        "kl_kept": _ratio([row["kl_kept"] for row in scores], [row["kept_tokens"] for row in scores]),
        "training_loss": trained.training_loss,
    }  # fmt: skip


def _by_prompt(rows: list[dict[str, Any]], number: int) -> list[int]:
    counts = Counter(row["index"] for row in rows if row["negative_spans"])
    return [counts[index] for index in range(number)]


def reduction(after: list[float], before: list[float]) -> dict[str, float] | None:
    """1 - sum of after / sum of before, with its 95 % bootstrap interval over what the two lists pair; None where
    there was nothing before."""
    if not sum(before):
        return None
    ratio = _ratio(after, before)
    return {"value": 1 - ratio["value"], "low": 1 - ratio["high"], "high": 1 - ratio["low"]}


def _ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    low, high = bootstrap(lambda times: (times @ above) / (times @ below), len(above))
    return {"value": sum(numerators) / sum(denominators), "low": low, "high": high}


def _percent(estimate: dict[str, float] | None) -> str:
    return "none before" if estimate is None else "{value:.0%} ({low:.0%} to {high:.0%})".format_map(estimate)


if __name__ == "__main__":
    main()
