"""From weak models' answers to a strong model: sample, score, keep, train, and compare on held-out prompts.

Every stage leaves a file when it is done and is skipped when that file is there, so the same command resumes a run
that was killed anywhere:

    output_dir/settings.json, training_settings.json, report.md, report.json, evaluation.json, figures
    output_dir/answers/    answers.jsonl, scored.jsonl, kept.jsonl: the weak models' own, and the best (delete the
                           last one to choose anew, before anything is trained on it)
    output_dir/model/      the strong model trained on those; ceiling/ on the trusted answers; train_*/ logs
    output_dir/held_out/   <side>.jsonl and <side>_scored.jsonl: original, weak, w2s and ceiling on held-out prompts

`label`, `train` and `evaluate` below are the parts on their own.
"""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from trl import ModelConfig

from ...core.generation import EngineArguments, ModelSource
from ...core.generation.sampling import COLUMNS, sample_outputs
from ...core.generation.types import GenerationEngine
from ...core.inputs import Query
from ...core.modeling.batches import free_memory
from ...core.runs.jsonl import read_jsonl, write_jsonl
from ...core.runs.report import write_atomically
from ...core.runs.run import Run, Stage, check_resume, folder_lock, mark_done, run_stages, training_settings
from ...core.training.load import fit, last_checkpoint
from ...embedded import resolve_model_name
from ..arguments import GenerationArguments, WeakToStrongArguments, refuse_unused
from ..data.prepare import read_rows
from ..data.select import keep_rows, to_continuations, to_sft_dataset
from ..evaluation import CEILING, ORIGINAL, STRONG, WEAK, evaluate_toxicity, harm_of
from ..labels.learners import folder_name
from ..report import write_generation_report
from ..run import claim_training
from ..trainers.configs import WeakToStrongSFTConfig
from ..trainers.sft import WeakToStrongSFTTrainer
from .scorers import Scorer, check_scores, plan_scorer, score_rows


logger = logging.getLogger(__name__)

_MODELS = {STRONG: "model", CEILING: "ceiling"}
_TRAINING = "training"  # the weak models' answers to learn from, where a side's are meant to compare
_KEEPING = ("threshold", "best_of", "budget", "min_tokens", "keep_truncated")
_USED = ("task", "weak_models", "dataset_name", "dataset_train_split")  # the other arguments belong to labels


