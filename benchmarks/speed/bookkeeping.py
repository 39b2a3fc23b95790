"""What CodecLM's bookkeeping costs by the number of instructions: no language model, but a stub that answers at once.

Each instruction is decoded, answered by strong and target, scored in both orders and kept at once: 4.2 calls. Counted
are all of them: the queue, the log on disk, near-duplicates, the export, the report.
"""

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.core.generation.types import Generation

from .measure import in_a_process, timed, with_peak


SIZES = (1_000, 10_000, 100_000)
_OF_A_METADATA = 100  # instructions
_WORDS = [a + b + c + d for a in "bdfgklmn" for b in "aeiou" for c in "prstvz" for d in "aeiou"]
_CONFIG = CodecLMConfig(metadata="-")


def measure_bookkeeping(rows: int) -> dict[str, float]:
    """One run in a fresh process.

    Returns:
        `rows`, `calls`, seconds `wall` and `cpu`, and `mb`, taken at the peak beyond the start.
    """
    return in_a_process(_measure, rows)


def _measure(rows: int) -> dict[str, float]:
    run_codec(10)  # what libraries load on first use
    calls = 0

    def run() -> None:
        nonlocal calls
        calls = run_codec(rows)

    seconds, mb = with_peak(lambda: timed(run))
    return {"rows": rows, "calls": calls, **seconds, "mb": mb}


def run_codec(rows: int) -> int:
    """Make as many pairs; the number of calls that took."""
    with tempfile.TemporaryDirectory() as folder:
        metadata = Path(folder) / "metadata.jsonl"
        metadata.write_text(
            "".join(
                json.dumps({"use_case": f"case {number}", "skills": [f"skill {number % 17}", "patience"]}) + "\n"
                for number in range(-(-rows // _OF_A_METADATA))
            )
        )
        config = CodecLMConfig(metadata=str(metadata), num_instructions=rows)
        strong, target = Stub("strong"), Stub("target")
        result = CodecLM(config, Path(folder) / "run", strong=strong, target=target).run()
        if result.pairs != rows:
            raise RuntimeError(f"{rows} pairs were to be made, not {result.pairs}: the numbers would mean nothing")
        return strong.calls + target.calls


class Stub:
    """Answers by the schema and the limit of tokens, which tell the steps apart."""

    def __init__(self, name: str):
        self.name, self.calls = name, 0

    def generate(self, prompts, params, seeds) -> Iterator[tuple[int, Generation]]:
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            self.calls += 1
            draw, schema = random.Random(seed), params.schema or ""
            if "new_instruction" in schema:
                text = json.dumps({"new_instruction": _instruction(draw)})
            elif "rubrics" in schema:
                own = {"rubric": f"Is it about {_words(draw, 6)}?", "action": f"Let it ask about {_words(draw, 6)}."}
                text = json.dumps({"rubrics": [own]})
            elif params.max_new_tokens == _CONFIG.max_new_tokens:
                text = json.dumps({"instructions": [_instruction(draw) for _ in range(5)]})
            elif params.max_new_tokens == _CONFIG.max_answer_tokens:
                text = f"the {self.name} one says so, " * 8
            else:
                question = prompt[-1]["content"]
                text = "9 3" if question.find("the strong one") < question.find("the target one") else "3 9"
            yield place, Generation(text, "stop", 20, 20)


def _instruction(draw: random.Random) -> str:
    return f"Describe {_words(draw, 12)}."


def _words(draw: random.Random, number: int) -> str:
    return " ".join(draw.choices(_WORDS, k=number))
