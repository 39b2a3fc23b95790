"""The outer loop of SAMI, expert iteration (arXiv 2404.14313, section 3.3).

Each round samples from the model of the round before and trains the original again.

Every stage of every round leaves a file when it is done and is skipped when that file is there, so the same command
resumes a run that was killed anywhere. A round has its own folder and nothing in it is written twice:

    output_dir/settings.json, report.md, report.json, rounds.png
    output_dir/round_0/   the original: eval_samples.jsonl, evaluation.json
    output_dir/round_1/   samples.jsonl, train/ (checkpoints, log), model/, eval_samples.jsonl, evaluation.json
"""

import copy
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..core.generation import (
    EngineArguments,
    GenerationEngine,
    GenerationParams,
    TransformersEngine,
    create_engine,
)
from ..core.jsonl import read_jsonl
from ..core.settings import claim_settings
from .arguments import SAMIArguments
from .evaluation import evaluate_rows
from .principles import Principle, load_principles
from .queries import Query, load_queries
from .sami_config import SAMIConfig
from .sampling import load_rows, sample_rows, to_dataset
from .templates import SAMPLING_TEMPLATE, TRAINING_TEMPLATE


if TYPE_CHECKING:
    from .sami_trainer import SAMITrainer

logger = logging.getLogger(__name__)

# Settings that may change between a kill and the restart: they decide where and how fast, not what
_FREE_SETTINGS = {
    "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id", "log_level",
    "log_level_replica", "logging_steps", "logging_strategy", "logging_first_step", "save_steps", "save_strategy",
    "save_total_limit", "hub_token", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo",
    "resume_from_checkpoint", "dataloader_num_workers", "dataset_num_proc", "use_cpu", "local_rank", "ddp_backend",
    "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps",
}  # fmt: skip


