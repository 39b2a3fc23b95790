"""From seeds to a trained model: make the pairs, fine-tune the target on them, compare it before and after.

The folder is that of `CodecLM` (see `pipeline/codec.py`) and, with `train: true`, `training_settings.json`, `train/`
(checkpoints), `model/`, `held_out.json`, and `answers_*.jsonl`, `judgments.jsonl` and `comparison.json`.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import embedded
from ..core.generation import EngineArguments
from ..core.generation.client import ResponseCache
from ..core.generation.types import GenerationParams
from ..core.inputs import Query, is_file, load_queries
from ..core.judge.pairwise import PairwiseJudge
from ..core.runs.plan import Work, steps_of
from ..core.runs.run import Run, Stage, folder_lock, run_stages, training_settings
from .config import CodecLMArguments, CodecLMConfig
from .export import ExportReport, export
from .pipeline.codec import CodecLM, Engines
from .pipeline.metadata import load_metadata
from .pipeline.seeds import make_metadata, seeds_of
from .report import write_codeclm_report


if TYPE_CHECKING:
    from ..core.generation import ModelSource


class CodecLMRun(Run):
    """One run: `output`, an `SFTConfig`, is its folder, seed and training, and `model_args`, a `ModelConfig`, the
    target where it is trained, LoRA and quantisation."""

    remade: ClassVar = {"training_settings.json": "train model held_out.json answers_after* judg*.jsonl comparison*"}

    def __init__(self, args: CodecLMArguments, config: CodecLMConfig, output: Any, model_args: Any = None):
        self.args, self.config, self.output, self.model_args = args, config, output, model_args
        self.folder = Path(output.output_dir or "codeclm")
        against = config.decontaminate_against
        if args.benchmark and Path(args.benchmark).is_file() and args.benchmark not in against:
            config.decontaminate_against = [*against, args.benchmark]  # what is compared on is not trained on
        if model_args is not None and model_args.model_name_or_path:
            model_args.model_name_or_path = embedded.resolve_model_name(model_args.model_name_or_path)

    def engines(self) -> Engines:
        model = self.model_args.model_name_or_path if self.model_args else None
        return Engines(self.config, model, self.args.judge)

    def needs_processes(self) -> bool:
        """Whether stages should give back what they hold of a GPU."""
        return self.args.train and super().needs_processes()

    def execute(self, perform: Callable[[str, Any], Any] | None = None) -> Path:
        """As `Run.execute`; the pairs are made first, or as many of them as budgets allow."""
        perform = perform or self.perform
        self.check()
        with folder_lock(self.folder):
            perform("generate", None)
            if not self.args.train or not self.is_complete():
                return self.folder / "report.md"
            self.claim()
            run_stages(self.stages(), perform)
            return self.write_report()

    def check(self) -> None:
        if not self.config.prompts and not self.config.metadata:
            raise ValueError("nothing to start from: set `prompts` (a file of instructions) or `metadata`.")
        if self.config.prompts:
            seeds_of(self.config)
        for source in self.config.decontaminate_against:
            is_file(source)
        if self.config.metadata:
            load_metadata(self.config.metadata, self.config.max_skills)
        if "target" not in self.engines().specs and self.config.selection == "gap":
            raise ValueError("`target` is missing: `selection: gap` compares the strong model with it.")
        if not self.args.train:
            return
        if not self.model_args.model_name_or_path:
            raise ValueError("`train: true` needs `model_name_or_path`, the target.")
        if self.args.benchmark:
            self._benchmark()

    def servers(self) -> list[EngineArguments]:
        return [spec.arguments for spec in self.engines().specs.values()]

    def trainings(self) -> Iterator[Any]:
        if self.args.train:
            from ..core.training.preflight import Training
            from .training import _trainer

            row = {"prompt": "Hello", "completion": "Hello"}
            yield Training(partial(_trainer, None), self.model_args, self.output, [row, row])

    def works(self) -> Iterator[Work]:
        config, specs, number = self.config, self.engines().specs, self.config.num_instructions
        given = seeds_of(config) if config.prompts else load_metadata(str(config.metadata), config.max_skills)
        rounds, gap = config.max_rounds * (config.rewrite != "none"), config.selection == "gap"
        short, long, looked_at = config.max_new_tokens, config.max_answer_tokens, number * max(1, rounds * gap)
        begun = len(given) * (bool(config.prompts) + (config.rewrite == "rubrics"))
        begun += -(-number // config.instructions_per_call)
        scored = 2 * looked_at * gap * (2 if config.scoring == "logprobs" else 1)
        for stage, role, calls, read, written in (
            ("basic instructions", "strong", begun, short, short),
            ("rewrites", "strong", number * rounds, short, short),
            ("answers, strong", "strong", looked_at, short, long),
            ("answers, target", "target", looked_at * gap, short, long),
            ("scores", "scorer", scored, short + 2 * long, config.max_score_tokens),
        ):
            if calls:
                own = specs[role].arguments
                model = "" if own.engine == "endpoint" else str(own.engine_model)
                yield Work(stage, model, calls, read, written, prices=specs[role].prices)
        if self.args.train:
            steps, seen = steps_of(self.output, round(number * (1 - self.args.validation_share)), self.processes)
            yield Work("train", str(self.model_args.model_name_or_path), seen, trained=short + long, steps=steps)

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        values = training_settings(self.output) | asdict(self.model_args)
        values |= {"weight_by": self.args.weight_by, "validation_share": self.args.validation_share}
        values["data"] = hashlib.sha256((self.folder / "data.jsonl").read_bytes()).hexdigest()[:16]
        started = any((self.folder / name).exists() for name in ("model", "train"))
        return {"training_settings.json": (values, started)}

    def stages(self) -> Iterator[Stage]:
        yield Stage("train", None, self.folder / "model", "training the target on the pairs")
        if self.args.validation_share:
            yield Stage("measure", None, self.folder / "held_out.json", "likelihood of held-out pairs")
        if self.args.benchmark:
            yield Stage("compare", None, self.folder / "comparison.json", "comparing it with the strong model")

    def generate(self, of: None = None) -> None:
        engines = self.engines()
        roles = ["strong", "scorer", "target"] if self.config.selection == "gap" else ["strong"]
        own = {role: engines.build(role) for role in roles}
        prices = {role: spec.prices for role, spec in engines.specs.items()}
        codec = CodecLM(self.config, self.folder, prices=prices, seed=self.output.seed, **own)
        result = asyncio.run(codec.make_pairs())
        (self.folder / "stopped.txt").unlink(missing_ok=True)
        if result.unfinished:
            (self.folder / "stopped.txt").write_text(result.unfinished + "\n", encoding="utf-8")
            print(f"not finished: {result.unfinished}; the same command goes on from here")

    def train(self, of: None = None) -> None:
        """Fine-tune the target on the pairs."""
        from .training import train_on_data

        config = copy.copy(self.output)
        config.output_dir = str(self.folder / "train")
        data, model, share = self.folder / "data.jsonl", self.folder / "model", self.args.validation_share
        train_on_data(self.model_args, config, data, model, self.args.weight_by, validation=share)

    def measure(self, of: None = None) -> None:
        """The likelihood of held-out pairs before and after training."""
        from .training import compare_held_out, load_pairs, split_pairs

        rows = load_pairs(self.folder / "data.jsonl")
        _, held_out = split_pairs(rows, self.args.validation_share, self.output.seed)
        models, before, after = self._models()
        own = partial(models.in_process, before), partial(models.in_process, after)
        compare_held_out(held_out, *own, self.folder / "held_out.json", max_length=self.output.max_length)

    def compare(self, of: None = None) -> None:
        """Answers of the strong model and of the target before and after to the benchmark's prompts, and a judge."""
        from .comparison import compare

        engines, (models, before, after) = self.engines(), self._models()
        with ResponseCache(self.folder / "judge_calls.sqlite") as cache:
            compare(
                self.folder,
                self._benchmark(),
                {
                    "strong": partial(engines.build, "strong"),
                    "before": partial(models.sampler, before, is_original=True),
                    "after": partial(models.sampler, after, is_original=False),
                },
                lambda: PairwiseJudge(
                    engines.build("judge"),
                    mode=self.args.judge_mode,
                    params=GenerationParams(self.args.judge_max_new_tokens),
                    cache=cache,
                ),
                GenerationParams(self.config.max_answer_tokens),
            )

    def write_report(self) -> Path:
        """Write the report once more, with what training left."""
        specs = self.engines().specs.values()
        # By the names that engines will have, without loading any
        prices = {f"{own.arguments.engine}:{own.arguments.engine_model}": own.prices for own in specs}
        return write_codeclm_report(self.folder, prices=prices)

    def is_complete(self) -> bool:
        """Whether the pairs are all made: no budget was reached, and no call was left open."""
        return not (self.folder / "stopped.txt").exists()

    def export(self) -> ExportReport:
        """Filter and write the pairs once more."""
        return export(self.folder, self.config, self.output.seed, layout=self.args.format)

    def make_metadata(self) -> str:
        """Write metadata to edit; returns what to tell."""
        args, output = self.args, Path(self.args.output or self.folder / "metadata.yaml")
        own = {"description": args.description, "number": args.num_metadata, "seed": self.output.seed}
        made, unread = make_metadata(self.engines().build("strong"), self.config, output, **own)
        return f"{output}: {made} metadata to edit, {unread} replies that could not be read"

    def _benchmark(self) -> list[Query]:
        args, source = self.args, self.args.benchmark or ""
        return load_queries(source, column=args.benchmark_column, limit=args.num_benchmark_prompts, chats=True)

    def _models(self) -> tuple[ModelSource, str, str]:
        """What loads the target, and its names before and after training."""
        from ..core.generation import ModelSource

        source = ModelSource(self.model_args, EngineArguments(), self.output.trust_remote_code)
        return source, self.model_args.model_name_or_path, str(self.folder / "model")
