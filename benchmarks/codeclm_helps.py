"""Does CodecLM help? One target trained on equally many pairs of five kinds, and what it gains on prompts of no kind.

    python -m benchmarks.codeclm_helps --seeds seed_tasks_175.jsonl --benchmark vicuna_80.jsonl self_instruct_252.jsonl
        --gguf qwen2.5-coder-0.5b-instruct.gguf --output runs/helps [--serve | --batch_tokens 262144] [--jobs 4]

| arm | rewrites | selection |
| --- | --- | --- |
| basic | none | all |
| evol | fixed ones | the last version |
| rubrics | Self-Rubrics | the last version |
| random | Self-Rubrics | a version drawn at random |
| gap | Self-Rubrics | contrastive filtering |

All arms begin with the same basic instructions, and what two of them ask alike is asked once. Each arm trains the
target (LoRA) on `--size` of its pairs, or as many as the arm with the fewest has, `--train_seeds` times with a draw
and an order of their own. Held out are the seeds behind the first `--num_seeds` and the prompts of `--benchmark`,
which no arm may come near. Measured on them: the negative log-likelihood of the strong model's greedy answers, in
nats a token, and by how much the strong model as a judge prefers the trained target's answers to the untrained one's,
averaged over both orders. Intervals (95 %) are over trainings and prompts. Killed at any stage, the same command goes
on. The judge is the scorer by which `gap` selects, which speaks for that arm; that some of its answers are the
target's own speaks against it in the likelihood. Where both agree, believe it.

The least that fills `--size 200` where a fifth of the instructions is lost is `--num_instructions 260 --max_rounds 2`:
for all arms the strong model writes 1,040 answers, 1,040 rewrites and some 170 other replies, a quarter of a million
tokens, and gives 1,040 to 2,080 scores of one token; the target writes 260 to 520 answers. With three sets of prompts
come 280 answers to them, and for 15 trainings 5,400 judgments of one token. Three trainings give 4.3 standard errors
to each side where they differ more than the prompts do, five give 2.8: `--train_seeds 5` is the better buy.

`--gguf` is loaded here, its weights unpacked (on a GPU, or a processor with amx_bf16), or behind llama.cpp with
`--serve`; `--strong` takes an engine as in a run's YAML instead. `--jobs` trainings run at once.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from trl_extensions.codeclm.comparison import answer
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.codeclm.pipeline.seeds import load_seeds
from trl_extensions.codeclm.report import collect
from trl_extensions.core.generation import EndpointEngine, TransformersEngine, create_engine, parse_engine
from trl_extensions.core.generation.client import ResponseCache
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.inputs import load_queries
from trl_extensions.core.judge.pairwise import Pair, PairwiseJudge
from trl_extensions.core.runs.jsonl import read_jsonl, write_jsonl
from trl_extensions.core.runs.report import write_atomically
from trl_extensions.core.runs.run import check_resume
from trl_extensions.core.stats import Spread
from trl_extensions.embedded import EMBEDDED_ALIAS, resolve_model_name


ARMS = {
    "basic": {"rewrite": "none", "selection": "all"},
    "evol": {"rewrite": "evol", "selection": "all"},
    "rubrics": {"rewrite": "rubrics", "selection": "all"},
    "random": {"rewrite": "rubrics", "selection": "random"},
    "gap": {"rewrite": "rubrics", "selection": "gap"},
}
NO_MATTER = {"output", "serve", "batch_tokens", "jobs", "point", "train_seeds", "only"}


def main() -> None:
    args = parse()
    if args.point:
        return train_point(args, args.point[0], int(args.point[1]))
    settings = {name: str(value) for name, value in vars(args).items() if name not in NO_MATTER}
    check_resume(args.output / "helps.json", settings, made=str(args.output), started=(args.output / "basic").exists())
    sets = held_out(args)
    with ExitStack() as stack:
        strong = cache(partial(load_strong, args, stack))
        make_pairs(args, strong)
        for name, prompts in sets.items():
            answer(args.output / f"answers_{name}.jsonl", prompts, strong, GenerationParams(args.max_answer_tokens))
    if args.only == "data":
        return print(tokens(args))
    (args.output / "size").write_text(str(size := number_of_pairs(args)))
    wanted = [("target", 0), *((arm, seed) for seed in range(args.train_seeds) for arm in ARMS)]
    command = [sys.executable, "-m", "benchmarks.codeclm_helps", *sys.argv[1:], "--point"]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda own: subprocess.run([*command, own[0], str(own[1])]).returncode, wanted)
        if failed := [own for own, code in zip(wanted, runs, strict=True) if code]:
            raise SystemExit(f"not finished: {failed}; the same command goes on")
    with ExitStack() as stack:
        judge_points(args, sets, wanted, cache(partial(load_strong, args, stack)))
    text = "\n".join([f"{size} pairs in each arm\n", table(args, sets), "", tokens(args)])
    write_atomically(args.output / "helps.md", text + "\n")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--num_seeds", type=int, default=60, help="the others are held out")
    parser.add_argument("--benchmark", nargs="*", default=[], help="files of prompts, held out too")
    parser.add_argument("--strong", help="an engine, as in a run's YAML")
    parser.add_argument("--gguf", type=Path, help="a model instead, loaded here or served")
    parser.add_argument("--serve", action="store_true", help="serve it with llama.cpp")
    parser.add_argument("--target", default=EMBEDDED_ALIAS)
    parser.add_argument(
        "--num_instructions", type=int, default=400, help="basic instructions that all arms begin with"
    )
    parser.add_argument("--size", type=int, default=200, help="pairs that are trained on, at most")
    parser.add_argument("--max_rounds", type=int, default=4)
    parser.add_argument(
        "--gap_threshold", type=float, default=0.1, help="in expected points: scores are probabilities"
    )
    parser.add_argument("--max_new_tokens", type=int, default=320)
    parser.add_argument("--max_answer_tokens", type=int, default=192)
    parser.add_argument("--num_prompts", type=int, default=100, help="held-out prompts of each set")
    parser.add_argument("--num_judged", type=int, default=60, help="of these, how many the judge sees the answers to")
    parser.add_argument("--train_seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="float32", help="of the target, trained and measured; LoRA is in float32")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="of a batch in this process")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=("data",), help="stop before any training")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--point", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bool(args.strong) == bool(args.gguf):
        parser.error("the strong model is missing: give one of --strong and --gguf")
    return args


# Data


def load_strong(args: argparse.Namespace, stack: ExitStack) -> Any:
    if args.strong:
        return create_engine(parse_engine(args.strong, "strong").arguments)
    if args.serve:
        from benchmarks.llama_server import LlamaServer

        server = stack.enter_context(LlamaServer(args.gguf, parallel=8, context=8 * 2560))
        # Else small models repeat themselves in a string until the limit cuts them off
        options = {"concurrency": 8, "timeout": 1800.0, "extra_body": {"dry_multiplier": 0.8}}
        return EndpointEngine(server.base_url, args.gguf.stem, **options)
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    unpacked: Any = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=unpacked)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    engine = TransformersEngine(model.to(PartialState().device).eval(), tokenizer, batch_tokens=args.batch_tokens)
    engine.name = f"transformers:{args.gguf.stem}"
    return engine


def held_out(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """By name of the set its prompts; the seeds that nothing is made from are `seeds`."""
    own = {"seeds": load_seeds(args.seeds)[args.num_seeds :]}
    own |= {Path(path).stem: load_queries(path) for path in args.benchmark}
    sets = {}
    for name, queries in own.items():
        queries = random.Random(0).sample(queries, min(args.num_prompts, len(queries)))
        sets[name] = [{"id": query.id, "prompt": [{"role": "user", "content": query.text}]} for query in queries]
    args.output.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.output / "held_out.jsonl", [row for rows in sets.values() for row in rows])
    return sets


def make_pairs(args: argparse.Namespace, strong: Callable[[], Any]) -> None:
    """The pairs of every arm; each begins with the instructions and the calls of the one before it."""
    target = cache(lambda: TransformersEngine(args.target, batch_tokens=args.batch_tokens))
    before: Path | None = None
    for arm, own in ARMS.items():
        folder = args.output / arm
        if not (folder / "finished").exists():
            config = CodecLMConfig(
                prompts=args.seeds, num_prompts=args.num_seeds, num_instructions=args.num_instructions,
                max_rounds=args.max_rounds, scoring="logprobs", gap_threshold=args.gap_threshold, **own,
                max_new_tokens=args.max_new_tokens, max_answer_tokens=args.max_answer_tokens, keep_truncated=True,
                decontaminate_against=[str(args.output / "held_out.jsonl")],
            )  # fmt: skip
            if before and not (folder / "settings.json").exists():
                folder.mkdir(exist_ok=True)
                for name in ("metadata.jsonl", "basics.json", "basics.jsonl", "calls.sqlite"):
                    shutil.copy(before / name, folder / name)
                settings = json.loads((before / "settings.json").read_text(encoding="utf-8"))
                engine = {"target": target().name if arm == "gap" else None}
                write_atomically(folder / "settings.json", json.dumps(settings | own | engine))
            engines = {"strong": strong()} | ({"target": target()} if arm == "gap" else {})
            result = CodecLM(config, folder, seed=0, **engines).run()
            print(f"{arm}: {result.pairs} pairs", flush=True)
            if result.unfinished:
                raise SystemExit(f"{arm}: {result.unfinished}; the same command goes on")
            (folder / "finished").touch()
        before = folder


def number_of_pairs(args: argparse.Namespace) -> int:
    numbers = {arm: len(read_jsonl(args.output / arm / "data.jsonl")) for arm in ARMS}
    print(f"pairs: {numbers}", flush=True)
    if not (size := min(args.size, *numbers.values())):
        raise SystemExit("an arm has no pairs: its report.md says why; more --num_instructions, or a stronger model")
    return size


# Training


def train_point(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Train the target on pairs of an arm ("target": not at all), and write what it says to the held-out prompts."""
    import torch
    from trl import ModelConfig, SFTConfig

    from trl_extensions.codeclm.training import completion_losses, train_on_data

    folder = args.output / "points" / f"{arm}-{seed}"
    if (folder / "losses.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = args.target
    if arm != "target":
        rows, size = read_jsonl(args.output / arm / "data.jsonl"), int((args.output / "size").read_text())
        write_jsonl(folder / "data.jsonl", random.Random(f"{arm}/{seed}").sample(rows, size))
        model, cuda = str(folder / "model"), torch.cuda.is_available()
        config = SFTConfig(
            str(folder / "train"), num_train_epochs=args.epochs, learning_rate=args.learning_rate, seed=seed,
            per_device_train_batch_size=8, lr_scheduler_type="constant", max_length=1024, gradient_checkpointing=False,
            bf16=False, use_cpu=not cuda, save_strategy="no", logging_steps=1000, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        lora = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["all-linear"]}
        own = ModelConfig(model_name_or_path=resolve_model_name(args.target), dtype=args.dtype, **lora)
        if not Path(model).exists():
            train_on_data(own, config, folder / "data.jsonl", Path(model))
    engine = TransformersEngine(model, dtype=args.dtype, batch_tokens=args.batch_tokens)
    losses = {}
    for name, prompts in held_out(args).items():
        answers = {row["id"]: row["text"] for row in read_jsonl(args.output / f"answers_{name}.jsonl")}
        rows = [
            {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": answers[row["id"]]}]}
            for row in prompts
            if answers[row["id"]]
        ]
        losses[name] = list(completion_losses(engine.model, engine.tokenizer, rows, 2048))
        judged, params = prompts[: args.num_judged], GenerationParams(args.max_answer_tokens)
        answer(folder / f"answers_{name}.jsonl", judged, lambda: engine, params)
    write_atomically(folder / "losses.json", json.dumps(losses))


# What comes out


def judge_points(args: argparse.Namespace, sets: dict, wanted: list[tuple[str, int]], strong: Callable) -> None:
    """For every trained model and held-out prompt the margin of its answer over that of the target before training."""
    for arm, seed in wanted[1:]:
        folder, before = args.output / "points" / f"{arm}-{seed}", args.output / "points" / "target-0"
        if (folder / "margins.json").exists():
            continue
        margins = {}
        for name, prompts in sets.items():
            old, new = (
                {row["id"]: row["text"] for row in read_jsonl(own / f"answers_{name}.jsonl")}
                for own in (before, folder)
            )
            judged = prompts[: args.num_judged]
            pairs = [Pair(row["id"], row["prompt"], new[row["id"]], old[row["id"]]) for row in judged]
            with ResponseCache(args.output / "judge_calls.sqlite") as calls:
                scores = [own.scores for own in PairwiseJudge(strong(), mode="logprobs", cache=calls).judge(pairs)]
            # Equal answers have no scores, and no margin
            margins[name] = [own[0] - own[1] if own else 0.0 for own in scores]
        write_atomically(folder / "margins.json", json.dumps(margins))


def table(args: argparse.Namespace, sets: dict) -> str:
    """A row an arm: what training changed, and in how far that is another change than that of basic instructions."""
    measures = [(kind, name) for name in sets for kind in ("losses", "margins")]
    heads, spreads = [], []
    for kind, name in measures:
        rows, start = changes(args, kind, name)
        what = "judge's margin" if start is None else f"change of nats a token (was {start:.3f})"
        heads.append(f"{name}: {what}")
        spreads.append(Spread.of(rows.mean(axis=1), rows, fixed_seeds=args.train_seeds == 1))
    lines, arms = [], list(ARMS)
    for title, against in (("against the target before training", None), ("against basic", "basic")):
        lines += ["", f"| {title} | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
        for arm in arms:
            if arm != against:
                weights = np.array([(own == arm) - float(own == against) for own in arms])
                cells = (f"{weights @ own.mean:+.4f} ± {own.half_width(weights):.4f}" for own in spreads)
                lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def changes(args: argparse.Namespace, kind: str, name: str) -> tuple[np.ndarray, float | None]:
    """`(trainings, prompts, arms)`: what each prompt adds to a mean change, in units of one prompt; and what losses
    were."""

    def of(arm: str, seed: int) -> np.ndarray:
        path = args.output / "points" / f"{arm}-{seed}" / f"{kind}.json"
        return np.array(json.loads(path.read_text(encoding="utf-8"))[name])

    own = np.array([[of(arm, seed) for arm in ARMS] for seed in range(args.train_seeds)])
    if kind == "margins":
        return own.transpose(0, 2, 1), None
    nats, tokens = of("target", 0).T  # a ratio of sums: nats of all answers by their tokens
    own = (own[..., 0] - nats) / tokens.mean()
    own -= own.mean(axis=2, keepdims=True) * (tokens / tokens.mean() - 1)
    return own.transpose(0, 2, 1), float(nats.sum() / tokens.sum())


def tokens(args: argparse.Namespace) -> str:
    """What the strong model and the target had to read and write for all arms together, and how long that takes."""
    calls = collect(args.output / "gap")["calls"]
    read, written = calls["tokens_read"], calls["tokens_written"]
    hours = ", ".join(f"{written / speed / 3600:.1f} h at {speed:,} a second" for speed in (11, 40, 1500))
    return f"{calls['calls']:,} calls read {read:,} tokens and wrote {written:,}: writing takes {hours}"


if __name__ == "__main__":
    main()
