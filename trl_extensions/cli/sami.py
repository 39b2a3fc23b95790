"""`trl-ext sami sample | train | evaluate | run`, one YAML for all four, and `trl-ext principles`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_extensions.core.options import option
from trl_extensions.embedded import EMBEDDED_ALIAS, resolve_model_name

from .method import Method, Result, saved, summary_of
from .parser import help_text, option_parser, wants_help


USAGE = """\
usage: trl-ext sami {sample,train,evaluate,run} [--config FILE] [--option VALUE ...]

  sample    sample responses to the training queries into output_dir/samples.jsonl
  train     train on sampled rows (--dataset_name rows.jsonl); takes --accelerate_config and accelerate's own options
  evaluate  mutual information, KL and lengths of a model on held-out queries
  run       rounds of sample, train and evaluate, and a report; the same command resumes after a kill

`trl-ext sami COMMAND --help` lists every option. A recipe YAML serves all four commands."""


def _options(argv: list[str]) -> Sequence[type]:
    from trl import ModelConfig

    from trl_extensions.core.generation import EngineArguments
    from trl_extensions.sami.config import SAMIArguments, SAMIConfig

    return SAMIArguments, EngineArguments, SAMIConfig, ModelConfig


def _make(args: Any, engine_args: Any, config: Any, model_args: Any) -> Any:
    from trl_extensions.sami.run import SAMIRun

    if model_args.model_name_or_path:
        model_args.model_name_or_path = resolve_model_name(model_args.model_name_or_path)
    return SAMIRun(args, engine_args, config, model_args)


def _train(run: Any) -> Result:
    run.train()
    return saved(run, run.folder / "model")


def _evaluate(run: Any) -> Result:
    result = run.evaluate()
    bound = "MI bound {mean:.3f} ± {se:.3f} nats".format_map(result["mi_bound"])
    right = f"which constitution? {result['accuracy_columns']['mean']:.0%}"
    rest = "of {max_bound:.2f} on {num_queries} queries, {length:.0f} tokens per response".format_map(result)
    kl = f"{result['kl']['mean']:.3f} nats per token" if "kl" in result else "not measured (set `original_model`)"
    text = f"{run.folder / 'evaluation.json'}: {bound} {rest}, {right}, KL to the original {kl}"
    if judged := result.get("win_rate"):
        counts = "{wins} wins, {ties} ties, {losses} losses, {unread} unread".format_map(judged)
        text += f"\n{run.folder / 'win_rate.json'}: {counts}, against {run.args.judge_against}"
    elif run.args.judge:
        text += "\nnot judged: set `judge_against` to the eval_samples.jsonl of another model"
    return Result(text, result)


@dataclass
class PrincipleArguments:
    """What to write, with which model, and where."""

    task: str | None = option(None, "What the principles are for, e.g. 'answer everyday questions'.")
    num: int = option(4, "Number of principles to write.")
    output: str = option("principles.yaml", "YAML file to write.")
    overwrite: bool = option(False, "Replace `output` if it exists.")
    model_name_or_path: str = option(EMBEDDED_ALIAS, "Model that writes: a hub id, a directory or the embedded model.")
    max_new_tokens: int = option(600, "Most tokens in one answer of the model.")
    temperature: float = option(0.0, "Temperature of the first question; 0 is greedy.")
    seed: int = option(0, "Seed of the sampling, and of the constitutions `check` shows.")
    check: str | None = option(None, "Only check this YAML file of principles and show three constitutions of it.")


def _principle_options(argv: list[str]) -> Sequence[type]:
    from trl_extensions.core.generation import EngineArguments

    return PrincipleArguments, EngineArguments


def _principles(argv: list[str]) -> Result:
    """Let a model write principles to a YAML file, or check one that a person edited."""
    if wants_help(argv):
        return Result(help_text("principles", _principle_options, argv))
    from trl_extensions.core.generation import create_engine
    from trl_extensions.core.generation.types import GenerationParams
    from trl_extensions.sami.principles import load_principles, save_principles, write_principles

    args, engine_args = option_parser("principles", _principle_options(argv)).parse_args_and_config(argv)
    if args.check is not None:
        from trl_extensions.sami.principles import sample_constitutions

        own = load_principles(args.check)
        texts = [f"{args.check}: {len(own)} principles: {', '.join(principle.name for principle in own)}"]
        # One principle has only two constitutions
        shown = sample_constitutions(own, min(3, 2 ** len(own)), seed=args.seed, key="check")
        texts += [f"\n[{constitution.label}]\n{constitution.text}" for constitution in shown]
        return Result("\n".join(texts), {"principles": [principle.as_dict() for principle in own]})
    output = Path(args.output)
    if not args.task or not args.task.strip():
        raise ValueError("`task` is missing; say what the principles are for: --task 'answer everyday questions'")
    if args.num < 1:
        raise ValueError(f"`num` is {args.num}; ask for at least 1 principle")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output}: exists already; give another --output, or --overwrite to replace it")
    params = GenerationParams(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    # An engine with a model of its own must not fetch the embedded one.
    model = None if engine_args.engine_model else resolve_model_name(args.model_name_or_path)
    engine = create_engine(engine_args, model)
    raw = output.with_name(output.name + ".raw.jsonl")
    save_principles(output, write_principles(engine, args.task, args.num, params=params, raw_path=raw), task=args.task)
    print(f"wrote {output}; edit it, then check it: trl-ext principles --check {output}", file=sys.stderr)
    own = load_principles(output)
    texts = [f"{one.name}: {' / '.join(one.wordings(True))} | {' / '.join(one.wordings(False))}" for one in own]
    return Result("\n".join(texts), {"output": output, "principles": [principle.as_dict() for principle in own]})


METHOD = Method(
    "sami",
    USAGE,
    _options,
    _make,
    {"sample": lambda run: summary_of(run.sample()), "train": _train, "evaluate": _evaluate},
    plain={"principles": _principles},
    trains=lambda command, argv: command != "sample",
)
main = METHOD.main


def principles(argv: Sequence[str]) -> int:
    return METHOD.main(["principles", *argv])
