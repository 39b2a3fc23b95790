"""CodecLM (arXiv 2404.05875): from seeds to instructions that one model answers well and another does not.

A run is a folder. Whatever is killed when, the same call again goes on with what is there, and no call of a model that
was finished is made again:

    settings.json     what the data depends on; another value is refused
    calls.sqlite      every finished call of a model
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
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import embedded
from ...core.generation import EngineArguments, create_engine, parse_engine
from ...core.generation.client import BudgetSpent, LLMClient, ResponseCache, Usage
from ...core.generation.types import GenerationEngine
from ...core.runs.jsonl import JsonlWriter, read_jsonl, write_jsonl
from ...core.runs.report import write_atomically
from ...core.runs.run import check_resume, folder_lock
from ..config import MUTABLE_FIELDS, CodecLMConfig
from ..export import ExportReport, export, stream_rows
from ..report import write_codeclm_report
from . import steps
from .filters import InstructionFilters, Screens
from .metadata import Metadata, load_metadata, sample_pairings
from .seeds import NO_METADATA, BasicInstruction, SetAside, decode_basics, encode_seeds, seeds_of


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_LIVE_LOCAL = 256
_FORMAT = 2  # of a folder: since 2, instructions are rewritten before they are compared


@dataclass(frozen=True)
class CodecLMResult:
    """How a run ended: the path of `report.md`, pairs in `data.jsonl`, the budget that stopped it, if one did, and
    items that a failed call has left open."""

    report: Path
    pairs: int
    stopped: str | None
    failed: int

    @property
    def unfinished(self) -> str | None:
        """Why the same call would go on; None if all is done."""
        return self.stopped or (f"{self.failed} calls failed" if self.failed else None)


class Engines:
    """What `strong`, `target` (default: `model`), `scorer` (the strong one) and `judge` (the scorer) stand for, loaded
    when they are first needed, and once where they are the same."""

    def __init__(self, config: CodecLMConfig, model: str | None = None, judge: str | None = None):
        if not config.strong:
            raise ValueError("`strong` is missing: name the model that writes instructions, see the docs.")
        scorer = config.scorer or config.strong
        own = {"strong": config.strong, "target": config.target or model, "scorer": scorer, "judge": judge or scorer}
        self.specs = {role: parse_engine(value, role) for role, value in own.items() if value}
        self._built: list[tuple[EngineArguments, GenerationEngine]] = []
        for role, spec in self.specs.items():
            if not spec.arguments.engine_model:
                raise ValueError(f"`{role}` names no model: add `model`.")
            if spec.arguments.engine != "endpoint":  # the embedded model's path and its alias are one engine
                path = embedded.resolve_model_name(spec.arguments.engine_model)
                self.specs[role] = replace(spec, arguments=replace(spec.arguments, engine_model=path))

    def build(self, role: str) -> GenerationEngine:
        """The engine of a role."""
        arguments = self.specs[role].arguments
        engine = next((engine for other, engine in self._built if other == arguments), None)
        if engine is None:
            engine = create_engine(arguments)
            self._built.append((arguments, engine))
        return engine


class CodecLM:
    """Makes tailored instruction data.

    Args:
        config: What is made.
        output_dir: The run's folder.
        strong: The engine that writes metadata, instructions and the answers to learn from; if left out, all engines
            and prices are those that `config` names.
        target: The model the data is for; needed for `selection="gap"`.
        scorer: Scores answers; the strong one if left out.
        prices: By role ("strong", "target", "scorer"): of a million tokens read, and a million written.
        seed: Of everything that is drawn: the same answers give the same data.

    Raises:
        ValueError: No seeds or metadata, or no target.

    Example:

    ```python
    config = CodecLMConfig(prompts="chats.jsonl", strong="a-70b-model", target="an-8b-model")
    SFTTrainer("an-8b-model", train_dataset=CodecLM(config, "runs/codec").dataset()).train()
    ```
    """

    def __init__(
        self,
        config: CodecLMConfig,
        output_dir: str | os.PathLike,
        *,
        strong: GenerationEngine | None = None,
        target: GenerationEngine | None = None,
        scorer: GenerationEngine | None = None,
        prices: dict[str, tuple[float, float]] | None = None,
        seed: int = 42,
    ):
        if not config.prompts and not config.metadata:
            raise ValueError("nothing to start from: set `prompts` (a file of instructions) or `metadata`.")
        if strong is None:
            engines = Engines(config)
            strong, scorer = engines.build("strong"), engines.build("scorer")
            target = engines.build("target") if "target" in engines.specs else None
            prices = {role: spec.prices for role, spec in engines.specs.items()}
        if config.selection == "gap" and target is None:
            raise ValueError("`selection: gap` compares two models: give the `target` as well.")
        self.config, self.folder, self.prices, self.seed = config, Path(output_dir), prices or {}, seed
        self.engines = {"strong": strong, "scorer": scorer or strong}
        if target is not None:
            self.engines["target"] = target
        self._failed = 0

    def run(self) -> CodecLMResult:
        """Carry out what is not done yet, export the pairs and write the report.

        Raises:
            ValueError: The folder belongs to other settings or to another process, or there are no usable seeds.
            EndpointError: A server that cannot be used; what was made is kept.
        """
        return asyncio.run(self.arun())

    async def arun(self) -> CodecLMResult:
        """`run` inside an event loop that is running already, as that of a notebook."""
        with folder_lock(self.folder):
            return await self.make_pairs()

    def dataset(self) -> Dataset:
        """The pairs, ready for `SFTTrainer`; made first (`run`) if there are none."""
        from datasets import load_dataset

        if not (self.folder / "data.jsonl").exists():
            self.run()
        return load_dataset("json", data_files=str(self.folder / "data.jsonl"), split="train")

    def export(self) -> ExportReport:
        """Filter what was kept once more and write `data.jsonl`."""
        return export(self.folder, self.config, self.seed)

    async def make_pairs(self) -> CodecLMResult:
        """`arun` for a caller that has the lock of the folder."""
        self._failed, stopped, config = 0, None, self.config
        # Tokens that a server does not count are counted by the target's tokenizer, where it runs in this process
        tokenizer = getattr(self.engines.get("target"), "tokenizer", None)
        with ResponseCache(self.folder / "calls.sqlite") as cache:
            self._claim(started=len(cache) > 0)
            with JsonlWriter(self.folder / "set_aside.jsonl") as aside:
                try:
                    async with LLMClient(
                        self.engines, cache, prices=self.prices, max_calls=config.max_calls,
                        max_tokens=config.max_tokens,
                        count_tokens=None if tokenizer is None else lambda text: len(tokenizer(text)["input_ids"]),
                    ) as client:  # fmt: skip
                        await self._make(client, aside)
                except BudgetSpent as error:
                    stopped = str(error)
        exported = self.export() if (self.folder / "items.jsonl").exists() else None
        result = CodecLMResult(self.folder / "report.md", exported.rows if exported else 0, stopped, self._failed)
        prices = {self.engines[role].name: price for role, price in self.prices.items() if role in self.engines}
        write_codeclm_report(self.folder, prices=prices, stopped=result.unfinished)
        return result

    async def _make(self, client: LLMClient, aside: JsonlWriter) -> None:
        """Metadata, basic instructions, and what becomes of them."""
        recorded = {(row["step"], row["about"]) for row in read_jsonl(aside.path)}

        def set_aside(about: str, error: steps.Rejected) -> None:
            if error.retryable:
                self._failed += 1
                logger.warning("%s: %s; the same call again will try once more", about, error)
            elif (error.step, about) not in recorded:
                aside.append({"step": error.step, "about": about, "reason": error.reason, "raw": error.raw})

        filters = InstructionFilters(self.config)  # before anything is paid for
        Screens(self.config)  # are asked last: one that cannot be loaded shows now
        asking = steps.StepClient(client, self.config, self.seed, foreign=filters.foreign)
        if not (self.folder / "basics.jsonl").exists():
            with _progress(client.usage, "metadata and basic instructions", unit="call") as answered:
                await self._begin(replace(asking, heard=answered), filters, set_aside)
        filters.forget()
        pipeline = Pipeline(asking, self.config, filters, self.seed)
        await self._run_items(pipeline, client.usage, set_aside)

    async def _begin(self, client: steps.StepClient, filters: InstructionFilters, set_aside: SetAside) -> None:
        """Make and write metadata and basic instructions."""
        config = self.config
        if config.metadata:
            origins = load_metadata(config.metadata, config.max_skills)
        else:
            origins = await encode_seeds(client, config, seeds_of(config), set_aside)
        self._check_failed()
        if not origins:
            raise ValueError(f"{NO_METADATA} (see set_aside.jsonl)")
        if config.pairing == "sampled":
            origins = sample_pairings(origins, max_skills=config.max_skills, seed=self.seed)
        for number, origin in enumerate(origins):
            for place, text in enumerate(origin.seeds):
                filters.add(f"seed {number}/{place}", text)
        made, asked, drops = await decode_basics(client, config, origins, filters, set_aside)
        self._check_failed()
        if not made:
            dropped = dict(drops) or "none, see set_aside.jsonl"
            raise ValueError(f"not one basic instruction is left (dropped: {dropped}): change filters or model")
        rows = [own.metadata.as_json() | {"weight": own.weight, "seeds": list(own.seeds)} for own in origins]
        rows = [row | {"asked": number} for row, number in zip(rows, asked, strict=True)]
        write_jsonl(self.folder / "metadata.jsonl", rows)
        counts = {"asked": sum(asked), "made": len(made), "dropped": dict(drops)}
        write_atomically(self.folder / "basics.json", json.dumps(counts, indent=2) + "\n")
        # Last: this file says that the others are there
        write_jsonl(self.folder / "basics.jsonl", (basic.as_json() for basic in made))

    def _check_failed(self) -> None:
        """Without the calls that failed there would be other data than the same answers give."""
        if self._failed:
            raise ValueError(f"calls for instructions failed ({self._failed}); the same command makes them again.")

    async def _run_items(self, pipeline: Pipeline, usage: Usage, set_aside: SetAside) -> None:
        """What becomes of the instructions of which nothing is known yet, a bounded number at once."""
        counts = self.folder / "basics.json"
        if not counts.exists():
            raise ValueError(f"{counts} is missing: metadata.jsonl, basics.json and basics.jsonl belong together.")
        total = json.loads(counts.read_text(encoding="utf-8"))["made"]
        with JsonlWriter(self.folder / "items.jsonl", sync_seconds=1.0) as items:
            done = {row["id"] for _, row in stream_rows(items.path)}
            options = {"total": total, "initial": len(done), "unit": "instruction"}
            with _progress(usage, "following them up", **options) as advance:

                async def work(basic: BasicInstruction) -> None:
                    try:
                        items.append(await pipeline.run_item(basic))
                    except steps.Rejected as error:
                        set_aside(basic.id, error)
                    advance()

                rows = (row for _, row in stream_rows(self.folder / "basics.jsonl") if row["id"] not in done)
                waiting = (partial(work, BasicInstruction.of(row)) for row in rows)
                # Enough at once to keep every engine busy
                bounds = {id(engine): getattr(engine, "concurrency", None) for engine in self.engines.values()}
                live = sum(_LIVE_LOCAL if own is None else 2 * own for own in bounds.values())
                try:
                    await steps.gather(waiting, min(live, max(total - len(done), 1)))
                finally:
                    await pipeline.close()

    def _claim(self, started: bool) -> None:
        """Write what the data depends on, or refuse a folder that was begun with something else."""
        config, source = self.config, self.config.prompts or self.config.metadata or ""
        settings = {name: value for name, value in asdict(config).items() if name not in MUTABLE_FIELDS}
        for old, new in (("seeds", "prompts"), ("seed_column", "prompt_column"), ("num_seeds", "num_prompts")):
            settings[old] = settings.pop(new)  # as in folders that were begun before these were renamed
        settings = {name: value for name, value in settings.items() if (name, value) != ("prompt_split", "train")}
        for name in ("strong", "target", "scorer"):
            settings[name] = self.engines[name].name if name in self.engines else None
        names = sorted(path.stem for path in steps.PROMPTS.glob("*.jinja") if path.stem != "propose")
        prompts = {name: steps.PromptTemplate(name, config.prompt_folder) for name in names}
        for setting in ("language", "audience"):
            files = [str(own.path) for name, own in prompts.items() if setting in own.unused and name != "again"]
            if getattr(config, setting) and files:
                logger.warning("`%s` is set, but these prompts say nothing of it: %s", setting, ", ".join(files))
        settings |= {
            "format": _FORMAT,
            "seed": self.seed,
            "content": _digest(source) if Path(source).is_file() else None,
            "decontaminate_against": {path: _digest(path) for path in config.decontaminate_against},
            "prompts": {name: _digest(own.path) for name, own in prompts.items()},
        }
        path = self.folder / "settings.json"
        earlier = path.read_text(encoding="utf-8") if started and path.exists() else ""
        if '"prompts"' in earlier and f'"format": {_FORMAT}' not in earlier:
            then = "which compared instructions before they were rewritten: `export` and `inspect` read it"
            raise ValueError(f"{self.folder} is of an earlier version, {then}; for new pairs, use another output_dir.")
        check_resume(path, settings, made=str(self.folder), started=started)


class Pipeline:
    """What becomes of basic instructions: versions, answers and scores, and one that is kept, or none.

    Self-Rubrics and contrastive filtering (arXiv 2404.05875, sections 3.2 and 3.3): a basic instruction is rewritten
    once before it is filtered, and again as often as it is turned back, `max_rounds` times at most, by another action
    each time. `filters` say what a rewritten instruction must still be, whatever other instructions there are.
    """

    def __init__(self, client: steps.StepClient, config: CodecLMConfig, filters: InstructionFilters, seed: int):
        self._client, self._config, self._filters, self._seed = client, config, filters, seed
        folder = config.prompt_folder
        self._rubrics, self._rewrite, self._evol = steps.Rubrics(folder), steps.Rewrite(folder), steps.Evol(folder)
        self._answer, self._score, self._score_one = steps.Answer(folder), steps.Score(folder), steps.ScoreOne(folder)
        self._rubrics_of: dict[Metadata, asyncio.Task[tuple[list[steps.Rubric], bool]]] = {}

    async def close(self) -> None:
        """Let go of rubrics that nobody waits for any more."""
        for task in self._rubrics_of.values():
            task.cancel()
        await asyncio.gather(*self._rubrics_of.values(), return_exceptions=True)

    async def run_item(self, basic: BasicInstruction) -> dict[str, Any]:
        """The whole history of a basic instruction, as a row of `items.jsonl`. Raises `Rejected` if a call failed that
        another run may make: then nothing is to be written."""
        by_gap = self._config.selection == "gap"
        rounds: list[dict[str, Any]] = [{"instruction": basic.instruction, "action": None}]
        item: dict[str, Any] = {"id": basic.id, "metadata": basic.metadata.as_json(), "seed": basic.seed}
        item |= {"rounds": rounds, "outcome": "dropped", "reason": None, "raw": None, "winner": None}
        item |= {"iteration": None, "scoring": self._config.scoring if by_gap else None}
        try:
            item |= await (self._by_gap if by_gap else self._unscored)(basic, rounds)
        except steps.Rejected as error:
            if error.retryable:
                raise
            item |= {"outcome": "set_aside", "reason": str(error), "raw": error.raw}
        return item

    async def _by_gap(self, basic: BasicInstruction, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Rewrites, the first one before anything is compared, until the scores of the two models are further apart
        than the threshold."""
        actions = await self._actions_for(basic)
        for action in actions or [""]:
            if action and not await self._rewrite_last(basic, rounds, action) and "scores" in rounds[-1]:
                continue
            await self._compare(f"{basic.id}/{len(rounds)}", rounds[-1])
            gap = rounds[-1]["scores"]["gap"]
            if abs(gap) > self._config.gap_threshold:
                return {"outcome": "kept", "winner": "strong" if gap > 0 else "target", "iteration": len(rounds)}
        left = not actions or len(actions) == self._config.max_rounds
        return {"reason": "no gap" if left else "no gap, and no action left"}

    async def _unscored(self, basic: BasicInstruction, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """The last of the versions that contrastive filtering may look at, or one of them drawn at random, with the
        strong model's answer."""
        actions = await self._actions_for(basic)
        if actions and self._config.selection == "random":
            actions = actions[: random.Random(f"{self._seed}/{basic.id}/version").randint(1, len(actions))]
        for action in actions:
            await self._rewrite_last(basic, rounds, action)
        answer, truncated = await self._answer_of("strong", f"{basic.id}/{len(rounds)}", rounds[-1])
        rounds[-1] |= {"answers": {"strong": answer}, "truncated": {"strong": truncated}}
        return {"outcome": "kept", "winner": "strong", "iteration": len(rounds)}

    async def _actions_for(self, basic: BasicInstruction) -> list[str]:
        """The actions of an instruction's rewrites in their order: drawn at random, and none twice."""
        if self._config.rewrite == "none":
            return []
        actions = list(steps.ACTIONS)
        if self._config.rewrite == "rubrics":
            actions = [rubric.action for rubric in await self._rubrics_for(basic.metadata)]
        draw = random.Random(f"{self._seed}/{basic.id}/actions")
        return draw.sample(actions, min(self._config.max_rounds, len(actions)))

    async def _rewrite_last(self, basic: BasicInstruction, rounds: list[dict[str, Any]], action: str) -> bool:
        """Add the next version with the action that led to it, if the filters let it pass; else the last one, which
        they did let pass, stays the last, with what they refused."""
        about, instruction = f"{basic.id}/{len(rounds) + 1}", rounds[-1]["instruction"]
        values, step = {"instruction": instruction}, self._rewrite
        if self._config.rewrite == "evol":
            step = self._evol
        else:
            values |= basic.metadata.as_json()
        rewritten, _ = await self._client.generate(step, about, action=action, **values)
        version = {"instruction": rewritten, "action": action}
        if reason := self._filters.check_alone(about, rewritten):
            rounds[-1].setdefault("refused", []).append(version | {"reason": reason})
        else:
            rounds.append(version)
        return not reason

    async def _rubrics_for(self, metadata: Metadata) -> list[steps.Rubric]:
        """The rubrics of metadata, asked for once."""
        if metadata not in self._rubrics_of:
            about = f"{metadata.use_case}/{'/'.join(metadata.skills)}"
            values = metadata.as_json() | {"number": self._config.num_rubrics}
            ask = self._client.generate(self._rubrics, about, **values)
            self._rubrics_of[metadata] = asyncio.create_task(ask)
        return (await asyncio.shield(self._rubrics_of[metadata]))[0]

    async def _compare(self, about: str, version: dict[str, Any]) -> None:
        """Both models' answers to a version and both orders of scores, added to its row as they come."""
        strong, target = await _both(*(self._answer_of(role, about, version) for role in ("strong", "target")))
        version["answers"] = {"strong": strong[0], "target": target[0]}
        version["truncated"] = {"strong": strong[1], "target": target[1]}
        await self.score(about, version)

    async def _answer_of(self, role: str, about: str, version: dict[str, Any]) -> tuple[str, bool]:
        instruction = version["instruction"]
        return await self._client.generate(self._answer, f"{about}/{role}", role=role, instruction=instruction)

    async def score(self, about: str, version: dict[str, Any]) -> None:
        """Both orders of scores of a version's two answers, added to its row."""
        instruction, (strong, target) = version["instruction"], (version["answers"][r] for r in ("strong", "target"))
        one, two = await _both(
            self._scores(f"{about}/1", instruction=instruction, first=strong, second=target),
            self._scores(f"{about}/2", instruction=instruction, first=target, second=strong),
        )
        version["orders"] = [[*one], [two[1], two[0]]]
        strong, target = (one[0] + two[1]) / 2, (one[1] + two[0]) / 2
        version["scores"] = {"strong": strong, "target": target, "gap": strong - target}

    async def _scores(self, about: str, **values: str) -> tuple[float, float]:
        if self._config.scoring == "text":
            return (await self._client.generate(self._score, about, role="scorer", **values))[0]
        sides = ("first", "second")
        one, two = await _both(*(self._client.score(self._score_one, which=side, **values) for side in sides))
        return one, two


async def _both(*coroutines: Any) -> list[Any]:
    """Results of all, side by side; once all have ended the error of the first in order, not in time, that failed."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, steps.Rejected)):
        raise error
    return results


@contextmanager
def _progress(usage: Usage, what: str, **options: Any) -> Iterator[Callable[..., None]]:
    """A bar with calls, tokens a second and cost behind it; what it gives is called when one more is done."""
    from tqdm.auto import tqdm

    with tqdm(desc=what, mininterval=1.0, **options) as bar:

        def advance(*_: Any) -> None:
            rate = usage.num_tokens / max(usage.seconds, 1e-9)
            values = {"calls": usage.calls + usage.cache_hits, "tokens/s": f"{rate:.0f}"}
            more = {"cost": f"{usage.cost:.2f}" if usage.cost else None, "failed": usage.failed or None}
            bar.set_postfix(values | {name: value for name, value in more.items() if value}, refresh=False)
            bar.update()

        yield advance


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
