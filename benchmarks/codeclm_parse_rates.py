"""How many replies of a model can be read, at every step of CodecLM: at once, after asking again, or never.

    python benchmarks/codeclm_parse_rates.py --seeds seeds.jsonl --gguf qwen2.5-0.5b-instruct.gguf --output runs/rates
    python benchmarks/codeclm_parse_rates.py --seeds seeds.jsonl --engine embedded:smollm2-135m-instruct ...

One model is strong, target and scorer, so that every step is its own. Killed, the same command goes on.
"""

import argparse
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.llama_server import LlamaServer
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.codeclm.pipeline.seeds import make_metadata
from trl_extensions.codeclm.pipeline.steps import (
    Decode,
    Encode,
    Propose,
    Rejected,
    Rewrite,
    Rubrics,
    Score,
    StepClient,
)
from trl_extensions.codeclm.report import collect, count_calls
from trl_extensions.codeclm.run import Engines
from trl_extensions.core.generation.client import ResponseCache
from trl_extensions.core.generation.replies import Unreadable, read_reply
from trl_extensions.core.judge.pairwise import Scores, read_scores


DESCRIPTION = "everyday requests: writing letters, comparing offers, explaining things to children, planning"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--num_seeds", type=int, default=20)
    parser.add_argument("--num_instructions", type=int, default=24)
    parser.add_argument("--engine", help="as the setting `strong` of a run")
    parser.add_argument("--gguf", type=Path, help="a model to be served by llama.cpp instead")
    parser.add_argument("--parallel", type=int, default=4, help="requests that its server answers at once")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config = CodecLMConfig(
        prompts=args.seeds, num_prompts=args.num_seeds, num_instructions=args.num_instructions, max_rounds=2,
        instructions_per_call=3, max_answer_tokens=128, gap_threshold=9, keep_truncated=True,
    )  # fmt: skip
    never = count_rejected()
    with ExitStack() as stack:
        if args.gguf:
            server = LlamaServer(args.gguf, parallel=args.parallel, context=args.parallel * 3072)
            address = stack.enter_context(server).base_url
            options = {"model": args.gguf.stem, "base_url": address, "concurrency": args.parallel, "timeout": 1800.0}
            # Else small models repeat themselves in a string until the limit cuts them off
            options["extra_body"] = {"dry_multiplier": 0.8}
            config.strong = options
        else:
            config.strong = args.engine
        engine = Engines(config).build("strong")
        codec = CodecLM(config, args.output, strong=engine, target=engine)
        print(codec.run())
        if not (args.output / "proposed.yaml").exists():
            print(make_metadata(engine, config, args.output / "proposed.yaml", description=DESCRIPTION, number=20))
    print(form_rates(args.output))
    steps = [*collect(args.output)["steps"], *count_calls(args.output / "proposed.calls.sqlite")]
    print("\n| step | asked | read at once | read after asking again | never |\n| --- | --- | --- | --- | --- |")
    for own in steps:
        asked, again = own["calls"] - own["retried"], own["retried"]
        shares = (asked - again, again - never[own["step"]], never[own["step"]])
        print(f"| {own['step']} | {asked} | {' | '.join(f'{share} ({share / asked:.1%})' for share in shares)} |")


def form_rates(folder: Path) -> str:
    """Of the first replies to every question that has a form: how many keep to it, whatever they say."""
    forms = {step.name: step.schema for step in (Encode, Decode, Rubrics, Rewrite, Score, Propose)}
    kept, asked = Counter(), Counter()
    for path in (folder / "calls.sqlite", folder / "proposed.calls.sqlite"):
        for row in ResponseCache(path).rows() if path.exists() else ():
            schema, reply = forms.get(row["step"]), row["reply"]
            if schema is None:
                continue
            asked[row["step"]] += 1
            read = read_scores if schema is Scores else partial(read_reply, schema=schema)
            try:
                read(reply["text"], truncated=reply["finish_reason"] != "stop")
            except Unreadable as error:
                print(f"{row['step']}: {error}: {reply['text'][:80]!r}")
            else:
                kept[row["step"]] += 1
    rows = (f"| {step} | {asked[step]} | {kept[step]} ({kept[step] / asked[step]:.1%}) |" for step in asked)
    return "\n".join(["", "| step | asked | first reply keeps to its form |", "| --- | --- | --- |", *rows])


def count_rejected() -> Counter[str]:
    """From now on, how many questions of each step were asked twice in vain."""
    never: Counter[str] = Counter()
    generate = StepClient.generate

    async def counted(self, step, about, **options):
        try:
            return await generate(self, step, about, **options)
        except Rejected as error:
            never[error.step] += not error.retryable
            raise

    StepClient.generate = counted
    return never


if __name__ == "__main__":
    main()
