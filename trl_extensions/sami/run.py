"""The outer loop of SAMI, expert iteration (arXiv 2404.14313, section 3.3).

Each round samples from the model of the round before and trains the original again.

Every stage of every round leaves a file when it is done and is skipped when that file is there, so the same command
resumes a run that was killed anywhere. A round has its own folder and nothing in it is written twice:

    output_dir/settings.json, report.md, report.json, rounds.png, judge_calls.jsonl (with `judge`)
    output_dir/round_0/   the original: eval_samples.jsonl, evaluation.json
    output_dir/round_1/   samples.jsonl, train/ (checkpoints, log), model/, eval_samples.jsonl, evaluation.json,
                          win_rate.json (with `judge`)
"""

import copy
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trl import ModelConfig

from ..core.generation import EngineArguments
from ..core.generation.models import ModelSource
from ..core.generation.types import GenerationParams
from ..core.inputs import Query, load_queries
from ..core.runs.run import MUTABLE_ON_RESUME, Stage, check_resume, mark_done, run_stages, training_settings
from ..core.training.load import fit, last_checkpoint
from .arguments import SAMIArguments
from .config import SAMIConfig
from .evaluation import evaluate_rows
from .principles import Principle, load_principles
from .sampling import load_rows, sample_rows, to_dataset
from .templates import SAMPLING_TEMPLATE, TRAINING_TEMPLATE
from .trainer import SAMITrainer
from .training import load_training_rows
from .win_rate import forget_other_judges, judge_samples


logger = logging.getLogger(__name__)

# Settings that may change between a kill and the restart: they decide where and how fast, not what
_MUTABLE_ON_RESUME = MUTABLE_ON_RESUME | {
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "overflow", "guard_steps",
    "guard_num_queries", "guard_max_new_tokens", "guard_stop", "guard_max_kl", "guard_max_length_ratio",
    "guard_min_length_ratio", "guard_min_distinct_2", "rounds", "eval_batch_tokens", "dataset_name",
    "dataset_train_split", "eval_dataset_name", "original_model", "judge", "judge_mode", "judge_max_new_tokens",
    "judge_against",
}  # fmt: skip
_TRAINING_ARGUMENTS = ("queries_per_step", "steps_first_round", "steps_growth")

