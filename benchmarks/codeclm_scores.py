"""Two ways to score the same answers: numbers that the scorer writes, and the expected score under its probabilities.

    python benchmarks/codeclm_scores.py RUN_FOLDER --scorer model.gguf [--limit 40]

Takes the scored versions of a finished CodecLM run, asks for the scores of each in both ways and both orders, and says
how often they can be read, how often the two orders contradict each other, how far apart the gaps are, and whether the
two ways agree. Calls are kept in RUN_FOLDER/scores_calls.sqlite.
"""

import argparse
import asyncio
import statistics
from pathlib import Path

from benchmarks.llama_server import LlamaServer
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import Pipeline
from trl_extensions.codeclm.pipeline.filters import InstructionFilters
from trl_extensions.codeclm.pipeline.steps import Rejected, StepClient, gather
from trl_extensions.core.generation.client import LLMClient, ResponseCache
from trl_extensions.core.generation.endpoint import EndpointEngine
from trl_extensions.core.runs.jsonl import read_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scorer", required=True, help="GGUF file")
    parser.add_argument("--limit", type=int, default=40, help="versions scored at most")
    args = parser.parse_args()
    versions = [
        (f"{item['id']}/{place}", version)
        for item in sorted(read_jsonl(args.folder / "items.jsonl"), key=lambda item: item["id"])
        for place, version in enumerate(item["rounds"])
        if "scores" in version
    ][: args.limit]
    with LlamaServer(args.scorer, parallel=4, context=4 * 2560) as server:
        engine = EndpointEngine(server.base_url, Path(args.scorer).stem, concurrency=4, timeout=1800.0)
        ways = {way: asyncio.run(score_all(engine, args.folder, way, versions)) for way in ("text", "logprobs")}
    print(f"{len(versions)} versions, each with two answers, scored in both orders\n")
    print("| | read | orders contradict | same gap as another | median of gaps beyond 0 | most common score |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, found in ways.items():
        print(f"| {way} | {describe(found, len(versions))} |")
    both = [(ways["text"][i], ways["logprobs"][i]) for i in ways["text"].keys() & ways["logprobs"].keys()]
    agree = [gap(one) * gap(two) > 0 for one, two in both if gap(one) and gap(two)]
    print(f"\nthe same side preferred in {sum(agree)} of {len(agree)} versions for which both prefer one")


async def score_all(engine, folder: Path, way: str, versions) -> dict[str, list[list[float]]]:
    """Both orders of scores, [strong, target] each, of every version whose scores can be read."""
    config = CodecLMConfig(prompts="unused", scoring=way, max_score_tokens=64)
    found: dict[str, list[list[float]]] = {}
    with ResponseCache(folder / "scores_calls.sqlite") as cache:
        async with LLMClient({"scorer": engine}, cache) as client:
            pipeline = Pipeline(StepClient(client, config, 0), config, InstructionFilters(config), 0)

            async def score(name: str, version: dict) -> None:
                own = {"instruction": version["instruction"], "answers": version["answers"]}
                try:
                    await pipeline.score(name, own)
                except Rejected:
                    return
                found[name] = own["orders"]

            await gather([lambda n=name, v=version: score(n, v) for name, version in versions])
    return found


def gap(orders: list[list[float]]) -> float:
    return sum(strong - target for strong, target in orders) / 2


def describe(found: dict[str, list[list[float]]], asked: int) -> str:
    gaps = [round(gap(orders), 6) for orders in found.values()]
    against = [(one[0] - one[1]) * (two[0] - two[1]) < 0 for one, two in found.values()]
    equal = sum(gaps.count(own) > 1 for own in gaps)
    beyond = [abs(own) for own in gaps if own]
    scores = [round(score, 6) for orders in found.values() for order in orders for score in order]
    common = max(set(scores), key=scores.count)
    return (
        f"{len(found)} of {asked} | {sum(against)} of {len(found)} | {equal} of {len(gaps)} | "
        f"{statistics.median(beyond) if beyond else 0:.3f} | {common:g} ({scores.count(common) / len(scores):.0%})"
    )


if __name__ == "__main__":
    main()
