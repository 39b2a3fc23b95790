"""CodecLM (arXiv 2404.05875): from seeds to instructions that one model answers well and another does not.

A run is a folder. Whatever is killed when, the same call again goes on with what is there, and no call of a model that
was finished is made again:

    settings.json     what the data depends on; another value is refused
    calls.jsonl       every finished call of a model
    metadata.jsonl    the metadata that instructions are decoded from, with the seeds they come from
    basics.jsonl      basic instructions; basics.json: how many were asked for, and dropped for which reason
    items.jsonl       what became of each of them: every version, answer and score
    set_aside.jsonl   replies that could not be read, and calls that were refused
    data.jsonl        the pairs; report.md, report.json and figures
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.generation.calls import CallLog
from ...core.generation.client import BudgetSpent, Caller
from ...core.generation.types import GenerationEngine
from ...core.runs.jsonl import JsonlWriter, read_jsonl, write_jsonl
from ...core.runs.report import write_atomically
from ...core.runs.run import check_resume
from ..config import FREE_FIELDS, CodecLMConfig
from ..export import ExportReport, export
from ..progress import Progress
from ..report import write_codeclm_report
from ..rows import stream_rows
from .asking import Asker, SetAside
from .chains import Chains
from .filters import InstructionFilters
from .metadata import Metadata, load_metadata
from .seeds import load_seeds
from .start import Basic, BasicInstructions, Origin, encode_seeds, gather, pair
from .steps import Decode, Encode
from .templates import load_template


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_LIVE_LOCAL = 256


@dataclass(frozen=True)
class CodecLMResult:
    """How a run ended.

    Args:
        report: The path of `report.md`.
        pairs: Pairs in `data.jsonl`.
        stopped: Why the run is not finished, e.g. a budget; None if it is.
        failed: Items that a failed call has left open; the same call again tries them again.
    """

    report: Path
    pairs: int
    stopped: str | None
    failed: int

    @property
    def unfinished(self) -> str | None:
        """Why the same call would go on; None if all is done."""
        return self.stopped or (f"{self.failed} calls failed" if self.failed else None)


class CodecLM:
    """Makes tailored instruction data.

    Args:
        config: What is made.
        output_dir: The run's folder.
        strong: Writes metadata, instructions and the answers to learn from.
        target: The model the data is for; needed for `selection="gap"`.
        scorer: Scores answers; the strong one if left out.
        prices: By role ("strong", "target", "scorer"): of a million tokens read, and a million written.
        seed: Of everything that is drawn: the same answers give the same data.

    Raises:
        ValueError: No seeds or metadata, no target, or a prompt that cannot be filled in.

    Example:

    ```python
    codec = CodecLM(CodecLMConfig(seeds="seeds.jsonl"), "runs/codec", strong=strong, target=target)
    codec.run()
    SFTTrainer(model, train_dataset=codec.dataset()).train()
    ```
    """

    def __init__(
        self,
        config: CodecLMConfig,
        output_dir: str | os.PathLike,
        *,
        strong: GenerationEngine,
        target: GenerationEngine | None = None,
        scorer: GenerationEngine | None = None,
        prices: dict[str, tuple[float, float]] | None = None,
        seed: int = 42,
    ):
        if not config.seeds and not config.metadata:
            raise ValueError("nothing to start from: set `seeds` (a file of instructions) or `metadata`.")
        if config.selection == "gap" and target is None:
            raise ValueError("`selection: gap` compares two models: give the `target` as well.")
        self.config = config
        self.folder = Path(output_dir)
        self.prices = prices or {}
        self.seed = seed
        self.engines = {"strong": strong, "scorer": scorer or strong}
        if target is not None:
            self.engines["target"] = target
        folder = config.prompt_folder
        self._encode, self._decode = Encode(folder, max_skills=config.max_skills), Decode(folder)
        self._failed = 0

    def run(self) -> CodecLMResult:
        """Carry out what is not done yet, export the pairs and write the report.

        Raises:
            ValueError: The folder belongs to other settings or to a process that is running; a seed file that cannot
                be read; not one seed that could be encoded.
            EndpointError: A server that cannot be used; what was made is kept.
        """
        return asyncio.run(self.arun())

    async def arun(self) -> CodecLMResult:
        """`run` inside an event loop that is running already, as that of a notebook."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                return await self._run()
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by another process: wait for it, or use another `output_dir`."
            ) from None

    def dataset(self) -> Dataset:
        """The pairs, ready for `SFTTrainer`."""
        from datasets import load_dataset

        return load_dataset("json", data_files=str(self.folder / "data.jsonl"), split="train")

    def export(self) -> ExportReport:
        """Filter what was kept once more and write `data.jsonl`."""
        return export(self.folder, self.config, self.seed)

    async def _run(self) -> CodecLMResult:
        calls = self.folder / "calls.jsonl"
        self._claim(in_use=calls.exists() and calls.stat().st_size > 0)
        self._failed, stopped = 0, None
        limits = {"max_calls": self.config.max_calls, "max_tokens": self.config.max_tokens}
        with CallLog(calls) as log, JsonlWriter(self.folder / "set_aside.jsonl") as aside:
            try:
                async with Caller(self.engines, log, prices=self.prices, **limits) as caller:
                    await self._make(caller, aside)
            except BudgetSpent as error:
                stopped = str(error)
        exported = self.export() if (self.folder / "items.jsonl").exists() else None
        result = CodecLMResult(self.folder / "report.md", exported.rows if exported else 0, stopped, self._failed)
        write_codeclm_report(self.folder, prices=self._prices_by_engine(), stopped=result.unfinished)
        return result

    async def _make(self, caller: Caller, aside: JsonlWriter) -> None:
        """Metadata, basic instructions, and what becomes of them."""
        recorded = {(row["step"], row["about"]) for row in read_jsonl(aside.path)}

        def set_aside(about: str, error: SetAside) -> None:
            if error.passing:
                self._failed += 1
                logger.warning("%s: %s; the same call again will try once more", about, error)
            elif (error.step, about) not in recorded:
                aside.append({"step": error.step, "about": about, "reason": error.reason, "raw": error.raw})

        filters = InstructionFilters(self.config)  # before anything is paid for
        with Progress(caller.usage) as progress:
            asker = Asker(caller, self.config, self.seed, progress.heard)
            if not (self.folder / "basics.jsonl").exists():
                progress.begin("metadata and basic instructions")
                await self._begin(asker, filters, set_aside)
            filters.forget()
            await self._follow(Chains(asker, self.config, filters, self.seed), progress, set_aside)

    async def _begin(self, asker: Asker, filters: InstructionFilters, set_aside: Any) -> None:
        """Make and write the basic instructions."""
        origins = await self._origins(asker, set_aside)
        self._check_failed()
        for number, origin in enumerate(origins):
            for place, text in enumerate(origin.seeds):
                filters.add(f"seed {number}/{place}", text)
        basics = BasicInstructions(asker, self._decode, self.config, filters, set_aside)
        made = await basics.make(origins)
        self._check_failed()
        if not made:
            raise ValueError(
                f"not one basic instruction is left (dropped: {dict(basics.drops) or 'none'}; replies that cannot be "
                "read are in set_aside.jsonl): the strong model is too weak, or the filters are too strict."
            )
        self._write_basics(basics, made, origins)

    def _check_failed(self) -> None:
        """Without the calls that failed there would be other data than the same answers give."""
        if self._failed:
            raise ValueError(
                f"calls for metadata and instructions have failed ({self._failed}); the same command makes them again."
            )

    async def _origins(self, asker: Asker, set_aside: Any) -> list[Origin]:
        if self.config.metadata:
            weighted = load_metadata(self.config.metadata, self.config.max_skills)
            origins = [Origin(metadata, weight) for metadata, weight in weighted]
        else:
            seeds = load_seeds(self.config.seeds, self.config.seed_column, self.config.num_seeds)
            origins = await encode_seeds(asker, self._encode, seeds, set_aside)
        return pair(origins, self.config, self.seed)

    def _write_basics(self, basics: BasicInstructions, made: list[Basic], origins: list[Origin]) -> None:
        write_jsonl(
            self.folder / "metadata.jsonl",
            (
                {**_as_json(origin.metadata), "weight": origin.weight, "asked": asked, "seeds": list(origin.seeds)}
                for origin, asked in zip(origins, basics.asked, strict=True)
            ),
        )
        counts = {"asked": sum(basics.asked), "made": len(made), "dropped": dict(basics.drops)}
        write_atomically(self.folder / "basics.json", json.dumps(counts, indent=2) + "\n")
        # Last: this file says that the others are there
        write_jsonl(
            self.folder / "basics.jsonl",
            (
                {"id": b.id, "metadata": _as_json(b.metadata), "seed": b.seed, "instruction": b.instruction}
                for b in made
            ),
        )

    async def _follow(self, chains: Chains, progress: Progress, set_aside: Any) -> None:
        """Follow the instructions that nothing is known of yet, a bounded number at once."""
        counts = self.folder / "basics.json"
        if not counts.exists():
            raise ValueError(f"{counts} is missing: metadata.jsonl, basics.json and basics.jsonl belong together.")
        total = json.loads(counts.read_text(encoding="utf-8"))["made"]
        with JsonlWriter(self.folder / "items.jsonl", sync_seconds=1.0) as items:
            done = {row["id"] for _, row in stream_rows(items.path)}
            progress.begin("following them up", total, len(done))
            waiting = (basic for basic in self._basics() if basic.id not in done)

            async def work() -> None:
                for basic in waiting:
                    try:
                        items.append(await chains.follow(basic))
                    except SetAside as error:
                        set_aside(basic.id, error)
                    progress.advance()

            try:
                await gather([work] * min(self._live(), max(total - len(done), 1)))
            finally:
                await chains.close()

    def _basics(self) -> Iterator[Basic]:
        for _, row in stream_rows(self.folder / "basics.jsonl"):
            metadata = Metadata(row["metadata"]["use_case"], tuple(row["metadata"]["skills"]))
            yield Basic(row["id"], metadata, row["seed"], row["instruction"])

    def _live(self) -> int:
        """Instructions followed at once: enough to keep every engine busy."""
        endpoints = {id(engine): getattr(engine, "concurrency", None) for engine in self.engines.values()}
        return sum(_LIVE_LOCAL if own is None else 2 * own for own in endpoints.values())

    def _claim(self, in_use: bool) -> None:
        """Write what the data depends on, or refuse a folder that was begun with something else."""
        source = self.config.seeds or self.config.metadata
        prompts = ("encode", "decode", "rubrics", "rewrite", "evol", "answer", "score", "score_one", "again")
        settings = {name: value for name, value in asdict(self.config).items() if name not in FREE_FIELDS}
        for name in ("strong", "target", "scorer"):
            settings[name] = self.engines[name].name if name in self.engines else None
        settings |= {
            "seed": self.seed,
            "content": _digest(Path(source).read_bytes()) if Path(source).is_file() else None,
        }
        settings["benchmarks"] = {path: _digest(Path(path).read_bytes()) for path in self.config.benchmarks}
        settings["prompts"] = {
            name: _digest(load_template(name, self.config.prompt_folder).path.read_bytes()) for name in prompts
        }
        check_resume(self.folder / "settings.json", settings, made=str(self.folder), started=in_use)

    def _prices_by_engine(self) -> dict[str, tuple[float, float]]:
        return {self.engines[role].name: price for role, price in self.prices.items() if role in self.engines}


def _as_json(metadata: Metadata) -> dict[str, Any]:
    return {"use_case": metadata.use_case, "skills": list(metadata.skills)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
