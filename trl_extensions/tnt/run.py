"""A patch from end to end: sample the original, annotate, train, and evaluate on both axes.

A stage leaves a file when it is done, and is skipped when that is there: the same command resumes a killed run.

    output_dir/settings.json, report.md, report.json, evaluation.json, two_axes.png
    output_dir/original/   outputs.jsonl, annotated.jsonl (training prompts); eval_outputs.jsonl, eval_annotated.jsonl
    output_dir/train/      checkpoints and log;  output_dir/model/  the patched model or adapter
    output_dir/patched/    eval_outputs.jsonl, eval_annotated.jsonl
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from trl import ModelConfig

from ..core.generation import EngineArguments, ModelSource
from ..core.generation.sampling import load_outputs, sample_outputs
from ..core.generation.types import is_adapter_directory
from ..core.inputs import PromptArguments, Query
from ..core.runs.jsonl import read_jsonl
from ..core.runs.run import MUTABLE_ON_RESUME, Run, Stage, check_resume, mark_done, training_settings
from ..core.training.load import fit, last_checkpoint
from .annotate import Annotator, annotate_rows
from .config import AnnotatorArguments, TNTArguments, TNTConfig
from .data import load_training_rows
from .evaluation import evaluate_patch
from .report import write_report
from .trainer import TNTTrainer


_SAMPLING = {f.name for f in fields(PromptArguments)}
_MUTABLE_ON_RESUME = MUTABLE_ON_RESUME | {
    "eval_batch_tokens", "eval_dataset_name", "dataset_test_split", "original_model", "logs",
}  # fmt: skip


@dataclass
class TNTRun(Run):
    """One run: its settings, its folder (the `output_dir` of the configuration), and a method for each stage."""

    args: TNTArguments
    annotator_args: AnnotatorArguments
    engine_args: EngineArguments
    config: TNTConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir or "")
        self.patched = str(self.folder / "model")
        self.models = ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    @property
    def original(self) -> str:
        return self.model_args.model_name_or_path or ""

    def check(self) -> None:
        if not self.args.prompts:
            raise ValueError("`prompts` is missing: name a file or data set.")
        if not self.original:
            raise ValueError("`model_name_or_path` is missing: give a hub id, a directory or the embedded model.")
        if self.engine_args.engine != "endpoint" and self.engine_args.engine_model:
            raise ValueError("`engine_model` would sample from another model than is trained: leave it out.")
        if self.config.chat_template_path:
            raise ValueError("`chat_template_path` would apply to training only: put the template into the model.")
        if not self.args.greedy:
            raise ValueError("`greedy: false` leaves nothing to compare word for word: only `sample` takes it.")
        self.annotator_args.check()
        self.prompts()

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """What only training depends on binds once there is a checkpoint or a model."""
        args, model = asdict(self.args), asdict(self.model_args)
        sampling = {name: args[name] for name in sorted(_SAMPLING)} | {"seed": self.config.seed}
        sampling |= {name: model[name] for name in ("model_name_or_path", "model_revision")}
        sampling |= {"engine": self.engine_args.engine, "unwanted": self.annotator_args.settings()}
        training = training_settings(self.config, _MUTABLE_ON_RESUME) | model
        training |= {name: args[name] for name in sorted(args.keys() - _SAMPLING - _MUTABLE_ON_RESUME)}
        trained = Path(self.patched).exists() or last_checkpoint(str(self.folder / "train")) is not None
        sampled = (self.folder / "original").exists()
        return {"settings.json": (sampling, sampled), "training_settings.json": (training, trained)}

    def claim_training(self) -> None:
        values, trained = self.settings()["training_settings.json"]
        check_resume(self.folder / "training_settings.json", values, made=self.patched, started=trained)

    def stages(self) -> Iterator[Stage]:
        for name, side, done, label in (
            ("sample", "original", "original/sampling.json", "sampling the original's outputs to train on"),
            ("annotate", "original", "original/annotation.json", "marking what is unwanted in them"),
            ("sample_held_out", "original", "original/eval_sampling.json", "sampling answers to the held-out prompts"),
            ("train", "patched", "model", "training"),
            ("sample_held_out", "patched", "patched/eval_sampling.json", "sampling answers to the held-out prompts"),
            ("evaluate", "patched", "evaluation.json", "comparing the two"),
        ):
            if not (self.args.dataset_name and name in ("sample", "annotate")):
                yield Stage(name, side, self.folder / done, f"{side}: {label}")

    def execute(self, perform: Callable[[str, str], Any] | None = None) -> Path:
        if perform is None:  # else every stage has a process of its own, and this one has no use for models
            _ = self.annotators  # loaded now: what they lack is said before anything is sampled
        return super().execute(perform)

    def write_report(self) -> Path:
        return write_report(self.folder)

    # The stages

    def sample(self, side: str = "original") -> None:
        output = self.folder / side / "outputs.jsonl"
        report = self.sample_to(self.original, self.prompts()[0], output, self.args.num_samples, True)
        mark_done(self.folder / side / "sampling.json", report)

    def annotate(self, side: str = "original") -> None:
        folder = self.folder / side
        report = annotate_rows(load_outputs(folder / "outputs.jsonl"), self.annotators, folder / "annotated.jsonl")
        if not report.with_span:
            remedy = "use prompts that bring it out, more samples, or describe it otherwise"
            raise ValueError(f"none of the {report.rows} outputs is marked, so there is nothing to remove: {remedy}.")
        mark_done(folder / "annotation.json", report)

    def sample_held_out(self, side: str) -> None:
        report = self._answer_held_out(self.patched if side == "patched" else self.original, side)
        mark_done(self.folder / side / "eval_sampling.json", report)

    def train(self, side: str = "patched") -> None:
        """Train on the annotated outputs and leave the model at `output_dir/model`."""
        config = copy.copy(self.config)
        config.output_dir = str(self.folder / "train")
        source = self.args.dataset_name or str(self.folder / "original" / "annotated.jsonl")
        split, clean_ratio = self.args.dataset_train_split, self.args.clean_ratio
        rows = load_training_rows(source, split, clean_ratio=clean_ratio, seed=config.seed)
        held_out = None
        if self.args.eval_dataset_name:
            held_out = load_training_rows(self.args.eval_dataset_name, self.args.dataset_test_split)
        elif config.eval_strategy != "no":
            raise ValueError("`eval_strategy` needs `eval_dataset_name`: annotated outputs, not the final test's.")
        fit(TNTTrainer, self.model_args, config, rows, held_out, Path(self.patched))

    def evaluate(self, side: str = "patched") -> dict[str, Any]:
        return self._compare(self.original, self.patched)

    def evaluate_alone(self) -> dict[str, Any]:
        """Sample and compare `model_name_or_path` with `original_model`, outside of a run."""
        patched = self.original
        original = self.args.original_model or _base_of(patched)
        for side, model in (("original", original), ("patched", patched)):
            print(self._answer_held_out(model, side).summary)
        return self._compare(original, patched)

    # What the stages share

    @cached_property
    def annotators(self) -> list[Annotator]:
        return self.annotator_args.build()

    def prompts(self) -> tuple[list[Query], list[Query]]:
        return self.args.load_prompts(self.config.seed)

    def sample_to(self, model: str, prompts: list[Query], output: Path, num_samples: int, is_original: bool):
        sampler, args = self.models.sampler(model, is_original=is_original), self.args
        return sample_outputs(
            sampler, prompts, args.params(self.config.seed), output, greedy=args.greedy, num_samples=num_samples,
            system_prompt=args.system_prompt,
            conversational=not args.plain_prompts and self.models.is_conversational(),
        )  # fmt: skip

    def _answer_held_out(self, model: str, side: str):
        """Sample and mark answers to the held-out prompts; both sides with the same engine, so that they compare."""
        outputs = self.folder / side / "eval_outputs.jsonl"
        same = self.engine_args.engine != "endpoint"
        report = self.sample_to(model, self.prompts()[1], outputs, self.args.num_eval_samples, same)
        rows = load_outputs(outputs)
        print(annotate_rows(rows, self.annotators, self.folder / side / "eval_annotated.jsonl").summary)
        return report

    def _compare(self, original: str, patched: str) -> dict[str, Any]:
        engine = self.models.in_process(patched)
        behind_adapter = is_adapter_directory(patched) and _base_of(patched) == original
        before, after = (read_jsonl(self.folder / side / "eval_annotated.jsonl") for side in ("original", "patched"))
        return evaluate_patch(
            engine.model, engine.tokenizer, before, after, self.folder / "evaluation.json",
            original=None if behind_adapter else self.models.in_process(original).model,
            batch_tokens=self.args.eval_batch_tokens,
        )  # fmt: skip


def _base_of(model: str) -> str:
    if not is_adapter_directory(model):
        raise ValueError("`original_model` is missing: name the model before the patch.")
    from peft import PeftConfig

    return PeftConfig.from_pretrained(model).base_model_name_or_path
