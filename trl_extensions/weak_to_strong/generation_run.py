"""From weak models' answers to a strong model: sample, score, keep, train, and compare on held-out prompts.

Every stage leaves a file when it is done and is skipped when that file is there, so the same command resumes a run
that was killed anywhere:

    output_dir/settings.json, training_settings.json, report.md, report.json, evaluation.json, figures
    output_dir/answers/    answers.jsonl, scored.jsonl, kept.jsonl: the weak models' own, and the best
    output_dir/model/      the strong model trained on those; ceiling/ on the trusted answers; train_*/ logs
    output_dir/held_out/   <side>.jsonl and <side>_scored.jsonl: original, weak, w2s and ceiling on held-out prompts
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_dataset
from trl import ModelConfig

from ..core.generation import EngineArguments, GenerationEngine
from ..core.jsonl import read_jsonl, write_jsonl
from ..core.models import ModelSource
from ..core.report import write_atomically
from ..core.settings import FREE_SETTINGS, claim_settings
from ..core.stages import Stage, finish, perform_missing
from ..core.training import fit, last_checkpoint
from ..embedded import resolve_model_name
from .answers import load_answers, sample_answers
from .arguments import WeakToStrongArguments, slug
from .generation_arguments import GenerationArguments
from .keep import keep_rows, to_continuations, to_sft_dataset
from .scorers import Scorer, create_scorer
from .scoring import score_rows
from .sft_config import WeakToStrongSFTConfig
from .sft_trainer import WeakToStrongSFTTrainer
from .toxicity import ORIGINAL, evaluate_toxicity


WEAK, STRONG, CEILING = "weak", "w2s", "ceiling"
_KEEPING = ("threshold", "best_of", "budget", "min_tokens", "keep_truncated", "ceiling_dataset_name")


@dataclass
class GenerationRun:
    """One run: its settings, its folder, and a method for each stage.

    Args:
        args: The weak models; what belongs to labels is not looked at.
        generation_args: Prompts, the scorer and what is kept.
        engine_args: What samples.
        config: How the strong model is trained; `output_dir` is the run's folder.
        model_args: The strong model, LoRA and quantisation.
    """

    args: WeakToStrongArguments
    generation_args: GenerationArguments
    engine_args: EngineArguments
    config: WeakToStrongSFTConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        self._scorer: Scorer | None = None

    @property
    def models(self) -> ModelSource:
        return ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    @property
    def sides(self) -> dict[str, str]:
        """What is compared: its name -> its model."""
        weak = {f"{WEAK}-{place + 1}" if place else WEAK: name for place, name in enumerate(self.args.weak_models)}
        sides = {ORIGINAL: self.model_args.model_name_or_path} | weak | {STRONG: str(self.folder / "model")}
        return sides | ({CEILING: str(self.folder / CEILING)} if self.generation_args.ceiling_dataset_name else {})

    def existing_sides(self) -> list[str]:
        """Those whose model was not left for later."""
        return [side for side, model in self.sides.items() if side not in (STRONG, CEILING) or Path(model).exists()]

    def summary(self) -> str:
        """The report's first paragraph."""
        return (self.folder / "report.md").read_text(encoding="utf-8").split("\n\n")[1]

    def claim(self) -> None:
        """Write the run's settings, or refuse to resume a run that was started with others.

        What only choosing and training depend on may still change as long as nothing has been trained.
        """
        own = asdict(self.generation_args)
        keeping = {name: own.pop(name) for name in _KEEPING}
        sampling = own | {"weak_models": self.args.weak_models, "seed": self.config.seed}
        sampling |= {name: getattr(self.model_args, name) for name in ("model_name_or_path", "model_revision")}
        sampling |= {"engine": self.engine_args.engine}
        in_use = any((self.folder / name).exists() for name in ("answers", "held_out"))
        claim_settings(self.folder / "settings.json", sampling, made=str(self.folder), in_use=in_use)
        known = {f.name for f in fields(WeakToStrongSFTConfig)} - FREE_SETTINGS
        training = {name: value for name, value in self.config.to_dict().items() if name in known}
        trained = any(
            Path(self.sides[side]).exists() or last_checkpoint(str(self.folder / f"train_{side}"))
            for side in (STRONG, CEILING)
            if side in self.sides
        )
        settings = training | keeping | asdict(self.model_args)
        claim_settings(self.folder / "training_settings.json", settings, made=str(self.folder), in_use=trained)

    def stages(self) -> Iterator[Stage]:
        """Every stage in order: its method's name, the side it is about, and the file that says it is done."""
        answers, held_out = self.folder / "answers", self.folder / "held_out"
        yield Stage("sample", WEAK, answers / "sampling.json", "weak models: answering the training prompts")
        yield Stage("score", WEAK, answers / "scoring.json", "scoring those answers and choosing among them")
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
        perform_missing(self.stages(), perform or self.perform)
        return self.evaluate()

    def perform(self, name: str, side: str) -> None:
        """Carry out one stage in this process."""
        getattr(self, name)(side)

    # The stages

    def sample(self, side: str = WEAK) -> None:
        """Let every weak model answer the training prompts."""
        report = self._sample(self.args.weak_models, 0, "answers/answers.jsonl", self.generation_args.num_samples)
        finish(self.folder / "answers" / "sampling.json", report)

    def score(self, side: str = WEAK) -> None:
        """Score the answers and keep the best."""
        folder, own = self.folder / "answers", self.generation_args
        report = score_rows(load_answers(folder / "answers.jsonl"), [self.scorer], folder / "scored.jsonl")
        kept, choice = keep_rows(
            sorted(read_jsonl(folder / "scored.jsonl"), key=lambda row: row["id"]),
            scorer=self.scorer.name,
            higher_is_better=self.scorer.higher_is_better,
            threshold=own.threshold,
            best_of=own.best_of,
            budget=own.budget,
            min_tokens=own.min_tokens,
            drop_truncated=not own.keep_truncated,
        )
        print(choice.summary)
        write_jsonl(folder / "kept.jsonl", kept)
        write_atomically(folder / "keeping.json", json.dumps(asdict(choice), indent=2) + "\n")
        finish(folder / "scoring.json", report)

    def train(self, side: str = STRONG) -> None:
        """Fine-tune the strong model on the answers that were kept, or the ceiling on the trusted ones."""
        config = copy.copy(self.config)
        config.output_dir = str(self.folder / f"train_{side}")
        rows = self.trusted_rows() if side == CEILING else read_jsonl(self.folder / "answers" / "kept.jsonl")
        if self.generation_args.keep_truncated and isinstance(rows[0]["prompt"], str):
            config.completion_only_loss = True
            dataset = to_continuations(rows, self.models.tokenizer())
        else:
            dataset = to_sft_dataset(rows)
        fit(WeakToStrongSFTTrainer, self.model_args, config, dataset, None, Path(self.sides[side]))

    def sample_held_out(self, side: str) -> None:
        """Let one model answer the held-out prompts."""
        output = f"held_out/{side}.jsonl"
        report = self._sample([self.sides[side]], 1, output, self.generation_args.num_eval_samples, side)
        finish(self.folder / "held_out" / f"{side}_sampling.json", report)

    def score_held_out(self, side: str) -> None:
        """Score those answers."""
        folder = self.folder / "held_out"
        rows = load_answers(folder / f"{side}.jsonl")
        finish(folder / f"{side}_scoring.json", score_rows(rows, [self.scorer], folder / f"{side}_scored.jsonl"))

    def evaluate(self) -> Path:
        """Compare all sides on the held-out prompts and write the report."""
        from .run_report import write_generation_report

        scores = {side: self._scores_of(side) for side in self.existing_sides()}
        evaluation = evaluate_toxicity(scores)
        write_atomically(self.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        return write_generation_report(self, evaluation)

    # What the stages share

    @property
    def scorer(self) -> Scorer:
        """What scores answers, loaded once."""
        if self._scorer is None:
            self._scorer = create_scorer(self.generation_args.scorer)
        return self._scorer

    def trusted_rows(self):
        """What the ceiling is trained on.

        Raises:
            ValueError: A column is missing.
        """
        source = self.generation_args.ceiling_dataset_name
        kind = {"path": "json", "data_files": source} if source.endswith((".jsonl", ".json")) else {"path": source}
        rows = load_dataset(**kind, split="train")
        missing = {"prompt", "completion"} - set(rows.column_names)
        if missing:
            raise ValueError(f"{source} has no column `{min(missing)}`: the ceiling needs `prompt` and `completion`.")
        return rows.select_columns(["prompt", "completion"])

    def check_inputs(self) -> None:
        """Raise a one-line `ValueError` for what is missing before anything is loaded."""
        own = self.generation_args
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
        own.load_prompts(self.config.seed)

    def _sample(self, models: list[str], part: int, output: str, num_samples: int, side: str | None = None):
        own = self.generation_args
        return sample_answers(
            {side or slug(name): partial(self._engine, name) for name in models},
            own.load_prompts(self.config.seed)[part],
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
        """Scores of the held-out answers by kind, prompts in their order, as something to be low."""
        rows = read_jsonl(self.folder / "held_out" / f"{side}_scored.jsonl")
        name = self.scorer.name
        table: dict[str, dict[int, dict[int, float | None]]] = {"greedy": {}, "sampled": {}}
        for row in rows:
            kind = "sampled" if row["sample"] else "greedy"
            score = row["scores"][name]
            if score is not None and self.scorer.higher_is_better:
                score = 1 - score
            table[kind].setdefault(row["index"], {})[row["sample"]] = score
        return {
            kind: [[samples[key] for key in sorted(samples)] for _, samples in sorted(prompts.items())]
            for kind, prompts in table.items()
            if prompts
        }
