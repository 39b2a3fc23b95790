"""The trade-off of SAMI on one model: how far obedience rises, against what else moves, over a grid of settings.

    python benchmarks/sami_sweep.py --prompts helpful.jsonl --references human.jsonl --multiple_choice sciq.jsonl \
        --principles recipes/smollm2-135m/sami/principles.yaml --beta 0 0.3 --learning_rate 1e-4 3e-4 \
        --layers all third --response_filter none check --steps 12 --jobs 8 --output runs/sami_sweep

Responses of the original are sampled once a file of principles; every point trains a fresh LoRA adapter on the same
rows (`check`: responses that pass the checks of what they are contrasted on, out of several samples) and answers the
same held-out queries. A point is a line of `points.jsonl`; one that is there already is not made again. `--grid FILE`
takes a JSON list of settings in place of the product of the lists. Prints a table and draws `tradeoff.png`.
"""

import argparse
import itertools
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from trl_extensions.core.runs.jsonl import JsonlWriter, read_jsonl
from trl_extensions.core.runs.run import check_resume


AXES = ("principles", "response_filter", "layers", "beta", "preserve_weight", "learning_rate", "steps")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--references", required=True)
    parser.add_argument("--multiple_choice", required=True)
    parser.add_argument("--principles", nargs="+", required=True)
    parser.add_argument("--response_filter", nargs="+", default=["none"], choices=["none", "check"])
    parser.add_argument("--layers", nargs="+", default=["all"], choices=["all", "third"])
    parser.add_argument("--beta", nargs="+", type=float, default=[0.0])
    parser.add_argument("--preserve_weight", nargs="+", type=float, default=[0.0])
    parser.add_argument("--learning_rate", nargs="+", type=float, default=[3e-4])
    parser.add_argument("--steps", nargs="+", type=int, default=[12])
    parser.add_argument("--grid", type=Path, help="JSON list of settings, in place of the product of the lists above")
    parser.add_argument("--batch_size", type=int, default=16, help="queries a step")
    parser.add_argument("--num_prompts", type=int, default=600, help="training queries to sample for")
    parser.add_argument("--samples", type=int, default=3, help="a training query: greedy, then at temperature 0.8")
    parser.add_argument("--num_eval_prompts", type=int, default=100)
    parser.add_argument("--num_references", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument("--generation_tokens", type=int, default=65536, help="padded tokens in a batch that samples")
    parser.add_argument("--scoring_tokens", type=int, default=32768)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.grid:
        grid = [dict.fromkeys(AXES) | own for own in json.loads(args.grid.read_text())]
        defaults = {name: getattr(args, name)[0] for name in AXES}
        grid = [{name: defaults[name] if own[name] is None else own[name] for name in AXES} for own in grid]
    else:
        grid = [dict(zip(AXES, own, strict=True)) for own in itertools.product(*(getattr(args, n) for n in AXES))]
    points = args.output / "points.jsonl"
    free = {*AXES, "grid", "jobs", "output", "generation_tokens", "scoring_tokens"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    check_resume(args.output / "settings.json", settings, made=str(points), started=points.exists())
    done = [row["point"] for row in read_jsonl(points)] if points.exists() else []
    todo = [point for point in grid if point not in done]
    begin = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool, JsonlWriter(points) as writer:
        files = list(dict.fromkeys(point["principles"] for point in todo))
        for file, own in zip(files, pool.map(prepare, [args] * len(files), files), strict=True):
            print(f"{file}: {own} ({time.perf_counter() - begin:.0f} s)", flush=True)
        waiting = {pool.submit(run_point, args, point): point for point in todo}
        for future in as_completed(waiting):
            try:
                row = future.result()
            except Exception as error:  # one bad point must not cost the others
                print(f"{waiting[future]}: {error!r}", flush=True)
                continue
            writer.append(row)
            print(f"{row['point']}: {row['seconds']:.0f} s, at {time.perf_counter() - begin:.0f} s", flush=True)
    rows = list(read_jsonl(points)) if points.exists() else []
    for row in rows:
        row["point"].setdefault("preserve_weight", 0.0)  # of points made before there was one
    print(table(rows))
    draw(rows, args.output / "tradeoff.png")


# In a process of the pool


def engine_of(args: argparse.Namespace) -> Any:
    """The original, in float32 so that what one adapter changes is not lost in rounding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_extensions.core.generation import TransformersEngine
    from trl_extensions.embedded import resolve_model_name

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    path = resolve_model_name(args.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return TransformersEngine(model, AutoTokenizer.from_pretrained(path), batch_tokens=args.generation_tokens)


def queries_of(args: argparse.Namespace) -> tuple[list, list]:
    import random

    from trl_extensions.core.inputs import load_queries

    queries = load_queries(args.prompts)
    random.Random(args.seed).shuffle(queries)
    held_out = args.num_eval_prompts
    return queries[held_out : held_out + args.num_prompts], queries[:held_out]


def folder_of(args: argparse.Namespace, principles: str) -> Path:
    return args.output / f"original-{Path(principles).stem}"


def sample_held_out(args: argparse.Namespace, engine: Any, principles: list, output: Path) -> list[dict]:
    from trl_extensions.core.generation.types import GenerationParams
    from trl_extensions.sami.data import load_rows
    from trl_extensions.sami.sampling import EVERYTHING_BUT_EMPTY, sample_rows

    sample_rows(
        engine, queries_of(args)[1], principles, num_constitutions=min(4, 2 ** len(principles)), purpose="eval",
        params=GenerationParams(args.max_new_tokens), output=output, seed=args.seed, filters=EVERYTHING_BUT_EMPTY,
        chunk_size=1000,
    )  # fmt: skip
    return load_rows(output, kept_only=False)


def second_axis(args: argparse.Namespace, engine: Any, output: Path, originals: Path | None) -> dict:
    from trl_extensions.core.generation.types import GenerationParams
    from trl_extensions.sami.evaluation import side_effects

    rows = list(read_jsonl(args.references))[: args.num_references]
    references = output.with_name(f"{output.stem}-references.jsonl")
    references.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return side_effects(
        engine, queries_of(args)[1], output, params=GenerationParams(args.max_new_tokens), conversational=True,
        originals=originals, references=str(references), multiple_choice=args.multiple_choice,
        batch_tokens=args.scoring_tokens,
    )  # fmt: skip


def prepare(args: argparse.Namespace, file: str) -> dict:
    """What the original writes to the training queries (before filters by check) and to the held-out ones."""
    from trl_extensions.core.generation.types import GenerationParams
    from trl_extensions.sami.evaluation import score_rows, summarise
    from trl_extensions.sami.principles import load_principles
    from trl_extensions.sami.sampling import ResponseFilters, sample_rows

    folder, engine, principles = folder_of(args, file), engine_of(args), load_principles(file)
    folder.mkdir(exist_ok=True)
    for number in range(args.samples):
        params = GenerationParams(args.max_new_tokens, 0.8 if number else 0.0, seed=number)
        report = sample_rows(
            engine, queries_of(args)[0], principles, params=params, seed=args.seed, chunk_size=1000,
            output=folder / f"samples_{number}.jsonl", filters=ResponseFilters(drop_truncated=False),
        )  # fmt: skip
    rows = [row for row in sample_held_out(args, engine, principles, folder / "eval_samples.jsonl") if row["kept"]]
    if not (folder / "evaluation.json").exists():
        result = {"side_effects": second_axis(args, engine, folder / "plain.jsonl", None)}
        options = {"measure_kl": False, "batch_tokens": args.scoring_tokens}
        for name, same in (("fresh", False), ("same", True)):
            scores = score_rows(engine.model, engine.tokenizer, rows, same_order=same, **options)
            result[name] = summarise(rows, scores)
        (folder / "evaluation.json").write_text(json.dumps(result))
    kept = [len(training_rows(args, folder, principles, name)) for name in ("none", "check")]
    return {"of": report.sampled, "kept": kept[0], "kept by check": kept[1]}


def training_rows(args: argparse.Namespace, folder: Path, principles: list, response_filter: str) -> list[dict]:
    """The greedy responses that the usual filters keep; or by `check`, for each constitution the first of all samples
    that is no echo and passes the checks of the principles the row contrasts."""
    from trl_extensions.core.generation.sampling import completion_text
    from trl_extensions.sami.checks import disobeys
    from trl_extensions.sami.data import load_rows
    from trl_extensions.sami.sampling import is_echo, is_evasive

    if response_filter == "none":
        return load_rows(folder / "samples_0.jsonl")
    files = [load_rows(folder / f"samples_{number}.jsonl", kept_only=False) for number in range(args.samples)]
    checks, kept = {own.name: own.check for own in principles}, []
    for samples in zip(*files, strict=True):
        row = dict(samples[0])
        for name in ("completions", "truncated", "num_tokens"):
            row[name] = []
        for j, constitution in enumerate(row["constitutions"]):
            for own in samples:
                text = completion_text(own["completions"][j])
                bad = not text.strip() or is_echo(text, constitution) or is_evasive(text)
                if not bad and not disobeys(checks, row["choices"], j, text):
                    for name in ("completions", "truncated", "num_tokens"):
                        row[name].append(own[name][j])
                    break
        texts = [completion_text(completion) for completion in row["completions"]]
        if len(set(texts)) == len(row["constitutions"]):
            kept.append(row)
    return kept


def lora_targets(model: Any, layers: str) -> dict[str, Any]:
    """What LoRA adapts: every linear layer but the head, of `all` layers or of the last `third`."""
    if layers == "all":
        return {"target_modules": "all-linear"}
    import torch

    number = model.config.num_hidden_layers
    linear = (name for name, own in model.base_model.named_modules() if isinstance(own, torch.nn.Linear))
    # peft takes a choice of layers only with a list of names
    names = sorted({name.rpartition(".")[2] for name in linear})
    return {"target_modules": names, "layers_to_transform": list(range(number - max(1, number // 3), number))}


def run_point(args: argparse.Namespace, point: dict) -> dict:
    """Train one adapter and measure both axes."""
    import torch
    from peft import LoraConfig
    from transformers import set_seed

    from trl_extensions import SAMIConfig, SAMITrainer
    from trl_extensions.core.generation import TransformersEngine
    from trl_extensions.core.generation.sampling import completion_text
    from trl_extensions.sami.checks import obedience
    from trl_extensions.sami.data import load_rows, to_dataset
    from trl_extensions.sami.evaluation import score_rows, summarise
    from trl_extensions.sami.principles import constitution_label, load_principles
    from trl_extensions.sami.sampling import is_echo

    begin = time.perf_counter()
    folder, principles = folder_of(args, point["principles"]), load_principles(point["principles"])
    name = "-".join(str(Path(value).stem if key == "principles" else value) for key, value in point.items())
    output = args.output / name
    shutil.rmtree(output, ignore_errors=True)  # answers of an adapter that a kill left without its point
    output.mkdir()
    rows = training_rows(args, folder, principles, point["response_filter"])
    engine = engine_of(args)
    lora = LoraConfig(r=16, lora_alpha=32, **lora_targets(engine.model, point["layers"]))
    set_seed(args.seed)
    micro = 4 if torch.cuda.is_available() else 2  # so that eight processes fit on one GPU
    config = SAMIConfig(
        str(output / "train"), beta=point["beta"], preserve_weight=point["preserve_weight"],
        learning_rate=point["learning_rate"], max_steps=point["steps"],
        lr_scheduler_type="cosine", per_device_train_batch_size=micro,
        gradient_accumulation_steps=args.batch_size // micro, gradient_checkpointing=False, bf16=False,
        use_cpu=not torch.cuda.is_available(), logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, seed=args.seed, max_length=2048,
    )  # fmt: skip
    trainer = SAMITrainer(
        engine.model, config, train_dataset=to_dataset(rows), processing_class=engine.tokenizer, peft_config=lora
    )
    trainer.train()
    trained = time.perf_counter() - begin
    torch.cuda.empty_cache()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    engine = TransformersEngine(model, engine.tokenizer, batch_tokens=args.generation_tokens)
    engine.name = "transformers:adapter"
    mine = sample_held_out(args, engine, principles, output / "eval_samples.jsonl")
    kept, originals = [row for row in mine if row["kept"]], load_rows(folder / "eval_samples.jsonl", kept_only=False)
    result = {"obedience": obedience(principles, mine, originals), "rows": len(rows)}
    for order, same in (("fresh", False), ("same", True)):
        scores = score_rows(model, engine.tokenizer, kept, same_order=same, measure_kl=not same,
                            batch_tokens=args.scoring_tokens)  # fmt: skip
        result[order] = summarise(kept, scores)
    result["side_effects"] = second_axis(args, engine, output / "plain.jsonl", folder / "plain.jsonl")
    result["original"] = json.loads((folder / "evaluation.json").read_text())
    told = [(own, completion_text(text)) for row in mine
            for own, text in zip(row["constitutions"], row["completions"], strict=True)]  # fmt: skip
    result["echoes"] = sum(is_echo(text, own) for own, text in told)
    result["samples"] = [
        {"query": row["query"], "answers": {constitution_label(chosen): completion_text(text) for chosen, text
                                            in zip(row["choices"], row["completions"], strict=True)}}
        for row in mine[:6]
    ]  # fmt: skip
    result["loss"] = [entry["loss"] for entry in log]
    if torch.cuda.is_available():
        trainer.model = engine.model = model = None
        torch.cuda.empty_cache()
    return {"point": point, "seconds": time.perf_counter() - begin, "training_seconds": trained, **result}


# What comes of it


def rises(row: dict) -> bool:
    """Whether obedience to every principle rises clear of twice its standard error."""
    return all(own["all"]["difference"]["value"] > 2 * own["all"]["difference"]["se"]
               for own in row["obedience"].values())  # fmt: skip


def stays(row: dict) -> bool:
    """Whether likelihood of people's answers is within 2 % and 60 % of the answers are unchanged."""
    moved = row["side_effects"]
    return moved["references"]["relative_change"]["value"] <= 0.02 and (
        moved["plain_answers"]["unchanged"]["value"] >= 0.6
    )


def table(rows: list[dict]) -> str:
    lines = ["| principles | filter | layers | beta | preserve | lr | steps | "
             "obedience before -> after (definition; antithesis) | tight bound, fresh / same order | "
             "which constitution?, fresh / same | unchanged | KL | people's answers | multiple choice | echoes | "
             "both axes |", "| --- " * 16 + "|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: list(map(str, row["point"].values()))):
        point, moved, old = row["point"], row["side_effects"], row["original"]
        obeyed = "<br>".join(
            f"{name} {'; '.join(_change(own[side]) for side in ('definition', 'antithesis') if side in own)}"
            f" (all {own['all']['difference']['value']:+.0%} ± {own['all']['difference']['se']:.0%})"
            for name, own in row["obedience"].items()
        )
        bounds = " / ".join(f"{old[n]['mi_bound']['mean']:.2f} -> {row[n]['mi_bound']['mean']:.2f}"
                            for n in ("fresh", "same"))  # fmt: skip
        which = " / ".join(f"{old[n]['accuracy_columns']['mean']:.0%} -> {row[n]['accuracy_columns']['mean']:.0%}"
                           for n in ("fresh", "same"))  # fmt: skip
        cells = [
            Path(point["principles"]).stem, point["response_filter"], point["layers"], f"{point['beta']:g}",
            f"{point['preserve_weight']:g}", f"{point['learning_rate']:g}", point["steps"], obeyed, bounds, which,
            f"{moved['plain_answers']['unchanged']['value']:.0%}", f"{moved['plain_answers']['kl']['value']:.4f}",
            f"{moved['references']['relative_change']['value']:+.1%}",
            f"{moved['multiple_choice']['original']['value']:.0%} -> "
            f"{moved['multiple_choice']['accuracy']['value']:.0%}",
            row["echoes"], f"{'rises' if rises(row) else '-'}, {'stays' if stays(row) else '-'}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _change(own: dict) -> str:
    return f"{own['original']['value']:.0%} -> {own['obeyed']['value']:.0%}"


def draw(rows: list[dict], path: Path) -> None:
    """Both axes by learning rate, a line for each beta and `preserve_weight`, of the principles, filter, layers and
    steps with the most points: least rise of a principle's obedience, unchanged answers, change of people's answers.
    """
    from trl_extensions.core.runs import plots

    if not rows:
        return
    groups: dict[str, list[dict]] = {}
    for row in rows:
        drawn = ("beta", "preserve_weight", "learning_rate")
        others = [str(value) for key, value in row["point"].items() if key not in drawn]
        groups.setdefault(" ".join(others), []).append(row)
    lines: dict[str, list[dict]] = {}
    for row in max(groups.values(), key=len):
        name = f"beta {row['point']['beta']:g}, preserve {row['point']['preserve_weight']:g}"
        lines.setdefault(name, []).append(row)
    figure, axes = plots.panels(3)
    measures = [
        ("least rise of obedience", lambda row: min(
            (own["all"]["difference"] for own in row["obedience"].values()), key=lambda d: d["value"])),
        ("answers unchanged, no constitution", lambda row: row["side_effects"]["plain_answers"]["unchanged"]),
        ("change of nats, people's answers", lambda row: row["side_effects"]["references"]["relative_change"]),
    ]  # fmt: skip
    for panel, (label, measure) in zip(axes, measures, strict=True):
        series = {}
        for name, own in sorted(lines.items()):
            own = sorted(own, key=lambda row: row["point"]["learning_rate"])
            series[name] = [row["point"]["learning_rate"] for row in own], [measure(row) for row in own]
        plots.line_plot(panel, series)
        panel.set(xlabel="learning rate", ylabel=label, xscale="log")
        rates = sorted({rate for line, _ in series.values() for rate in line})
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.minorticks_off()
    axes[0].axhline(0, color=plots.BEFORE, linestyle=":")
    axes[1].axhline(0.6, color=plots.BEFORE, linestyle=":")
    axes[2].axhline(0.02, color=plots.BEFORE, linestyle=":")
    plots.save(figure, path)


if __name__ == "__main__":
    main()
