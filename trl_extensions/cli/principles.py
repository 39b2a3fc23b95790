"""`trl-ext principles`: let a model write a YAML of principles for a task, or check one that a person edited."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class PrincipleArguments:
    """What to write, with which model, and where."""

    task: str | None = field(
        default=None, metadata={"help": "What the principles are for, e.g. 'answer everyday questions'."}
    )
    num: int = field(default=4, metadata={"help": "Number of principles to write."})
    output: str = field(default="principles.yaml", metadata={"help": "YAML file to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace `output` if it exists."})
    model_name_or_path: str = field(
        default="embedded:smollm2-135m-instruct",
        metadata={"help": "Model that writes: a hub id, a directory, or the small embedded model (the default)."},
    )
    max_new_tokens: int = field(default=600, metadata={"help": "Most tokens in one answer of the model."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the first question; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, and of the constitutions `check` shows."})
    check: str | None = field(
        default=None, metadata={"help": "Only check this YAML file of principles and show three constitutions of it."}
    )


def main(argv: Sequence[str]) -> int:
    """Write principles to a YAML file, or check one.

    Raises:
        ValueError: An argument, a key of the config file or a principle is wrong; one line with the remedy.
    """
    from trl_extensions.cli.parser import OneLineParser
    from trl_extensions.core.generation import EngineArguments

    parser = OneLineParser((PrincipleArguments, EngineArguments), prog="trl-ext principles", allow_abbrev=False)
    args, engine_args = parser.parse_args_and_config(args=list(argv), fail_with_unknown_args=True)
    if args.check is not None:
        _check(args.check, args.seed)
    else:
        _write(args, engine_args)
    return 0


def _check(path: str, seed: int) -> None:
    from trl_extensions.sami.principles import load_principles, sample_constitutions

    principles = load_principles(path)
    print(f"{path}: {len(principles)} principles: {', '.join(principle.name for principle in principles)}")
    # One principle has only two constitutions.
    shown = min(3, 2 ** len(principles))
    for constitution in sample_constitutions(principles, shown, seed=seed, key="check"):
        print(f"\n[{constitution.label}]\n{constitution.text}")


def _write(args: PrincipleArguments, engine_args) -> None:
    from trl_extensions.core.generation import create_engine
    from trl_extensions.core.generation.types import GenerationParams
    from trl_extensions.embedded import resolve_model_name
    from trl_extensions.sami.principles import load_principles, save_principles, write_principles

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
    raw_path = output.with_name(output.name + ".raw.jsonl")
    principles = write_principles(engine, args.task, args.num, params=params, raw_path=raw_path)
    save_principles(output, principles, task=args.task)
    for principle in load_principles(output):
        print(f"{principle.name}: {principle.definition} | {principle.antithesis}")
    print(f"wrote {output}; edit it, then check it: trl-ext principles --check {output}", file=sys.stderr)
