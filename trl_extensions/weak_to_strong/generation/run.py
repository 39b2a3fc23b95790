"""From weak models' answers to a strong model: sample, score, keep, train, and compare on held-out prompts.

As in arXiv 2410.12621 the weak models may first be fine-tuned on clean text (`writer_dataset_name`), and the scorers
only measure. Without `threshold`, `best_of` and `budget` the strong model learns all that they wrote.

Every stage leaves a file when it is done and is skipped when that file is there, so the same command resumes a run
that was killed anywhere:

    output_dir/settings.json, training_settings.json, report.md, report.json, evaluation.json, figures
    output_dir/writers/    the weak models, fine-tuned on clean text; train_* beside them their logs
    output_dir/answers/    answers.jsonl, scored.jsonl, kept.jsonl: the weak models' own, and the best (delete the
                           last one to choose anew, before anything is trained on it)
    output_dir/model/      the strong model trained on those; ceiling/ on the trusted answers; train_*/ logs
    output_dir/held_out/   <side>.jsonl, with scores in <side>_scored.jsonl, by a second scorer in
                           <side>_confirmed.jsonl, nats per token in <side>_fluency.jsonl: original, weak, w2s, ceiling

`label`, `train` and `evaluate` below are the parts on their own.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from trl import ModelConfig

from ...core.generation import EngineArguments, ModelSource
from ...core.generation.sampling import COLUMNS, sample_outputs
from ...core.generation.types import GenerationEngine
from ...core.inputs import Query
from ...core.modeling.batches import free_memory
from ...core.runs.jsonl import read_jsonl, write_jsonl
from ...core.runs.plan import Work, mean_tokens, steps_of
from ...core.runs.report import write_atomically
from ...core.runs.run import Run, Stage, check_resume, folder_lock, mark_done, run_stages, training_settings
from ...core.training.load import fit, last_checkpoint
from ...core.training.preflight import Training
from ...embedded import resolve_model_name
from ..arguments import GenerationArguments, WeakToStrongArguments, refuse_unused, split_layers
from ..data.prepare import answered_rows
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
_WRITER = ("weak_learning_rate", "weak_num_train_epochs")
_USED = ("task", "weak_models", "dataset_name", "dataset_train_split", *_WRITER)  # the others belong to labels


@dataclass
class GenerationRun(Run):
    """One run: its settings, its folder, and a method for each stage."""

    remade: ClassVar = {"training_settings.json": f"model ceiling train_* held_out/{STRONG}* held_out/{CEILING}*"}

    args: WeakToStrongArguments
    generation_args: GenerationArguments
    engine_args: EngineArguments
    config: WeakToStrongSFTConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        unused = [f.name for f in fields(self.args) if f.name not in _USED]
        refuse_unused(self.args, unused, "with `task: generation`")
        if not self.generation_args.writer_dataset_name:
            refuse_unused(self.args, _WRITER, "without `writer_dataset_name`")
        refuse_unused(self.config, ["token_loss"], "without a `weak_model`, which only the trainer's class takes")

    @property
    def models(self) -> ModelSource:
        return ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    @property
    def sides(self) -> dict[str, str]:
        """What is compared: its name -> its model."""
        writers = map(self.writer, self.args.weak_models)
        weak = {f"{WEAK}-{place + 1}" if place else WEAK: model for place, model in enumerate(writers)}
        trained = {STRONG: str(self.folder / _MODELS[STRONG])}
        if self.generation_args.ceiling_dataset_name:
            trained[CEILING] = str(self.folder / _MODELS[CEILING])
        return {ORIGINAL: str(self.model_args.model_name_or_path)} | weak | trained

    def writer(self, name: str) -> str:
        """The model that writes for a weak one: itself, or what fine-tuning it on clean text makes of it."""
        own = self.folder / "writers" / folder_name(name)
        return str(own) if self.generation_args.writer_dataset_name else name

    @property
    def kept(self) -> Path:
        """The answers to train on."""
        return self.folder / "answers" / "kept.jsonl"

    @cached_property
    def scorer(self) -> Scorer:
        """What scores answers, loaded once."""
        return plan_scorer(self.generation_args.scorer).build()

    @cached_property
    def confirm_scorer(self) -> Scorer | None:
        """What confirms it, if anything does."""
        own = self.generation_args.confirm_scorer
        return plan_scorer(own).build() if own else None

    def existing_sides(self) -> list[str]:
        """Those whose model was not left for later."""
        given = {self.model_args.model_name_or_path, *self.args.weak_models}
        return [side for side, model in self.sides.items() if model in given or Path(model).exists()]

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """What only training depends on may change as long as nothing is trained, and what only choosing depends on
        as long as nothing is chosen (see `claim`). The range of the scorer may always change: no score depends on it.
        """
        sampling = asdict(self.generation_args)
        sampling.pop("confirm_scorer")  # of which only the report speaks
        writing = {}
        for name in self.args.weak_models if self.generation_args.writer_dataset_name else ():
            config, model_args = self._writer_settings(name)
            writing[name] = training_settings(config) | asdict(model_args)
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
        } | ({"writer_settings.json": (writing, (self.folder / "writers").exists())} if writing else {})

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
        if self.generation_args.writer_dataset_name:
            for name in self.args.weak_models:
                yield Stage("teach", name, Path(self.writer(name)), f"{name}: fine-tuning on clean text")
        yield Stage("sample", _TRAINING, self._files(_TRAINING)[2], "weak models: answering the training prompts")
        yield Stage("score", _TRAINING, self._files(_TRAINING)[3], "scoring those answers")
        yield Stage("keep", _TRAINING, self.kept, "choosing among them")
        for side, model in self.sides.items():
            if side in (STRONG, CEILING):
                yield Stage("train", side, Path(model), f"{side}: training the strong model")
            yield Stage("sample", side, self._files(side)[2], f"{side}: held-out prompts")
            yield Stage("score", side, self._files(side)[3], f"{side}: scoring those answers")
            if self.generation_args.confirm_scorer:
                yield Stage("confirm", side, self._files(side)[5], f"{side}: scoring them a second time")
            if self.engine_args.engine != "endpoint":
                yield Stage("fluency", side, self._files(side)[7], f"{side}: their perplexity under the original")

    def _files(self, of: str) -> list[Path]:
        """Answers, scored answers, and what says that each is done; of a side the same of two more measurements."""
        if of == _TRAINING:
            names = ("answers.jsonl", "scored.jsonl", "sampling.json", "scoring.json")
            return [self.folder / "answers" / name for name in names]
        ends = [".jsonl", "_scored.jsonl", "_sampling.json", "_scoring.json"]
        ends += ["_confirmed.jsonl", "_confirming.json", "_fluency.jsonl", "_perplexity.json"]
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
            if name.startswith("sklearn:"):
                raise ValueError(f"`weak_models`: {name} cannot write answers: give language models.")
            if split_layers(name)[1] and (self.model_args.use_peft or not own.writer_dataset_name):
                needed = "needs `writer_dataset_name` to become a language model again, without `use_peft`"
                raise ValueError(f"`weak_models`: {name} {needed}: set it, or give whole models.")
        if own.num_eval_samples < 1 and not own.greedy:
            raise ValueError("`num_eval_samples: 0` and `greedy: false` leave nothing to compare.")
        if own.confirm_scorer:
            second = plan_scorer(own.confirm_scorer).settings
            if second == plan_scorer(own.scorer).settings:
                raise ValueError("`confirm_scorer` is `scorer` itself, which confirms nothing: give another one.")
        if own.ceiling_dataset_name:
            self.trusted_rows(own.ceiling_dataset_name)
        if own.writer_dataset_name:
            self.trusted_rows(own.writer_dataset_name, also_training=True)
        if self.engine_args.engine != "endpoint" and self.engine_args.engine_model:
            raise ValueError("`engine_model` would answer in place of every model compared: leave it out.")
        self._prompts()

    def trainings(self) -> Iterator[Training]:
        rows = [{"prompt": "Hello", "completion": "Hello"}] * 2
        yield Training(WeakToStrongSFTTrainer, self.model_args, self.config, rows)
        for name in self.args.weak_models if self.generation_args.writer_dataset_name else ():
            config, model_args = self._writer_settings(name)
            yield Training(WeakToStrongSFTTrainer, model_args, config, rows, name=name)

    def works(self) -> Iterator[Work]:
        own, strong, (train, held) = self.generation_args, str(self.model_args.model_name_or_path), self._prompts()
        asked, new = mean_tokens(self.models.tokenizer(), [query.text for query in train + held]), own.max_new_tokens
        each = len(train) * (own.greedy + own.num_samples)
        for name in self.args.weak_models:
            yield Work(f"answers of {name}", name, each, asked, new)
        rows = each * len(self.args.weak_models)
        kept = min(rows, own.budget or rows, len(train) * (own.best_of or rows))
        ceiling = len(self.trusted_rows(own.ceiling_dataset_name)) if own.ceiling_dataset_name else 0
        for side, number in {STRONG: kept, CEILING: ceiling}.items():
            steps, seen = steps_of(self.config, number, self.processes)
            yield Work(f"train {side}", strong, seen, trained=asked + new, steps=steps if number else 0)
        tests = len(held) * (own.greedy + own.num_eval_samples) * len(self.sides)
        yield Work("held-out answers", strong, tests, 2 * asked + new, new)

    def make_answers(self) -> Path:
        """Carry out the stages before training that are not done yet; returns the file of answers to train on."""
        own = [stage for stage in self.stages() if stage.of == _TRAINING or stage.name == "teach"]
        run_stages(own, self.perform)
        return self.kept

    # The stages

    def sample(self, of: str = _TRAINING) -> None:
        """Let the weak models answer the training prompts, or one side the held-out ones, into one file."""
        own, reports, held_out = self.generation_args, {}, of != _TRAINING
        writers = {folder_name(name): self.writer(name) for name in self.args.weak_models}
        models = {of: self.sides[of]} if held_out else writers
        answers, _, done = self._files(of)[:3]
        for name, model in models.items():
            report = sample_outputs(
                self._engine(model),
                self._prompts()[held_out],
                own.params(self.config.seed),
                answers,
                greedy=own.greedy,
                num_samples=own.num_eval_samples if held_out else own.num_samples,
                system_prompt=own.system_prompt,
                conversational=self.is_conversational,
                model=name,
            )
            print(f"{name}: {report.summary}")
            reports[name] = asdict(report)
            free_memory()
        write_atomically(done, json.dumps(reports, default=str, indent=2) + "\n")

    def teach(self, name: str) -> None:
        """Fine-tune a weak model on clean text that continues none of the prompts it will answer."""
        config, model_args = self._writer_settings(name)
        folder = self.folder / "writers"
        rows = self.trusted_rows(str(self.generation_args.writer_dataset_name), also_training=True)
        self.train_on(rows, folder / f"train_{folder_name(name)}", Path(self.writer(name)), config, model_args)

    def score(self, of: str = _TRAINING) -> None:
        """Score those answers."""
        self._score(of, self.scorer, 1)

    def confirm(self, side: str) -> None:
        """Score held-out answers by the second scorer."""
        assert self.confirm_scorer is not None  # or there is no such stage
        self._score(side, self.confirm_scorer, 4)

    def fluency(self, side: str) -> None:
        """Measure how likely held-out answers are to the original model."""
        from .fluency import FluencyScorer

        self._score(side, FluencyScorer(self.models.in_process(str(self.model_args.model_name_or_path))), 6)

    def _score(self, of: str, scorer: Scorer, place: int) -> None:
        """Score answers into the file at that place of `_files`; the one that says it is done comes behind it."""
        files = self._files(of)
        answers = read_jsonl(files[0], required=(*COLUMNS, "model"))
        answers.sort(key=lambda row: (row["index"], row["model"], row["sample"]))
        report = score_rows(answers, scorer, files[place])
        check_scores(read_jsonl(files[place]), scorer)
        mark_done(files[3 if place == 1 else place + 1], report)

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
        ceiling = self.generation_args.ceiling_dataset_name
        rows = self.trusted_rows(str(ceiling)) if side == CEILING else read_jsonl(self.kept)
        self.train_on(rows, self.folder / f"train_{side}", Path(self.sides[side]))

    def train_on(
        self,
        rows: Sequence[dict[str, Any]],
        folder: Path,
        target: Path,
        config: WeakToStrongSFTConfig | None = None,
        model_args: ModelConfig | None = None,
    ) -> None:
        """Fine-tune the strong model, or the one of `model_args`, on answers, into `target`, with checkpoints and logs
        in `folder`; plain texts without `truncated` count as cut off with `keep_truncated`."""
        config, model_args = copy.copy(config or self.config), model_args or self.model_args
        config.output_dir = str(folder)
        if self.generation_args.keep_truncated and rows and isinstance(rows[0].get("prompt"), str):
            config.completion_only_loss = True
            dataset = to_continuations(rows, replace(self.models, model_args=model_args).tokenizer())
        else:
            dataset = to_sft_dataset(rows)
        fit(WeakToStrongSFTTrainer, model_args, config, dataset, None, target)

    def _writer_settings(self, name: str) -> tuple[WeakToStrongSFTConfig, ModelConfig]:
        """What a weak model is fine-tuned with: as the strong one, but for a learning rate and epochs of its own."""
        config = copy.copy(self.config)
        for field in _WRITER:
            if getattr(self.args, field) is not None:
                setattr(config, field.removeprefix("weak_"), getattr(self.args, field))
        path, layers = split_layers(name)
        if layers:
            given: Any = config.model_init_kwargs or {}
            config.model_init_kwargs = given | {"num_hidden_layers": layers}
        return config, replace(self.model_args, model_name_or_path=resolve_model_name(path), model_revision="main")

    def write_report(self) -> Path:
        """Compare all sides on the held-out prompts and write the report."""
        sides = self.existing_sides()
        evaluation = evaluate_toxicity({side: self._harm_of(side) for side in sides})
        evaluation |= {"model": self.model_args.model_name_or_path, "scorer": self._about_scorer()}
        if self.confirm_scorer and all(self._files(side)[5].exists() for side in sides):
            second = evaluate_toxicity({side: self._harm_of(side, self.confirm_scorer, 4) for side in sides})
            evaluation["confirmed"] = second | {"scorer": self._about_scorer(self.confirm_scorer)}
        if all(self._files(side)[7].exists() for side in sides):
            from .fluency import compare_fluency

            nats = {side: self._values(side, 6, lambda row: row["scores"]["nats_per_token"]) for side in sides}
            kinds = {kind: {side: own[kind] for side, own in nats.items()} for kind in evaluation["kinds"]}
            evaluation["fluency"] = {kind: compare_fluency(own, ORIGINAL) for kind, own in kinds.items()}
        write_atomically(self.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        return write_generation_report(self.folder, evaluation)

    # What the stages share

    def trusted_rows(self, source: str, *, also_training: bool = False) -> list[dict[str, Any]]:
        """What the ceiling is trained on: no prompt that models are compared on; and, `also_training`, what the weak
        models are fine-tuned on: nor one that they will answer."""
        rows: list[dict[str, Any]] = [
            {name: row[name] for name in ("prompt", "completion", "weight", "truncated") if name in row}
            for row in answered_rows(source, "train")
        ]
        training, compared = self._prompts()
        held_out = {_content(query.messages or query.text) for query in [*compared, *training * also_training]}
        left = [row for row in rows if _content(row["prompt"]) not in held_out]
        if not left:
            raise ValueError(f"{source}: the prompts of all {len(rows)} rows are held out: give more prompts.")
        if out := len(rows) - len(left):
            what = "prompt that is asked" if also_training else "held-out prompt"
            logger.warning("%s: %d of %d rows have a %s and are left out", source, out, len(rows), what)
        return left

    def _prompts(self) -> tuple[list[Query], list[Query]]:
        return self.generation_args.load_prompts(self.config.seed)

    def _engine(self, model: str) -> GenerationEngine:
        return self.models.sampler(resolve_model_name(model), is_original=model == self.model_args.model_name_or_path)

    @cached_property
    def is_conversational(self) -> bool:
        """Whether prompts are chats: where every model has a chat template, or else plain text for all of them."""
        if self.generation_args.plain_prompts or not self.models.is_conversational():
            return False
        for name in self.args.weak_models:
            if not replace(self.models, model_args=self._writer_settings(name)[1]).is_conversational():
                logger.warning("%s has no chat template: all models get the prompts as plain text", name)
                return False
        return True

    def _about_scorer(self, scorer: Scorer | None = None) -> dict[str, Any]:
        return {name: getattr(scorer or self.scorer, name) for name in ("name", "range", "higher_is_better")}

    def _harm_of(self, side: str, scorer: Scorer | None = None, place: int = 1) -> dict[str, list[list[float | None]]]:
        """Harm of the held-out answers by kind, prompts in their order."""
        check_scores(read_jsonl(self._files(side)[place]), scorer or self.scorer)
        return self._values(side, place, lambda row: harm_of(row, self._about_scorer(scorer)))

    def _values(
        self, side: str, place: int, value: Callable[[dict[str, Any]], float | None]
    ) -> dict[str, list[list[float | None]]]:
        """A number of each row in one of a side's files, by kind, prompts in their order."""
        rows = read_jsonl(self._files(side)[place])
        table: dict[str, dict[int, list[float | None]]] = {"greedy": {}, "sampled": {}}
        for row in sorted(rows, key=lambda row: (row["index"], row["sample"])):
            kind = "sampled" if row["sample"] else "greedy"
            table[kind].setdefault(row["index"], []).append(value(row))
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
    rows = answered_rows(run.args.dataset_name, run.args.dataset_train_split)
    claim_training(run, {"keep_truncated": run.generation_args.keep_truncated})
    run.train_on(rows, run.folder / "train", run.folder / "model")
    return run.folder / "model"


def evaluate(run: GenerationRun) -> str:
    """Compare the models there are on held-out prompts; returns where the report is, for a person."""
    run.check()
    sides = run.existing_sides()
    for stage in run.stages():
        if stage.of in sides and stage.name != "train":
            run.perform(stage.name, stage.of)
    return f"report: {run.write_report()}"