_STAGES = {
    "sample": "sampling rows to train on",
    "train": "training the original on them",
    "sample_evaluation": "sampling answers to the held-out queries",
    "evaluate": "scoring those answers",
    "judge": "judging them against the original's",
}


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
        """Write the run's settings, or refuse to resume a run that was started with others.

        What only training depends on may still change as long as no round has been trained.
        """
        trained = any(self.folder.glob("round_*/model"))
        config = training_settings(self.config, _MUTABLE_ON_RESUME)
        args = {name: value for name, value in asdict(self.args).items() if name not in _MUTABLE_ON_RESUME}
        sampling = {name: config.pop(name) for name in ("seed", "prompt_template")}
        training = config | {name: args.pop(name) for name in _TRAINING_ARGUMENTS}
        model = asdict(self.model_args)
        sampling |= args | {name: model.pop(name) for name in ("model_name_or_path", "model_revision")}
        sampling |= {"engine": self.engine_args.engine, "engine_model": self.engine_args.engine_model}
        sampling["principles_in_file"] = [asdict(principle) for principle in self.principles()]
        check_resume(
            self.folder / "settings.json", sampling, made=str(self.folder), started=self.round_folder(0).exists()
        )
        check_resume(self.folder / "training_settings.json", training | model, made=str(self.folder), started=trained)

    def stages(self) -> Iterator[Stage]:
        """Every stage in order: its method's name, its round, and the file that says it is done."""

        def stage(name: str, round_: int, done: str) -> Stage:
            of = f"round {round_}" if round_ else "original"
            return Stage(name, round_, self.round_folder(round_) / done, f"{of}: {_STAGES[name]}")

        yield stage("sample_evaluation", 0, "eval_sampling.json")
        yield stage("evaluate", 0, "evaluation.json")
        for round_ in range(1, self.args.rounds + 1):
            yield stage("sample", round_, "sampling.json")
            yield stage("train", round_, "model")
            yield stage("sample_evaluation", round_, "eval_sampling.json")
            yield stage("evaluate", round_, "evaluation.json")
            if self.args.judge:
                yield stage("judge", round_, "win_rate.json")

    def execute(self, perform: Callable[[str, int], Any] | None = None) -> Path:
        """Carry out what is not done yet and write the report.

        Args:
            perform: Carries out one stage given its method's name and round; in this process when left out.

        Returns:
            The path of `report.md`.
        """
        from .report import write_run_report

        self.check_inputs()
        self.check_schedule()
        self.claim()
        if self.args.judge:
            forget_other_judges(self.folder, self.args)
        run_stages(self.stages(), perform or self.perform)
        return write_run_report(self)

    def perform(self, name: str, round_: int) -> None:
        """Carry out one stage in this process."""
        getattr(self, name)(round_)

    # The stages

    def sample(self, round_: int) -> None:
        """Sample training rows from the model of the round before, on this round's half of the queries."""
        folder = self.round_folder(round_)
        report = sample_rows(
            self.models.sampler(self.model_of(round_ - 1), is_original=round_ == 1),
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
                f"fewer than queries_per_step={self.args.queries_per_step}: lower it, or start again in another "
                "`output_dir` with more queries or a larger `max_new_tokens`."
            )
        mark_done(folder / "sampling.json", report)

    def train(self, round_: int) -> None:
        """Train the original on this round's rows, one gradient step per `queries_per_step` of them."""
        folder = self.round_folder(round_)
        rows = load_rows(folder / "samples.jsonl")
        steps = min(self.args.steps_of(round_), len(rows) // self.args.queries_per_step)
        config = self._training_config()
        config.output_dir = str(folder / "train")
        config.max_steps = steps
        config.logging_steps = 1
        held_out = None
        if config.guard_steps or config.eval_strategy != "no":
            held_out = to_dataset(load_rows(self.round_folder(0) / "eval_samples.jsonl"))
        rows = to_dataset(rows[: steps * self.args.queries_per_step])
        fit(SAMITrainer, self.model_args, config, rows, held_out, folder / "model")

    def train_alone(self) -> None:
        """Train on the rows of `dataset_name`, `queries_per_step` a gradient step; one epoch, or `max_steps`."""
        config, args = self._training_config(), self.args
        rows = load_training_rows(args.dataset_name, args.dataset_train_split)
        if config.max_steps <= 0:
            config.max_steps = len(rows) // args.queries_per_step
        if config.max_steps < 1:
            raise ValueError(
                f"{args.dataset_name} holds {len(rows)} rows, fewer than queries_per_step={args.queries_per_step}: "
                "lower it or sample more."
            )
        held_out = load_training_rows(args.eval_dataset_name, "test") if args.eval_dataset_name else None
        known = {f.name for f in fields(SAMIConfig)} - _MUTABLE_ON_RESUME
        settings = {name: value for name, value in config.to_dict().items() if name in known}
        settings |= {"dataset_name": args.dataset_name, "queries_per_step": args.queries_per_step}
        check_resume(
            self.folder / "training_settings.json",
            settings | asdict(self.model_args),
            made=config.output_dir,
            started=last_checkpoint(config.output_dir) is not None,
        )
        fit(SAMITrainer, self.model_args, config, rows, held_out, self.folder / "model")

    def sample_evaluation(self, round_: int) -> None:
        """Sample responses to the held-out queries from this round's model, with the training prompt."""
        self._sample_held_out(self.model_of(round_), self.round_folder(round_), is_original=round_ == 0)

    def evaluate(self, round_: int) -> None:
        """Score this round's model on its own held-out responses and on those of the original."""
        originals = load_rows(self.round_folder(0) / "eval_samples.jsonl") if round_ else None
        original = self.model_of(0)
        self._score(self.model_of(round_), self.round_folder(round_), original, originals, is_original=round_ == 0)

    def judge(self, round_: int) -> dict[str, Any]:
        """Judge this round's held-out responses against the original's to the same prompts."""
        return self._judge(self.round_folder(round_), self.round_folder(0) / "eval_samples.jsonl")

    def evaluate_alone(self) -> dict[str, Any]:
        """Sample and score `model_name_or_path` on the held-out queries, outside of any round.

        With `judge` and `judge_against` the responses are judged too; the result is then under `win_rate`.
        """
        model = self.model_args.model_name_or_path
        self._sample_held_out(model, self.folder, is_original=True)
        result = self._score(model, self.folder, self.args.original_model, None)
        if self.args.judge and self.args.judge_against:
            result["win_rate"] = self._judge(self.folder, Path(self.args.judge_against))
        return result

    def evaluate_model(self, model: str, folder: Path) -> dict[str, Any]:
        """Sample and score another model as the rounds of this (finished) run were; results go to `folder`."""
        self._sample_held_out(model, folder, is_original=False)
        originals = load_rows(self.round_folder(0) / "eval_samples.jsonl")
        return self._score(model, folder, self.model_of(0), originals)

    # What the stages share

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
            self.models.sampler(model, is_original=is_original),
            self.queries()[1],
            self.principles(),
            sampling_template=self.config.prompt_template or TRAINING_TEMPLATE,
            output=folder / "eval_samples.jsonl",
            filters=self.args.evaluation_filters(),
            **self.sampling_settings(),
        )
        mark_done(folder / "eval_sampling.json", report)

    def _score(
        self, model: str, folder: Path, original: str | None, fixed_rows: list | None, *, is_original: bool = False
    ) -> dict[str, Any]:
        engine = self.models.in_process(model)
        separate = original not in (None, model) and not hasattr(engine.model, "peft_config")
        return evaluate_rows(
            engine.model,
            engine.tokenizer,
            load_rows(folder / "eval_samples.jsonl", kept_only=False),
            folder / "evaluation.json",
            is_original=is_original,
            original=self.models.in_process(original).model if separate else None,
            fixed_rows=fixed_rows,
            batch_tokens=self.args.eval_batch_tokens,
        )

    def _judge(self, folder: Path, originals: Path) -> dict[str, Any]:
        return judge_samples(
            self.args,
            folder / "eval_samples.jsonl",
            originals,
            calls=self.folder / "judge_calls.jsonl",
            output=folder / "win_rate.json",
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
            "conversational": self.models.is_conversational(),
        }

    @property
    def models(self) -> ModelSource:
        return ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    def principles(self) -> list[Principle]:
        """The principles constitutions are built from."""
        return load_principles(self.args.principles)

    def _training_config(self) -> SAMIConfig:
        """A copy of the trainer's configuration with what follows from the run's own settings."""
        config = copy.copy(self.config)
        config.gradient_accumulation_steps = self._accumulation()
        config.guard_stop = config.guard_stop or self.args.stop
        return config

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
        if self.config.chat_template_path:
            raise ValueError("`chat_template_path` would apply to training only: put the template into the model.")
        self.principles()

    def check_schedule(self) -> None:
        """Raise a one-line `ValueError` for settings of the trainer that the rounds decide themselves."""
        for name, value, instead in (
            ("max_steps", -1, "`steps_first_round` and `steps_growth`"),
            ("num_train_epochs", 3.0, "`steps_first_round` and `steps_growth`"),
            ("gradient_accumulation_steps", 1, "`queries_per_step`"),
        ):
            if getattr(self.config, name) != value:
                raise ValueError(f"`{name}` has no effect on `run`: set {instead}.")
        self._accumulation()
