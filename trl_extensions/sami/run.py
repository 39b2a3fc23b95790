"""The outer loop of SAMI, expert iteration (arXiv 2404.14313, section 3.3).

Each round samples from the model of the round before and trains the original again. Every stage leaves a file when it
is done, and is skipped when that is there. A round has its own folder:

    settings.json, training_settings.json, report.md, report.json, rounds.png; with `judge` judge_calls.sqlite
    round_0/  (the original)  eval_samples.jsonl, evaluation.json
    round_1/  the same, samples.jsonl, train/ (checkpoints, log), model/; with `judge` win_rate.json
    absorbed/  with `absorb`: samples.jsonl, train/, model/, eval_outputs.jsonl, evaluation.json
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trl import ModelConfig

from ..core.generation import EngineArguments, ModelSource, parse_engine
from ..core.generation.sampling import load_outputs
from ..core.generation.types import is_adapter_directory
from ..core.inputs import Query
from ..core.runs.plan import Work, mean_tokens
from ..core.runs.run import MUTABLE_ON_RESUME, Run, Stage, check_resume, mark_done, training_settings
from ..core.training.load import fit, last_checkpoint
from ..core.training.preflight import Training
from .absorb import AbsorbTrainer, absorb_rows, evaluate_absorbed, sample_desired
from .checks import language_guesser, obedience
from .config import SAMIArguments, SAMIConfig
from .data import TRAINING_TEMPLATE, load_rows, load_training_rows, to_dataset
from .evaluation import (
    evaluate_rows,
    forget_other_judges,
    judge_of_checks,
    judge_samples,
    load_multiple_choice,
    load_references,
    side_effects,
)
from .principles import Principle, load_principles
from .report import summary_of, write_report
from .sampling import EVERYTHING_BUT_EMPTY, ResponseFilters, SamplingReport, sample_rows
from .trainer import SAMITrainer


_MUTABLE = MUTABLE_ON_RESUME | {
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "overlong_policy", "guard_steps",
    "guard_num_queries", "guard_max_new_tokens", "guard_stop", "guard_max_kl", "guard_max_length_ratio",
    "guard_min_length_ratio", "guard_min_distinct_2", "guard_references", "guard_min_unchanged",
    "guard_max_reference_change", "rounds", "eval_batch_tokens", "dataset_name",
    "dataset_train_split", "eval_dataset_name", "original_model", "judge", "judge_mode", "judge_max_new_tokens",
    "judge_against", "absorb", "absorb_epochs", "absorb_learning_rate",
}  # fmt: skip
_TRAINING_ARGUMENTS = ("effective_batch_size", "steps_per_round", "steps_per_round_increment")


@dataclass
class SAMIRun(Run):
    """A method for each command, and one for each stage of a round (`_train_round`, ...). `engine_args` is what
    samples, `model_args` the original, LoRA and quantisation."""

    # All but what the original answered
    remade: ClassVar = {
        "training_settings.json": "round_1/[!s]* round_1/sampling.json round_[2-9] round_1[0-9] absorbed"
    }

    args: SAMIArguments
    engine_args: EngineArguments
    config: SAMIConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        self.models = ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    @property
    def absorbed(self) -> Path:
        return self.folder / "absorbed"

    def round_folder(self, round_: int) -> Path:
        return self.folder / f"round_{round_}"

    def model_of(self, round_: int) -> str:
        """The model a round ends with; round 0 is the original."""
        return str(self.round_folder(round_) / "model") if round_ else self.model_args.model_name_or_path

    def principles(self) -> list[Principle]:
        return load_principles(self.args.principles)

    def eval_principles(self) -> list[Principle]:
        """Principles that are not trained; none where no file is named."""
        return load_principles(self.args.eval_principles) if self.args.eval_principles else []

    def queries(self) -> tuple[list[Query], list[Query]]:
        """Training and held-out queries."""
        return self.args.load_prompts(self.config.seed)

    def training_half(self, round_: int) -> list[Query]:
        """The queries of a round: two halves that take turns."""
        return self.queries()[0][(round_ - 1) % 2 :: 2]

    # The commands

    def sample(self) -> SamplingReport:
        """Sample rows to train on from the model, for all training queries, into `samples.jsonl`."""
        self.check_inputs()
        return self._sample(self.model_of(0), self.queries()[0], self.folder / "samples.jsonl", is_original=True)

    def train(self) -> None:
        """Train on the rows of `dataset_name`, `effective_batch_size` a gradient step; one epoch, or `max_steps`."""
        args = self.args
        if not args.dataset_name or not self.model_args.model_name_or_path:
            raise ValueError("`train` needs `dataset_name` (rows to train on) and `model_name_or_path`.")
        config = self._training_config()
        rows = load_training_rows(args.dataset_name, args.dataset_train_split)
        if config.max_steps <= 0:
            config.max_steps = len(rows) // args.effective_batch_size
        if config.max_steps < 1:
            raise ValueError(f"{args.dataset_name}: {len(rows)} rows are fewer than effective_batch_size: lower it.")
        held_out = load_training_rows(args.eval_dataset_name, "test") if args.eval_dataset_name else None
        settings = training_settings(config, _MUTABLE) | asdict(self.model_args)
        settings |= {name: getattr(args, name) for name in ("dataset_name", "effective_batch_size")}
        started = last_checkpoint(config.output_dir) is not None
        check_resume(self.folder / "training_settings.json", settings, made=config.output_dir, started=started)
        fit(SAMITrainer, self.model_args, config, rows, held_out, self.folder / "model")

    def evaluate(self) -> dict[str, Any]:
        """Sample and score the model on the held-out queries; judge them too, under `win_rate`, if so told."""
        self.check_inputs()
        model = self.model_of(0)
        self._sample_held_out(model, self.folder, is_original=True)
        result = self._score(model, self.folder, self.args.original_model, None)
        if self.args.judge and self.args.judge_against:
            result["win_rate"] = self._judge(self.folder, Path(self.args.judge_against))
        return result

    def evaluate_model(self, model: str, folder: Path) -> dict[str, Any]:
        """Sample and score another model as the rounds of this (finished) run were; results go to `folder`."""
        self._sample_held_out(model, folder, is_original=False)
        return self._score(model, folder, self.model_of(0), self._original_rows())

    # The rounds

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """What only training depends on may still change as long as no round has been trained."""
        training = training_settings(self.config, _MUTABLE)
        sampling = {name: value for name, value in asdict(self.args).items() if name not in _MUTABLE}
        training |= {name: sampling.pop(name) for name in _TRAINING_ARGUMENTS} | asdict(self.model_args)
        moved = ("seed", "prompt_template", "model_name_or_path", "model_revision")
        sampling |= {name: training.pop(name) for name in moved}
        sampling |= {"engine": self.engine_args.engine, "engine_model": self.engine_args.engine_model}
        unchecked = {} if self.args.filter_by_check else {"check": None}  # else checks only measure, and may change
        for name in ("principles", "eval_principles"):
            sampling[f"{name}_in_file"] = [principle.as_dict() | unchecked for principle in getattr(self, name)()]
        files = {
            "settings.json": (sampling, self.round_folder(0).exists()),
            "training_settings.json": (training, any(self.folder.glob("round_*/model"))),
        }
        if self.args.absorb:
            own = {name: getattr(self.args, name) for name in ("rounds", "absorb_epochs", "absorb_learning_rate")}
            files["absorb_settings.json"] = own, self.absorbed.exists()
        return files

    def claim(self) -> None:
        super().claim()
        if self.args.judge:
            forget_other_judges(self.folder, self.args)

    def stages(self) -> Iterator[Stage]:
        """Every stage in order, with its round and the file that says it is done."""
        for round_ in range(self.args.rounds + 1):
            of, folder = f"round {round_}" if round_ else "original", self.round_folder(round_)
            if round_:
                yield Stage("sample", round_, folder / "sampling.json", f"{of}: sampling rows to train on")
                yield Stage("train", round_, folder / "model", f"{of}: training the original on them")
            sampled = folder / "eval_sampling.json"
            yield Stage("sample_evaluation", round_, sampled, f"{of}: sampling answers to the held-out queries")
            yield Stage("evaluate", round_, folder / "evaluation.json", f"{of}: scoring those answers")
            if round_ and self.args.judge:
                yield Stage("judge", round_, folder / "win_rate.json", f"{of}: judging them against the original's")
        if self.args.absorb:
            last, of, folder = self.args.rounds, "constitution absorbed", self.absorbed
            yield Stage("absorb_sample", last, folder / "sampling.json", f"{of}: sampling under all definitions")
            yield Stage("absorb", last, folder / "model", f"{of}: training towards that without a constitution")
            yield Stage("absorb_evaluate", last, folder / "evaluation.json", f"{of}: answers without one")

    def trainings(self) -> Iterator[Training]:
        config, numbers = self._training_config(), range(self.args.num_constitutions)
        config.guard_steps = 0  # there is nothing to sample from yet
        row: dict[str, Any] = {"prompts": [f"{n}. Hello" for n in numbers], "completions": [f"{n}" for n in numbers]}
        row["plain_prompt"] = "Hello"
        yield Training(SAMITrainer, self.model_args, config, [row, row])

    def works(self) -> Iterator[Work]:
        args, tokens, model = self.args, partial(mean_tokens, self.models.tokenizer()), self.model_of(0)
        num, new, size, principles = (
            args.num_constitutions,
            args.max_new_tokens,
            args.effective_batch_size,
            self.principles(),
        )
        texts = [TRAINING_TEMPLATE, *(own.wordings(True)[0] for own in principles)]
        asked = tokens([query.text for query in self.queries()[0]]) + len(texts) * tokens(texts, asked=False)
        steps = sum(min(args.steps_of(n), len(self.training_half(n)) // size) for n in range(1, args.rounds + 1))
        yield Work("sample", model, steps * size * num, asked, new)
        trained = num * (asked + num * new if self.config.share_prefix else num * (asked + new))
        yield Work("train", model, steps * size, trained=trained, steps=steps)
        tests = len(self.queries()[1]) * min(args.num_eval_constitutions, 2 ** len(principles))
        yield Work("evaluate", model, tests * (args.rounds + 1), 2 * asked + num * new, new)
        if args.judge:
            prices = parse_engine(args.judge, "judge").prices
            yield Work("judge", "", 2 * tests * args.rounds, asked + 2 * new, args.judge_max_new_tokens, prices=prices)

    def perform(self, name: str, round_: int) -> None:
        getattr(self, f"_{name}_round")(round_)

    def write_report(self) -> Path:
        return write_report(self.folder)

    def summary(self, report: Path) -> str:
        return summary_of(report)

    def _sample_round(self, round_: int) -> None:
        """Sample training rows from the model of the round before, on this round's half of the queries."""
        folder, size = self.round_folder(round_), self.args.effective_batch_size
        model, queries, output = self.model_of(round_ - 1), self.training_half(round_), folder / "samples.jsonl"
        needed = size * self.args.steps_of(round_)
        report = self._sample(model, queries, output, is_original=round_ == 1, needed=needed)
        if report.kept < size:
            kept = f"only {report.kept} of {report.sampled} sampled rows were kept ({report.dropped})"
            raise ValueError(f"round {round_}: {kept}, fewer than effective_batch_size={size}: lower it.")
        mark_done(folder / "sampling.json", report)

    def _train_round(self, round_: int) -> None:
        """Train the original on this round's rows, one gradient step per `effective_batch_size` of them."""
        folder, size = self.round_folder(round_), self.args.effective_batch_size
        rows = load_rows(folder / "samples.jsonl")
        config, held_out = self._training_config(), None
        config.output_dir, config.logging_steps = str(folder / "train"), 1
        config.max_steps = min(self.args.steps_of(round_), len(rows) // size)
        if config.guard_steps or config.eval_strategy != "no":
            held_out = to_dataset(load_rows(self.round_folder(0) / "eval_samples.jsonl"))
        rows = to_dataset(rows[: config.max_steps * size])
        fit(SAMITrainer, self.model_args, config, rows, held_out, folder / "model")

    def _sample_evaluation_round(self, round_: int) -> None:
        self._sample_held_out(self.model_of(round_), self.round_folder(round_), is_original=round_ == 0)

    def _evaluate_round(self, round_: int) -> None:
        """Score this round's model on its own held-out responses and on those of the original."""
        model, folder = self.model_of(round_), self.round_folder(round_)
        originals = self._original_rows() if round_ else None
        self._score(model, folder, self.model_of(0), originals, is_original=round_ == 0)

    def _judge_round(self, round_: int) -> None:
        """Judge this round's held-out responses against the original's to the same prompts."""
        self._judge(self.round_folder(round_), self.round_folder(0) / "eval_samples.jsonl")

    # The constitution absorbed, from the model of the last round

    def _absorb_sample_round(self, round_: int) -> None:
        engine = self.models.sampler(self.model_of(round_), is_original=False)
        report = sample_desired(
            engine, self.queries()[0], self.principles(), self.args.params(self.config.seed),
            self.absorbed / "samples.jsonl", template=self.args.sampling_template or TRAINING_TEMPLATE,
            conversational=self.models.is_conversational(), seed=self.config.seed,
        )  # fmt: skip
        mark_done(self.absorbed / "sampling.json", report)

    def _absorb_round(self, round_: int) -> None:
        """Train the last model on, of an adapter that very adapter."""
        args, config, model = self.args, self._training_config(), self.model_of(round_)
        rows = absorb_rows(
            load_outputs(self.absorbed / "samples.jsonl"), self.queries()[0], self.principles(),
            template=config.prompt_template or TRAINING_TEMPLATE, conversational=self.models.is_conversational(),
            seed=config.seed, filters=self._filters(),
        )  # fmt: skip
        config.output_dir, config.logging_steps = str(self.absorbed / "train"), 1
        config.num_train_epochs, config.eval_strategy = args.absorb_epochs, "no"
        config.learning_rate = args.absorb_learning_rate or config.learning_rate
        model_args = replace(self.model_args, model_name_or_path=model)
        if is_adapter_directory(model):
            model_args.use_peft = False
        fit(AbsorbTrainer, model_args, config, rows, None, self.absorbed / "model")

    def _absorb_evaluate_round(self, round_: int) -> None:
        models = dict.fromkeys(("original", "prompted"), self.model_of(0))
        models |= {"trained": self.model_of(round_), "absorbed": str(self.absorbed / "model")}
        evaluate_absorbed(
            lambda case: self.models.sampler(models[case], is_original=models[case] == models["original"]),
            self.queries()[1], self.principles(), self.args.params(self.config.seed), self.absorbed,
            template=self.config.prompt_template or TRAINING_TEMPLATE,
            conversational=self.models.is_conversational(), seed=self.config.seed,
        )  # fmt: skip

    # What commands and rounds share

    def _sample(
        self,
        model: str,
        queries: Sequence[Query],
        output: Path,
        *,
        is_original: bool,
        held_out: list[Principle] | None = None,
        needed: int | None = None,
    ) -> SamplingReport:
        """Held-out responses are sampled under principles of their own, with the training prompt, and dropped only if
        there is nothing to score."""
        args, template = self.args, self.config.prompt_template or TRAINING_TEMPLATE
        # More constitutions than in training, so that the bound does not come to its end at the log of their number
        num = min(args.num_eval_constitutions, 2 ** len(held_out)) if held_out else args.num_constitutions
        return sample_rows(
            self.models.sampler(model, is_original=is_original), queries, held_out or self.principles(),
            num_constitutions=num, pairs=args.pairs, purpose="eval" if held_out else "train",
            params=args.params(self.config.seed), seed=self.config.seed,
            sampling_template=template if held_out else args.sampling_template or TRAINING_TEMPLATE,
            training_template=template, conversational=self.models.is_conversational(), output=output, needed=needed,
            filters=EVERYTHING_BUT_EMPTY if held_out else self._filters(),
        )  # fmt: skip

    def _filters(self) -> ResponseFilters:
        return ResponseFilters(
            max_tokens=self.args.max_response_tokens, drop_truncated=not self.args.keep_truncated,
            drop_disobedient=self.args.filter_by_check,
        )  # fmt: skip

    def _sample_held_out(self, model: str, folder: Path, *, is_original: bool) -> None:
        output = folder / "eval_samples.jsonl"
        if unseen := self.eval_principles():
            other = folder / "eval_principles_samples.jsonl"
            self._sample(model, self.queries()[1], other, is_original=is_original, held_out=unseen)
        report = self._sample(model, self.queries()[1], output, is_original=is_original, held_out=self.principles())
        mark_done(folder / "eval_sampling.json", report)

    def _original_rows(self, name: str = "eval_samples.jsonl") -> list[dict[str, Any]]:
        """What the original answered to the held-out queries, the empty answers too."""
        return load_rows(self.round_folder(0) / name, kept_only=False)

    def _score(
        self, model: str, folder: Path, original: str | None, fixed_rows: list | None, *, is_original: bool = False
    ) -> dict[str, Any]:
        engine, rows = self.models.in_process(model), load_rows(folder / "eval_samples.jsonl", kept_only=False)
        separate = original not in (None, model) and not hasattr(engine.model, "peft_config")
        ref_model = self.models.in_process(original).model if separate else None
        args, principles, unseen, plain = self.args, self.principles(), self.eval_principles(), "plain_answers.jsonl"
        originals = self.round_folder(0) / plain if fixed_rows else None
        judge = judge_of_checks(args, principles + unseen, self.folder / "judge_calls.sqlite")
        more = {"obedience": obedience(principles, rows, fixed_rows or (), judge)}
        unseen_rows: list[dict[str, Any]] = []
        if unseen:
            name = "eval_principles_samples.jsonl"
            unseen_rows = load_rows(folder / name, kept_only=False)
            before = self._original_rows(name) if fixed_rows else ()
            more["obedience_held_out_principles"] = obedience(unseen, unseen_rows, before, judge)
        more["side_effects"] = side_effects(
            engine, self.queries()[1], folder / plain, params=args.params(self.config.seed),
            conversational=self.models.is_conversational(), ref_model=ref_model,
            originals=originals if originals and originals.exists() else None, references=args.eval_references,
            multiple_choice=args.eval_multiple_choice, batch_tokens=args.eval_batch_tokens,
        )  # fmt: skip
        return evaluate_rows(
            engine.model, engine.tokenizer, rows, folder / "evaluation.json", ref_model=ref_model, more=more,
            is_original=is_original, fixed_rows=fixed_rows, batch_tokens=self.args.eval_batch_tokens,
            unseen_rows=unseen_rows,
        )  # fmt: skip

    def _judge(self, folder: Path, originals: Path) -> dict[str, Any]:
        return judge_samples(self.args, folder, originals, self.folder / "judge_calls.sqlite")

    def _training_config(self) -> SAMIConfig:
        """A copy of the trainer's configuration with what follows from the run's own settings."""
        config, size = copy.copy(self.config), self.args.effective_batch_size
        processes = max(config.world_size, self.processes)
        if size % processes:
            raise ValueError(f"effective_batch_size={size} is no multiple of the {processes} processes.")
        # The largest micro-batch up to what was asked for: only memory and speed know the difference
        config.per_device_train_batch_size = math.gcd(size // processes, config.per_device_train_batch_size)
        config.gradient_accumulation_steps = size // processes // config.per_device_train_batch_size
        config.guard_stop = config.guard_stop or self.args.stop
        config.guard_references = config.guard_references or self.args.eval_references
        return config

    def check_inputs(self) -> None:
        """Raise a one-line `ValueError` for what is missing before anything is loaded."""
        given = asdict(self.args) | asdict(self.model_args)
        for name in ("prompts", "principles", "model_name_or_path"):
            if not given[name]:
                raise ValueError(f"`{name}` is missing: name a file or directory, or something on the hub.")
        if self.engine_args.engine != "endpoint" and self.engine_args.engine_model:
            raise ValueError("`engine_model` would sample from another model every round: leave it out of `run`.")
        if self.config.chat_template_path:
            raise ValueError("`chat_template_path` would apply to training only: put the template into the model.")
        trained, unseen = self.principles(), self.eval_principles()
        for check in (part for own in trained + unseen if own.check is not None for part in own.check.parts):
            if check.language is not None:
                language_guesser(check.language)
        counted = [own for own in trained if own.check is not None and not all(part.judge for part in own.check.parts)]
        if self.args.filter_by_check and not counted:
            none = "no principle has a `check` that can be counted"
            raise ValueError(f"{self.args.principles}: {none}: leave `filter_by_check` out.")
        for load, source in ((load_references, self.args.eval_references),
                             (load_references, self.config.guard_references),
                             (load_multiple_choice, self.args.eval_multiple_choice)):  # fmt: skip
            if source:
                load(source, False)
        texts = {text for own in trained for text in own.wordings(True) + own.wordings(False)}
        for own in unseen:
            if shared := texts.intersection(own.wordings(True) + own.wordings(False)):
                file = self.args.eval_principles
                raise ValueError(f"{file}: principle {own.name!r} is trained too ({min(shared)!r}): leave it out.")

    def check(self) -> None:
        """What is missing, and settings of the trainer that the rounds decide themselves."""
        self.check_inputs()
        for name, default in {"max_steps": -1, "num_train_epochs": 0.0, "gradient_accumulation_steps": 1}.items():
            if getattr(self.config, name) != default:
                raise ValueError(f"`{name}` has no effect on `run`: set `steps_per_round`, `effective_batch_size`.")
        half, size = len(self.training_half(min(2, self.args.rounds))), self.args.effective_batch_size
        if half < size:
            fewer = f"half of the training queries ({half}) is less than effective_batch_size={size}"
            raise ValueError(f"{fewer}; lower that or `num_eval_prompts`, or give more queries.")
        self._training_config()