@dataclass
class SAMIRun:
    """One run: its settings, its folder, and a method for each stage.

    Args:
        args: Queries, principles, sampling and rounds.
        engine_args: What samples.
        config: The trainer's configuration; `output_dir` is the run's folder.
        model_args: The original model, LoRA and quantisation.
    """

    args: SAMIArguments
    engine_args: EngineArguments
    config: SAMIConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)

    def round_folder(self, round_: int) -> Path:
        return self.folder / f"round_{round_}"

    def model_of(self, round_: int) -> str:
        """The model a round ends with; round 0 is the original."""
        return str(self.round_folder(round_) / "model") if round_ else self.model_args.model_name_or_path

    def claim(self) -> None:
        """Write the run's settings, or refuse to resume a run that was started with others."""
        config = {
            name: value
            for name, value in self.config.to_dict().items()
            if name in {f.name for f in fields(SAMIConfig)} - _FREE_SETTINGS
        }
        args = {name: value for name, value in asdict(self.args).items() if name != "rounds"}
        engine = {"engine": self.engine_args.engine, "engine_model": self.engine_args.engine_model}
        settings = {**args, **engine, **asdict(self.model_args), **config}
        if self.args.principles:
            settings["principles_in_file"] = [asdict(p) for p in load_principles(self.args.principles)]
        claim_settings(
            self.folder / "settings.json", settings, made=str(self.folder), in_use=self.round_folder(0).exists()
        )

    def stages(self) -> Iterator[tuple[str, int, Path]]:
        """Every stage in order: its method's name, its round, and the file that says it is done."""
        yield "sample_evaluation", 0, self.round_folder(0) / "eval_sampling.json"
        yield "evaluate", 0, self.round_folder(0) / "evaluation.json"
        for round_ in range(1, self.args.rounds + 1):
            folder = self.round_folder(round_)
            yield "sample", round_, folder / "sampling.json"
            yield "train", round_, folder / "model"
            yield "sample_evaluation", round_, folder / "eval_sampling.json"
            yield "evaluate", round_, folder / "evaluation.json"

    def execute(self, perform: Callable[[str, int], Any] | None = None) -> Path:
        """Carry out what is not done yet and write the report.

        Args:
            perform: Carries out one stage given its method's name and round; in this process when left out.

        Returns:
            The path of `report.md`.
        """
        from .run_report import write_run_report

        self.check_inputs()
        self._accumulation()
        self.claim()
        for name, round_, done in self.stages():
            if done.exists():
                logger.warning("round %d: %s is done already (%s)", round_, name, done)
                continue
            logger.warning("round %d: %s", round_, name)
            (perform or self.perform)(name, round_)
        return write_run_report(self)

    def perform(self, name: str, round_: int) -> None:
        """Carry out one stage in this process."""
        getattr(self, name)(round_)

    # The stages

    def sample(self, round_: int) -> None:
        """Sample training rows from the model of the round before, on this round's half of the queries."""
        folder = self.round_folder(round_)
        report = sample_rows(
            self._sampler(self.model_of(round_ - 1), is_original=round_ == 1),
            self.training_half(round_),
            self.principles(),
            sampling_template=self.args.sampling_template or SAMPLING_TEMPLATE,
            output=folder / "samples.jsonl",
            filters=self.args.filters(),
            needed=self.args.steps_of(round_) * self.args.queries_per_step,
            **self.sampling_settings(),
        )
        if report.kept < self.args.queries_per_step:
            raise ValueError(
                f"round {round_}: only {report.kept} of {report.sampled} sampled rows were kept ({report.dropped}), "
                f"fewer than queries_per_step={self.args.queries_per_step}: give more queries, raise `max_new_tokens` "
                "or lower `queries_per_step`."
            )
        self._finish(folder / "sampling.json", report)

    def train(self, round_: int) -> None:
        """Train the original on this round's rows, one gradient step per `queries_per_step` of them."""
        folder = self.round_folder(round_)
        rows = load_rows(folder / "samples.jsonl")
        steps = min(self.args.steps_of(round_), len(rows) // self.args.queries_per_step)
        held_out = load_rows(self.round_folder(0) / "eval_samples.jsonl")
        config = copy.copy(self.config)
        config.output_dir = str(folder / "train")
        config.max_steps = steps
        config.gradient_accumulation_steps = self._accumulation()
        self.fit(
            to_dataset(rows[: steps * self.args.queries_per_step]), to_dataset(held_out), config, folder / "model"
        )

    def sample_evaluation(self, round_: int) -> None:
        """Sample responses to the held-out queries from this round's model, with the training prompt."""
        self._sample_held_out(self.model_of(round_), self.round_folder(round_), is_original=round_ == 0)

    def evaluate(self, round_: int) -> None:
        """Score this round's model on its own held-out responses and on those of the original."""
        originals = load_rows(self.round_folder(0) / "eval_samples.jsonl") if round_ else None
        self._score(self.model_of(round_), self.round_folder(round_), self.model_of(0), originals)

    def evaluate_alone(self) -> dict[str, Any]:
        """Sample and score `model_name_or_path` on the held-out queries, outside of any round."""
        model = self.model_args.model_name_or_path
        self._sample_held_out(model, self.folder, is_original=True)
        return self._score(model, self.folder, self.args.original_model, None)

    def evaluate_model(self, model: str, folder: Path) -> dict[str, Any]:
        """Sample and score another model as the rounds of this (finished) run were; results go to `folder`."""
        self._sample_held_out(model, folder, is_original=False)
        originals = load_rows(self.round_folder(0) / "eval_samples.jsonl")
        return self._score(model, folder, self.model_of(0), originals)

    # What the stages share

    def trainer(self, rows: Dataset, held_out: Dataset | None, config: SAMIConfig) -> "SAMITrainer":
        """The trainer of the original on some rows."""
        from .sami_trainer import SAMITrainer

        config.model_init_kwargs = {
            "revision": self.model_args.model_revision,
            "trust_remote_code": config.trust_remote_code,
            "attn_implementation": self.model_args.attn_implementation,
            "dtype": self.model_args.dtype,
        } | (config.model_init_kwargs or {})
        return SAMITrainer(
            self.model_args.model_name_or_path,
            config,
            train_dataset=rows,
            eval_dataset=held_out,
            quantization_config=get_quantization_config(self.model_args),
            peft_config=get_peft_config(self.model_args),
        )

    def fit(self, rows: Dataset, held_out: Dataset | None, config: SAMIConfig, target: Path) -> None:
        """Train on rows and leave the model at `target`, whole or not at all; resumes from the last checkpoint."""
        if target.exists():
            raise ValueError(f"{target} exists already and is not overwritten: give another `output_dir`.")
        trainer = self.trainer(rows, held_out, config)
        checkpoint = get_last_checkpoint(config.output_dir) if os.path.isdir(config.output_dir) else None
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or checkpoint)
        partial = target.with_name(target.name + ".partial")
        if trainer.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
            trainer.state.save_to_json(str(Path(config.output_dir) / "trainer_state.json"))
        trainer.save_model(str(partial))
        trainer.create_model_card(model_name=self.folder.name)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            os.replace(Path(config.output_dir) / "README.md", partial / "README.md")
            os.replace(partial, target)
        if trainer.accelerator.num_processes > 1:
            trainer.end()

    @staticmethod
    def training_rows(source: str, split: str) -> Dataset:
        """Rows to train on: the kept ones of a file `sample` wrote, or a data set with the trainer's columns."""
        if source.endswith(".jsonl"):
            if not os.path.isfile(source):
                raise ValueError(f"{source}: there is no such file; run `trl-ext sami sample` first.")
            rows = read_jsonl(source)
            return to_dataset(load_rows(source)) if rows and "kept" in rows[0] else Dataset.from_list(rows)
        return load_dataset(source, split=split)

    def queries(self) -> tuple[list[Query], list[Query]]:
        """Training and held-out queries: one seeded shuffle, the first `num_eval_queries` held out."""
        args, queries = self.args, self.all_queries()
        if len(queries) < args.num_eval_queries + 2:
            raise ValueError(
                f"{args.queries} holds {len(queries)} queries; with num_eval_queries={args.num_eval_queries} held out "
                "at least 2 must be left for training: give more queries or lower `num_eval_queries`."
            )
        random.Random(self.config.seed).shuffle(queries)
        return queries[args.num_eval_queries :], queries[: args.num_eval_queries]

    def all_queries(self) -> list[Query]:
        """The queries as they lie in their source."""
        args = self.args
        return load_queries(
            args.queries,
            column=args.query_column,
            pattern=args.query_pattern,
            split=args.query_split,
            limit=args.num_queries,
        )

    def training_half(self, round_: int) -> list[Query]:
        """The queries of a round: two halves that take turns."""
        return self.queries()[0][(round_ - 1) % 2 :: 2]

    def _sample_held_out(self, model: str, folder: Path, *, is_original: bool) -> None:
        report = sample_rows(
            self._sampler(model, is_original),
            self.queries()[1],
            self.principles(),
            sampling_template=self.config.prompt_template or TRAINING_TEMPLATE,
            output=folder / "eval_samples.jsonl",
            filters=self.args.evaluation_filters(),
            **self.sampling_settings(),
        )
        self._finish(folder / "eval_sampling.json", report)

    def _score(self, model: str, folder: Path, original: str | None, fixed_rows: list | None) -> dict[str, Any]:
        engine = self._in_process(model)
        separate = original not in (None, model) and not hasattr(engine.model, "peft_config")
        return evaluate_rows(
            engine.model,
            engine.tokenizer,
            load_rows(folder / "eval_samples.jsonl"),
            folder / "evaluation.json",
            original=self._in_process(original).model if separate else None,
            fixed_rows=fixed_rows,
            batch_tokens=self.args.eval_batch_tokens,
        )

    def sampling_settings(self) -> dict[str, Any]:
        """Arguments of `sample_rows` that training and evaluation share."""
        args = self.args
        return {
            "training_template": self.config.prompt_template or TRAINING_TEMPLATE,
            "num_constitutions": args.num_constitutions,
            "params": GenerationParams(
                args.max_new_tokens, args.temperature, args.top_p, tuple(args.stop), self.config.seed
            ),
            "seed": self.config.seed,
            "conversational": self._conversational(),
        }

    def _conversational(self) -> bool:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_args.model_name_or_path).chat_template is not None

    def _sampler(self, model: str, is_original: bool) -> GenerationEngine:
        """What samples from a model: the configured engine, or transformers where an endpoint cannot serve it."""
        if self.engine_args.engine != "endpoint" or is_original:
            return create_engine(self.engine_args, model)
        logger.warning("the endpoint serves the original only: %s samples in this process", model)
        return self._in_process(model)

    def _in_process(self, model: str) -> TransformersEngine:
        return TransformersEngine(
            model, batch_tokens=self.engine_args.engine_batch_tokens, dtype=self.engine_args.engine_dtype
        )

    def principles(self) -> list[Principle]:
        """The principles constitutions are built from."""
        return load_principles(self.args.principles)

    def _accumulation(self) -> int:
        per_step = self.config.per_device_train_batch_size * self.config.world_size
        if self.args.queries_per_step % per_step:
            raise ValueError(
                f"queries_per_step={self.args.queries_per_step} is not a multiple of per_device_train_batch_size x "
                f"processes = {per_step}: change one of them."
            )
        return self.args.queries_per_step // per_step

    def check_inputs(self) -> None:
        """Raise a one-line `ValueError` for what is missing before anything is loaded."""
        for name in ("queries", "principles"):
            if not getattr(self.args, name):
                raise ValueError(f"`{name}` is missing: name a file{' or data set' if name == 'queries' else ''}.")
        if not self.model_args.model_name_or_path:
            raise ValueError("`model_name_or_path` is missing: give a hub id, a directory or the embedded model.")
        if self.engine_args.engine != "endpoint" and self.engine_args.engine_model:
            raise ValueError("`engine_model` would sample from another model every round: leave it out of `run`.")
        self.principles()

    @staticmethod
    def _finish(path: Path, report) -> None:
        print(report.summary)
        values = {f.name: getattr(report, f.name) for f in fields(report)}
        path.write_text(json.dumps(values, default=str, indent=2) + "\n", encoding="utf-8")