@dataclass
class GenerationRun(Run):
    """One run: its settings, its folder, and a method for each stage."""

    args: WeakToStrongArguments
    generation_args: GenerationArguments
    engine_args: EngineArguments
    config: WeakToStrongSFTConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        unused = [f.name for f in fields(self.args) if f.name not in _USED]
        refuse_unused(self.args, unused, "with `task: generation`")
        refuse_unused(self.config, ["token_loss"], "without a `weak_model`, which only the trainer's class takes")

    @property
    def models(self) -> ModelSource:
        return ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    @property
    def sides(self) -> dict[str, str]:
        """What is compared: its name -> its model."""
        weak = {f"{WEAK}-{place + 1}" if place else WEAK: name for place, name in enumerate(self.args.weak_models)}
        trained = {STRONG: str(self.folder / _MODELS[STRONG])}
        if self.generation_args.ceiling_dataset_name:
            trained[CEILING] = str(self.folder / _MODELS[CEILING])
        return {ORIGINAL: str(self.model_args.model_name_or_path)} | weak | trained

    @property
    def kept(self) -> Path:
        """The answers to train on."""
        return self.folder / "answers" / "kept.jsonl"

    @cached_property
    def scorer(self) -> Scorer:
        """What scores answers, loaded once."""
        return plan_scorer(self.generation_args.scorer).build()

    def existing_sides(self) -> list[str]:
        """Those whose model was not left for later."""
        return [side for side, model in self.sides.items() if side not in (STRONG, CEILING) or Path(model).exists()]

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """What only training depends on may change as long as nothing is trained, and what only choosing depends on
        as long as nothing is chosen (see `claim`). The range of the scorer may always change: no score depends on it.
        """
        sampling = asdict(self.generation_args)
        training = training_settings(self.config) | asdict(self.model_args)
        training["ceiling_dataset_name"] = sampling.pop("ceiling_dataset_name")
        for name in _KEEPING:
            sampling.pop(name)
        scorer = plan_scorer(sampling["scorer"]).settings
        sampling["scorer"] = {name: value for name, value in scorer.items() if name != "range"}
        sampling |= {"weak_models": self.args.weak_models, "seed": self.config.seed, "engine": self.engine_args.engine}
        sampling |= {name: getattr(self.model_args, name) for name in ("model_name_or_path", "model_revision")}
        return {
            "settings.json": (sampling, any((self.folder / name).exists() for name in ("answers", "held_out"))),
            "training_settings.json": (training, any(map(self._is_trained, (STRONG, CEILING)))),
        }

    def claim(self) -> None:
        """As every run's; those of the choice bind as soon as there is one."""
        if self.kept.exists():
            self._claim_keeping()
        super().claim()

    def _claim_keeping(self) -> None:
        own = {name: getattr(self.generation_args, name) for name in _KEEPING}
        path = self.kept.with_suffix(".settings.json")
        try:
            check_resume(path, own, made=str(self.kept), started=self.kept.exists())
        except ValueError as error:
            raise ValueError(f"{error}; or delete {self.kept} to choose anew.") from None

    def _is_trained(self, side: str) -> bool:
        folder = self.folder / f"train_{side}"
        return (self.folder / _MODELS[side]).exists() or last_checkpoint(str(folder)) is not None

    def stages(self) -> Iterator[Stage]:
        """Every stage in order: its method's name, the side it is about, and the file that says it is done."""
        yield Stage("sample", _TRAINING, self._files(_TRAINING)[2], "weak models: answering the training prompts")
        yield Stage("score", _TRAINING, self._files(_TRAINING)[3], "scoring those answers")
        yield Stage("keep", _TRAINING, self.kept, "choosing among them")
        for side, model in self.sides.items():
            if side in (STRONG, CEILING):
                yield Stage("train", side, Path(model), f"{side}: training the strong model")
            yield Stage("sample", side, self._files(side)[2], f"{side}: held-out prompts")
            yield Stage("score", side, self._files(side)[3], f"{side}: scoring those answers")

    def _files(self, of: str) -> list[Path]:
        """Answers, scored answers, and what says that each is done."""
        if of == _TRAINING:
            names = ("answers.jsonl", "scored.jsonl", "sampling.json", "scoring.json")
            return [self.folder / "answers" / name for name in names]
        ends = (".jsonl", "_scored.jsonl", "_sampling.json", "_scoring.json")
        return [self.folder / "held_out" / f"{of}{end}" for end in ends]

    def check(self) -> None:
        """Raise a one-line `ValueError` for what is missing before anything is loaded."""
        own = self.generation_args
        plan_scorer(own.scorer)
        if not own.prompts:
            raise ValueError("`prompts` is missing: name a file or data set.")
        if not self.model_args.model_name_or_path or not self.args.weak_models:
            raise ValueError("`model_name_or_path` (the strong model) and `weak_models` are needed.")
        for name in self.args.weak_models:
            if name.startswith("sklearn:") or name.endswith("]"):
                raise ValueError(f"`weak_models`: {name} cannot write answers: give whole language models.")
        if own.num_eval_samples < 1 and not own.greedy:
            raise ValueError("`num_eval_samples: 0` and `greedy: false` leave nothing to compare.")
        if own.ceiling_dataset_name:
            self.trusted_rows()
        if self.engine_args.engine != "endpoint" and self.engine_args.engine_model:
            raise ValueError("`engine_model` would answer in place of every model compared: leave it out.")
        self._prompts()

    def make_answers(self) -> Path:
        """Carry out the stages before training that are not done yet; returns the file of answers to train on."""
        run_stages([stage for stage in self.stages() if stage.of == _TRAINING], self.perform)
        return self.kept

    # The stages

    def sample(self, of: str = _TRAINING) -> None:
        """Let the weak models answer the training prompts, or one side the held-out ones, into one file."""
        own, reports, held_out = self.generation_args, {}, of != _TRAINING
        models = {of: self.sides[of]} if held_out else {folder_name(name): name for name in self.args.weak_models}
        answers, _, done, _ = self._files(of)
        for name, model in models.items():
            report = sample_outputs(
                self._engine(model),
                self._prompts()[held_out],
                own.params(self.config.seed),
                answers,
                greedy=own.greedy,
                num_samples=own.num_eval_samples if held_out else own.num_samples,
                system_prompt=own.system_prompt,
                conversational=not own.plain_prompts and self.models.is_conversational(),
                model=name,
            )
            print(f"{name}: {report.summary}")
            reports[name] = asdict(report)
            free_memory()
        write_atomically(done, json.dumps(reports, default=str, indent=2) + "\n")

    def score(self, of: str = _TRAINING) -> None:
        """Score those answers."""
        source, scored, _, done = self._files(of)
        answers = read_jsonl(source, required=(*COLUMNS, "model"))
        answers.sort(key=lambda row: (row["index"], row["model"], row["sample"]))
        report = score_rows(answers, self.scorer, scored)
        check_scores(read_jsonl(scored), self.scorer)
        mark_done(done, report)

    def keep(self, of: str = _TRAINING) -> None:
        """Choose the answers to train on, unless a model was trained on what was chosen before."""
        if self._is_trained(STRONG):
            rest = f"{self.folder / _MODELS[STRONG]}, train_{STRONG} beside it and held_out/{STRONG}*"
            raise ValueError(f"{self.kept} is gone, but a model was trained on it: delete {rest} too to choose anew.")
        kept, report = keep_rows(
            sorted(read_jsonl(self._files(of)[1]), key=lambda row: row["id"]),
            scorer=self.scorer.name,
            higher_is_better=self.scorer.higher_is_better,
            **{name: getattr(self.generation_args, name) for name in _KEEPING},
        )
        self._claim_keeping()
        mark_done(self.kept.with_name("keeping.json"), report)
        write_jsonl(self.kept, kept)

    def train(self, side: str = STRONG) -> None:
        """Fine-tune the strong model on the answers that were kept, or the ceiling on the trusted ones."""
        rows = self.trusted_rows() if side == CEILING else read_jsonl(self.kept)
        self.train_on(rows, self.folder / f"train_{side}", Path(self.sides[side]))

    def train_on(self, rows: Sequence[dict[str, Any]], folder: Path, target: Path) -> None:
        """Fine-tune the strong model on answers, into `target`, with checkpoints and logs in `folder`; plain texts
        without `truncated` count as cut off with `keep_truncated`."""
        config = copy.copy(self.config)
        config.output_dir = str(folder)
        if self.generation_args.keep_truncated and rows and isinstance(rows[0].get("prompt"), str):
            config.completion_only_loss = True
            dataset = to_continuations(rows, self.models.tokenizer())
        else:
            dataset = to_sft_dataset(rows)
        fit(WeakToStrongSFTTrainer, self.model_args, config, dataset, None, target)

    def write_report(self) -> Path:
        """Compare all sides on the held-out prompts and write the report."""
        evaluation = evaluate_toxicity({side: self._harm_of(side) for side in self.existing_sides()})
        evaluation |= {"model": self.model_args.model_name_or_path, "scorer": self._about_scorer()}
        write_atomically(self.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        return write_generation_report(self.folder, evaluation)

    # What the stages share

    def trusted_rows(self) -> list[dict[str, Any]]:
        """What the ceiling is trained on: no prompt that models are compared on."""
        source = str(self.generation_args.ceiling_dataset_name)
        rows: list[dict[str, Any]] = [
            {name: row[name] for name in ("prompt", "completion", "weight", "truncated") if name in row}
            for row in read_rows(source, "train")
        ]
        for place, row in enumerate(rows, start=1):
            if missing := {"prompt", "completion"} - set(row):
                raise ValueError(f"{source}: row {place} has no column `{min(missing)}`, which the ceiling needs.")
        held_out = {_content(query.messages or query.text) for query in self._prompts()[1]}
        left = [row for row in rows if _content(row["prompt"]) not in held_out]
        if not left:
            raise ValueError(f"{source}: the prompts of all {len(rows)} rows are held out: give more prompts.")
        if out := len(rows) - len(left):
            logger.warning("%s: %d of %d rows have a held-out prompt and are left out", source, out, len(rows))
        return left

    def _prompts(self) -> tuple[list[Query], list[Query]]:
        return self.generation_args.load_prompts(self.config.seed)

    def _engine(self, model: str) -> GenerationEngine:
        return self.models.sampler(resolve_model_name(model), is_original=model == self.model_args.model_name_or_path)

    def _about_scorer(self) -> dict[str, Any]:
        return {name: getattr(self.scorer, name) for name in ("name", "range", "higher_is_better")}

    def _harm_of(self, side: str) -> dict[str, list[list[float | None]]]:
        """Harm of the held-out answers by kind, prompts in their order."""
        rows = read_jsonl(self._files(side)[1])
        check_scores(rows, self.scorer)
        table: dict[str, dict[int, list[float | None]]] = {"greedy": {}, "sampled": {}}
        for row in sorted(rows, key=lambda row: (row["index"], row["sample"])):
            kind = "sampled" if row["sample"] else "greedy"
            table[kind].setdefault(row["index"], []).append(harm_of(row, self._about_scorer()))
        return {kind: list(prompts.values()) for kind, prompts in table.items() if prompts}


def _content(prompt: str | list[dict[str, str]]) -> str:
    """What two prompts have in common if they are the same; a chat of one question is the same as its text."""
    if isinstance(prompt, str):
        return prompt.strip()
    own = [{"role": message["role"], "content": message["content"]} for message in prompt]
    turns = [message for message in own if message["role"] != "system"]
    if [message["role"] for message in turns] == ["user"]:
        return turns[0]["content"].strip()
    return json.dumps(own)


# The parts on their own


def label(run: GenerationRun) -> str:
    """Sample, score and choose what is not done yet; returns where the answers are, for a person."""
    run.check()
    with folder_lock(run.folder):
        run.claim()
        return f"answers to train on: {run.make_answers()}"


def train(run: GenerationRun) -> Path:
    """Train the strong model on `dataset_name`; resumes from its last checkpoint. Returns where the model is."""
    rows = read_rows(run.args.dataset_name, run.args.dataset_train_split)
    claim_training(run, {"keep_truncated": run.generation_args.keep_truncated})
    run.train_on(rows, run.folder / "train", run.folder / "model")
    return run.folder / "model"


def evaluate(run: GenerationRun) -> str:
    """Compare the models there are on held-out prompts; returns where the report is, for a person."""
    run.check()
    for side in run.existing_sides():
        run.sample(side)
        run.score(side)
    return f"report: {run.write_report()}"
