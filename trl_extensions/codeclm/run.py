"""From seeds to a trained model: make the pairs, fine-tune the target on them, compare it before and after.

Every stage leaves a file when it is done and is skipped when that file is there, so the same command resumes a run
that was killed anywhere. The folder is that of `CodecLM` (see `codec.py`) and, with `train: true`:

    training_settings.json, train/    what the training depends on; checkpoints and log
    model/                            the target, trained on data.jsonl
    held_out.json                     the likelihood of pairs that were held out, before and after
    answers_*.jsonl, judgments.jsonl, comparison.json    both against the strong model on the benchmark's prompts
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.generation import EngineArguments
from ..core.generation.calls import CallLog
from ..core.generation.types import GenerationParams
from ..core.inputs import is_file, load_queries
from ..core.judge.pairwise import PairwiseJudge
from ..core.runs.run import MUTABLE_ON_RESUME, Stage, check_resume, run_stages, training_settings
from .arguments import CodecLMArguments, FolderArguments
from .config import CodecLMConfig
from .engines import Engines
from .export import ExportReport, export
from .pipeline.codec import CodecLM
from .pipeline.metadata import load_metadata
from .pipeline.propose import make_metadata
from .report import write_codeclm_report


if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

    from ..core.generation.models import ModelSource


class CodecLMRun:
    """One run: its settings, its folder, and a method for each stage.

    Args:
        args: What happens with the pairs.
        config: What is made.
        place: The folder and the seed: `FolderArguments`, or an `SFTConfig` where there is training.
        model_args: The target where it is trained, LoRA and quantisation.
    """

    def __init__(
        self,
        args: CodecLMArguments,
        config: CodecLMConfig,
        place: FolderArguments | SFTConfig,
        model_args: ModelConfig | None = None,
    ):
        self.args, self.config, self.place, self.model_args = args, config, place, model_args
        self.folder = Path(place.output_dir or "codeclm")
        if args.benchmark and Path(args.benchmark).is_file() and args.benchmark not in config.benchmarks:
            config.benchmarks = [*config.benchmarks, args.benchmark]  # what is compared on is not trained on
        if model_args is not None and model_args.model_name_or_path:
            from ..embedded import resolve_model_name

            model_args.model_name_or_path = resolve_model_name(model_args.model_name_or_path)

    def engines(self) -> Engines:
        """What the settings name; raises `ValueError` where one cannot be read."""
        model = self.model_args.model_name_or_path if self.model_args else None
        return Engines(self.config, model, self.args.judge)

    def needs_processes(self) -> bool:
        """Whether stages should give back what they hold of a GPU."""
        if not self.args.train:
            return False
        import torch

        return torch.cuda.is_available()

    def stages(self) -> Iterator[Stage]:
        """Every stage after the pairs are made: its method's name, and the file that says it is done."""
        yield Stage("train", "", self.folder / "model", "training the target on the pairs")
        if self.args.validation_share:
            yield Stage("measure", "", self.folder / "held_out.json", "likelihood of held-out pairs")
        if self.args.benchmark:
            yield Stage("compare", "", self.folder / "comparison.json", "comparing it with the strong model")

    def execute(self, perform: Callable[[str, str], Any] | None = None) -> Path:
        """Carry out what is not done yet and write the report.

        Args:
            perform: Carries out one stage given its method's name; in this process if left out.

        Returns:
            The path of `report.md`.
        """
        self.check_inputs()
        perform = perform or self.perform
        perform("generate", "")
        if not self.args.train or not self.is_complete():
            return self.folder / "report.md"
        run_stages(self.stages(), perform)
        return self.report()

    def perform(self, name: str, of: str = "") -> None:
        """Carry out one stage in this process."""
        getattr(self, name)()

    def check_inputs(self) -> None:
        """Raise a one-line `ValueError` for what is missing before anything is loaded."""
        if not self.config.seeds and not self.config.metadata:
            raise ValueError("nothing to start from: set `seeds` (a file of instructions) or `metadata`.")
        if self.config.seeds:
            is_file(self.config.seeds)
        else:
            load_metadata(self.config.metadata, self.config.max_skills)
        specs = self.engines().specs
        if self.config.selection == "gap" and "target" not in specs:
            raise ValueError("`target` is missing: `selection: gap` compares the strong model with it.")
        for name in specs:
            if not specs[name].arguments.engine_model:
                raise ValueError(f"`{name}` names no model: add `model`.")
        if not self.args.train:
            return
        if not self.model_args.model_name_or_path:
            raise ValueError("`train: true` needs `model_name_or_path`, the target.")
        if self.args.benchmark:
            self.benchmark()

    # The stages

    def generate(self) -> None:
        """Make the pairs, or as many as the budget allows."""
        engines = self.engines()
        roles = ["strong", "scorer", "target"] if self.config.selection == "gap" else ["strong"]
        own = {role: engines.build(role) for role in roles}
        result = CodecLM(self.config, self.folder, prices=engines.prices, seed=self.place.seed, **own).run()
        (self.folder / "stopped.txt").unlink(missing_ok=True)
        if result.unfinished:
            (self.folder / "stopped.txt").write_text(result.unfinished + "\n", encoding="utf-8")
            print(f"not finished: {result.unfinished}; the same command goes on from here")

    def train(self) -> None:
        """Fine-tune the target on the pairs."""
        from .training import train_on_data

        config = copy.copy(self.place)
        config.output_dir = str(self.folder / "train")
        data = self.folder / "data.jsonl"
        settings = training_settings(self.place, MUTABLE_ON_RESUME) | asdict(self.model_args)
        settings |= {"weight_by": self.args.weight_by, "validation_share": self.args.validation_share}
        settings["data"] = self._digest()
        check_resume(
            self.folder / "training_settings.json",
            settings,
            made=str(self.folder / "model"),
            started=any((self.folder / name).exists() for name in ("model", "train")),
        )
        share = self.args.validation_share
        train_on_data(self.model_args, config, data, self.folder / "model", self.args.weight_by, validation=share)

    def measure(self) -> None:
        """The likelihood of held-out pairs before and after training."""
        from .training import compare_held_out, load_pairs, split_pairs

        trained = json.loads((self.folder / "training_settings.json").read_text(encoding="utf-8"))["data"]
        if trained != self._digest():
            raise ValueError(
                f"{self.folder / 'data.jsonl'} is not what {self.folder / 'model'} was trained on, so that nothing is "
                "held out: go back to the settings it was exported with, or train anew."
            )
        rows = load_pairs(self.folder / "data.jsonl")
        _, held_out = split_pairs(rows, self.args.validation_share, self.place.seed)
        models = self._models()
        compare_held_out(
            held_out,
            partial(models.in_process, self.model_args.model_name_or_path),
            partial(models.in_process, str(self.folder / "model")),
            self.folder / "held_out.json",
            max_length=self.place.max_length,
        )

    def compare(self) -> None:
        """Answers of the strong model and of the target before and after to the benchmark's prompts, and a judge."""
        from .comparison import compare

        engines, models = self.engines(), self._models()
        with CallLog(self.folder / "judge_calls.jsonl") as log:
            compare(
                self.folder,
                self.benchmark(),
                {
                    "strong": partial(engines.build, "strong"),
                    "before": partial(models.sampler, self.model_args.model_name_or_path, is_original=True),
                    "after": partial(models.sampler, str(self.folder / "model"), is_original=False),
                },
                lambda: PairwiseJudge(engines.build("judge"), mode=self.args.judge_mode, log=log),
                GenerationParams(self.config.max_answer_tokens),
            )

    # What the stages share

    def report(self) -> Path:
        """Write the report once more, with what training left."""
        engines = self.engines()
        # The names that engines will have, without loading any
        prices = {_name(spec.arguments): spec.prices for spec in engines.specs.values() if any(spec.prices)}
        return write_codeclm_report(self.folder, prices=prices)

    def benchmark(self) -> list:
        """The prompts that models are compared on."""
        args = self.args
        return load_queries(args.benchmark, column=args.benchmark_column, limit=args.num_benchmark_prompts, chats=True)

    def export(self) -> ExportReport:
        """Filter and write the pairs once more."""
        if not (self.folder / "items.jsonl").exists():
            raise ValueError(f"{self.folder} holds no items.jsonl: `run` makes the pairs first.")
        return export(self.folder, self.config, self.place.seed, layout=self.args.format)

    def make_metadata(self) -> str:
        """Write metadata to edit; returns what to tell."""
        output = Path(self.args.output or self.folder / "metadata.yaml")
        made, unread = make_metadata(
            self.engines().build("strong"),
            self.config,
            output,
            description=self.args.description,
            number=self.args.num_metadata,
            seed=self.place.seed,
        )
        return f"{output}: {made} metadata to edit, {unread} replies that could not be read"

    def is_complete(self) -> bool:
        """Whether the pairs are all made: no budget was reached, and no call was left open."""
        return not (self.folder / "stopped.txt").exists()

    def _digest(self) -> str:
        return hashlib.sha256((self.folder / "data.jsonl").read_bytes()).hexdigest()[:16]

    def _models(self) -> ModelSource:
        from ..core.generation.models import ModelSource

        return ModelSource(self.model_args, EngineArguments(), self.place.trust_remote_code)


def _name(arguments: EngineArguments) -> str:
    """The name of the engine that `create_engine` makes of these."""
    return f"{arguments.engine}:{arguments.engine_model}"
