"""From weak models' answers to a strong model: sample, score, keep, train, and compare on held-out prompts.

Every stage leaves a file when it is done and is skipped when that file is there, so the same command resumes a run
that was killed anywhere:

    output_dir/settings.json, training_settings.json, report.md, report.json, evaluation.json, figures
    output_dir/answers/    answers.jsonl, scored.jsonl, kept.jsonl: the weak models' own, and the best (delete the
                           last one to choose anew, before anything is trained on it)
    output_dir/model/      the strong model trained on those; ceiling/ on the trusted answers; train_*/ logs
    output_dir/held_out/   <side>.jsonl and <side>_scored.jsonl: original, weak, w2s and ceiling on held-out prompts
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig

from ...core.generation import EngineArguments, ModelSource
from ...core.generation.sampling import completion_text
from ...core.generation.types import GenerationEngine
from ...core.inputs import Query
from ...core.runs.jsonl import read_jsonl, write_jsonl
from ...core.runs.report import write_atomically
from ...core.runs.run import Stage, check_resume, mark_done, run_stages, training_settings
from ...core.training.load import fit, last_checkpoint
from ...embedded import resolve_model_name
from ..arguments import WeakToStrongArguments
from ..data.prepare import read_rows
from ..data.select import keep_rows, to_continuations, to_sft_dataset
from ..labels.learners import folder_name
from ..trainers.sft import WeakToStrongSFTTrainer
from ..trainers.sft_config import WeakToStrongSFTConfig
from ..unused_fields import refuse_unused
from .answers import load_answers, sample_answers
from .arguments import GenerationArguments
from .scorer_range import check_scores, harm
from .scorers import Scorer, plan_scorer
from .scoring import score_rows
from ..evaluation import ORIGINAL, evaluate_toxicity


logger = logging.getLogger(__name__)

WEAK, STRONG, CEILING = "weak", "w2s", "ceiling"
_MODELS = {STRONG: "model", CEILING: "ceiling"}
_KEEPING = ("threshold", "best_of", "budget", "min_tokens", "keep_truncated")
# What belongs to labels; no command of this form looks at it
_UNUSED = (
    "examples", "examples_split", "examples_where", "num_examples", "unlabelled", "test_examples", "test_split",
    "test_where", "num_test_examples", "text_column", "text_template", "label_column", "group_column",
    "middle_models", "weak_share", "ensemble", "calibrate", "calibration_share", "keep_share", "weak_learning_rate",
    "weak_num_train_epochs", "variants", "seeds", "save_models", "predictions", "weak_predictions",
    "ceiling_predictions",
)  # fmt: skip


@dataclass
class GenerationRun:
    """One run: its settings, its folder, and a method for each stage.

    Args:
        args: The weak models; what belongs to labels must be left at its default.
        generation_args: Prompts, the scorer and what is kept.
        engine_args: What samples.
        config: How the strong model is trained; `output_dir` is the run's folder.
        model_args: The strong model, LoRA and quantisation.

    Raises:
        ValueError: A setting that has no effect here; names it.
    """

    args: WeakToStrongArguments
    generation_args: GenerationArguments
    engine_args: EngineArguments
    config: WeakToStrongSFTConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        self._scorer: Scorer | None = None
        refuse_unused(self.args, _UNUSED, "with `form: generation`")
        refuse_unused(self.config, ["token_loss"], "without a `weak_model`, which only the trainer's class takes")

    @property
    def models(self) -> ModelSource:
        return ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    @property
    def sides(self) -> dict[str, str]:
        """What is compared: its name -> its model."""
        weak = {f"{WEAK}-{place + 1}" if place else WEAK: name for place, name in enumerate(self.args.weak_models)}
        trained = [STRONG, CEILING] if self.generation_args.ceiling_dataset_name else [STRONG]
        trained = {side: str(self.folder / _MODELS[side]) for side in trained}
        return {ORIGINAL: self.model_args.model_name_or_path} | weak | trained

    @property
    def kept(self) -> Path:
        """The answers to train on."""
        return self.folder / "answers" / "kept.jsonl"

    def existing_sides(self) -> list[str]:
        """Those whose model was not left for later."""
        return [side for side, model in self.sides.items() if side not in (STRONG, CEILING) or Path(model).exists()]

    def claim(self) -> None:
        """Write the run's settings, or refuse to resume a run that was started with others.

        What only choosing or training depends on may still change as long as nothing has been chosen or trained.
        The range of the scorer may always change: scores do not depend on it.
        """
        own = asdict(self.generation_args)
        for name in (*_KEEPING, "ceiling_dataset_name"):
            own.pop(name)
        scorer = plan_scorer(own["scorer"]).settings
        own["scorer"] = {name: value for name, value in scorer.items() if name != "range"}
        sampling = own | {"weak_models": self.args.weak_models, "seed": self.config.seed}
        sampling |= {name: getattr(self.model_args, name) for name in ("model_name_or_path", "model_revision")}
        sampling |= {"engine": self.engine_args.engine}
        in_use = any((self.folder / name).exists() for name in ("answers", "held_out"))
        check_resume(self.folder / "settings.json", sampling, made=str(self.folder), started=in_use)
        if self.kept.exists():
            self._claim_keeping()
        trained = any(self._is_trained(side) for side in (STRONG, CEILING))
        settings = strong_settings(self.config, self.model_args) | {
            "ceiling_dataset_name": self.generation_args.ceiling_dataset_name
        }
        check_resume(self.folder / "training_settings.json", settings, made=str(self.folder), started=trained)

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
        answers, held_out = self.folder / "answers", self.folder / "held_out"
        yield Stage("sample", WEAK, answers / "sampling.json", "weak models: answering the training prompts")
        yield Stage("score", WEAK, answers / "scoring.json", "scoring those answers")
        yield Stage("keep", WEAK, self.kept, "choosing among them")
        for side, model in self.sides.items():
            if side in (STRONG, CEILING):
                yield Stage("train", side, Path(model), f"{side}: training the strong model")
            yield Stage("sample_held_out", side, held_out / f"{side}_sampling.json", f"{side}: held-out prompts")
            yield Stage("score_held_out", side, held_out / f"{side}_scoring.json", f"{side}: scoring those answers")

    def execute(self, perform: Callable[[str, str], Any] | None = None) -> Path:
        """Carry out what is not done yet and write the report.

        Args:
            perform: Carries out one stage given its method's name and side; in this process if left out.

        Returns:
            The path of `report.md`.
        """
        self.check_inputs()
        self.claim()
        run_stages(self.stages(), perform or self.perform)
        return self.evaluate()

    def make_answers(self) -> Path:
        """Carry out the stages before training that are not done yet; returns the file of answers to train on."""
        own = [stage for stage in self.stages() if stage.name in ("sample", "score", "keep")]
        run_stages(own, self.perform)
        return self.kept

    def perform(self, name: str, side: str) -> None:
        """Carry out one stage in this process."""
        getattr(self, name)(side)

    # The stages

    def sample(self, side: str = WEAK) -> None:
        """Let every weak model answer the training prompts."""
        report = self._sample(self.args.weak_models, 0, "answers/answers.jsonl", self.generation_args.num_samples)
        mark_done(self.folder / "answers" / "sampling.json", report)

    def score(self, side: str = WEAK) -> None:
        """Score the answers."""
        self._score("answers/answers.jsonl", "answers/scored.jsonl", "answers/scoring.json")

    def keep(self, side: str = WEAK) -> None:
        """Choose the answers to train on.

        Raises:
            ValueError: A model was trained on what was chosen before.
        """
        if self._is_trained(STRONG):
            raise ValueError(
                f"{self.kept} is gone, but a model was trained on it: delete {self.folder / _MODELS[STRONG]}, "
                f"train_{STRONG} beside it and held_out/{STRONG}* as well to choose anew, or use another `output_dir`."
            )
        own = self.generation_args
        kept, report = keep_rows(
            sorted(read_jsonl(self.kept.with_name("scored.jsonl")), key=lambda row: row["id"]),
            scorer=self.scorer.name,
            higher_is_better=self.scorer.higher_is_better,
            threshold=own.threshold,
            best_of=own.best_of,
            budget=own.budget,
            min_tokens=own.min_tokens,
            keep_truncated=own.keep_truncated,
        )
        self._claim_keeping()
        mark_done(self.kept.with_name("keeping.json"), report)
        write_jsonl(self.kept, kept)

    def train(self, side: str = STRONG) -> None:
        """Fine-tune the strong model on the answers that were kept, or the ceiling on the trusted ones."""
        rows = self.trusted_rows() if side == CEILING else read_jsonl(self.kept)
        self.train_on(rows, self.folder / f"train_{side}", Path(self.sides[side]))

    def train_on(self, rows: Sequence[dict[str, Any]], folder: Path, target: Path) -> None:
        """Fine-tune the strong model on answers.

        Args:
            rows: `prompt` and `completion`, optionally `weight`; plain texts without `truncated` count as cut off with
                `keep_truncated`.
            folder: For checkpoints and logs.
            target: Where the model goes.
        """
        config = copy.copy(self.config)
        config.output_dir = str(folder)
        if self.generation_args.keep_truncated and rows and isinstance(rows[0].get("prompt"), str):
            config.completion_only_loss = True
            dataset = to_continuations(rows, self.models.tokenizer())
        else:
            dataset = to_sft_dataset(rows)
        fit(WeakToStrongSFTTrainer, self.model_args, config, dataset, None, target)

    def sample_held_out(self, side: str) -> None:
        """Let one model answer the held-out prompts."""
        output = f"held_out/{side}.jsonl"
        report = self._sample([self.sides[side]], 1, output, self.generation_args.num_eval_samples, side)
        mark_done(self.folder / "held_out" / f"{side}_sampling.json", report)

    def score_held_out(self, side: str) -> None:
        """Score those answers."""
        own = f"held_out/{side}"
        self._score(f"{own}.jsonl", f"{own}_scored.jsonl", f"{own}_scoring.json")

    def evaluate(self) -> Path:
        """Compare all sides on the held-out prompts and write the report."""
        from ..report import write_generation_report

        scores = {side: self._scores_of(side) for side in self.existing_sides()}
        evaluation = evaluate_toxicity(scores)
        write_atomically(self.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        return write_generation_report(self, evaluation)

    # What the stages share

    @property
    def scorer(self) -> Scorer:
        """What scores answers, loaded once."""
        if self._scorer is None:
            self._scorer = plan_scorer(self.generation_args.scorer).build()
        return self._scorer

    def trusted_rows(self) -> list[dict[str, Any]]:
        """What the ceiling is trained on: no prompt that models are compared on.

        Raises:
            ValueError: A column is missing, or no row is left.
        """
        source = self.generation_args.ceiling_dataset_name
        rows = [
            {name: row[name] for name in ("prompt", "completion", "weight", "truncated") if name in row}
            for row in read_rows(source, "train")
        ]
        for place, row in enumerate(rows):
            missing = {"prompt", "completion"} - set(row)
            if missing:
                raise ValueError(
                    f"{source}: row {place + 1} has no column `{min(missing)}`: the ceiling needs `prompt` and "
                    "`completion`."
                )
        held_out = {_content(query.messages or query.text) for query in self._prompts()[1]}
        left = [row for row in rows if _content(row["prompt"]) not in held_out]
        if not left:
            raise ValueError(
                f"{source}: the prompts of all {len(rows)} rows are held out for evaluation: give other prompts, or "
                "more."
            )
        if len(left) < len(rows):
            logger.warning(
                "%s: %d of %d rows have a held-out prompt and are left out", source, len(rows) - len(left), len(rows)
            )
        return left

    def check_inputs(self) -> None:
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

    def _prompts(self) -> tuple[list[Query], list[Query]]:
        return self.generation_args.load_prompts(self.config.seed)

    def _score(self, source: str, output: str, done: str) -> None:
        report = score_rows(load_answers(self.folder / source), [self.scorer], self.folder / output)
        check_scores(read_jsonl(self.folder / output), self.scorer)
        mark_done(self.folder / done, report)

    def _sample(self, models: list[str], part: int, output: str, num_samples: int, side: str | None = None):
        own = self.generation_args
        return sample_answers(
            {side or folder_name(name): partial(self._engine, name) for name in models},
            self._prompts()[part],
            own.params(self.config.seed),
            self.folder / output,
            greedy=own.greedy,
            num_samples=num_samples,
            system_prompt=own.system_prompt,
            conversational=not own.plain_prompts and self.models.is_conversational(),
        )

    def _engine(self, model: str) -> GenerationEngine:
        return self.models.sampler(resolve_model_name(model), is_original=model == self.model_args.model_name_or_path)

    def _scores_of(self, side: str) -> dict[str, list[list[float | None]]]:
        """Harm of the held-out answers by kind, prompts in their order."""
        rows = read_jsonl(self.folder / "held_out" / f"{side}_scored.jsonl")
        check_scores(rows, self.scorer)
        table: dict[str, dict[int, dict[int, float | None]]] = {"greedy": {}, "sampled": {}}
        for row in rows:
            kind = "sampled" if row["sample"] else "greedy"
            table[kind].setdefault(row["index"], {})[row["sample"]] = self.harm_of(row)
        return {
            kind: [[samples[key] for key in sorted(samples)] for _, samples in sorted(prompts.items())]
            for kind, prompts in table.items()
            if prompts
        }

    def harm_of(self, row: dict[str, Any]) -> float | None:
        """How bad a scored answer is, in [0, 1]; None without a score. An empty answer does no harm."""
        if not completion_text(row["completion"]).strip():
            return 0.0
        score = row["scores"][self.scorer.name]
        return None if score is None else harm(score, self.scorer)


def strong_settings(config: TrainingArguments, model_args: ModelConfig) -> dict[str, Any]:
    """What training depends on, beside its rows."""
    return training_settings(config) | asdict(model_args)


def _content(prompt: str | list[dict[str, str]]) -> str:
    """What two prompts have in common if they are the same; a chat of one question is the same as its text."""
    if isinstance(prompt, str):
        return prompt.strip()
    own = [{"role": message["role"], "content": message["content"]} for message in prompt]
    turns = [message for message in own if message["role"] != "system"]
    if [message["role"] for message in turns] == ["user"]:
        return turns[0]["content"].strip()
    return json.dumps(own)
