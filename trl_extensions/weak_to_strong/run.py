"""From weak labels to a strong model and what it recovered, for classification and for preferences.

For every seed: split the examples in two halves, train the weak models on the true labels of one, let them label the
other, train the strong model on those labels (once per variant) and on the true ones (the ceiling), and ask all of
them about the same held-out examples (arXiv 2312.09390, section 3). Every stage leaves a file when it is done and is
skipped when that file is there, so the same command resumes a run that was killed anywhere:

    output_dir/settings.json, report.md, report.json, evaluation.json, figures
    output_dir/features/       states of texts under frozen models, with `linear_probe`
    output_dir/seed_0/         labels/ of the weak models, and a folder for the training of each strong one
    output_dir/predictions/    seed_0/weak.jsonl, ceiling.jsonl, soft_ce.jsonl, ...: what each said of the test rows

With `check_models` there is no ceiling: weak models label the rows of `unlabelled`, those that check learn from the
other half of the examples, and what was gained is forecast from how far they agree (`forecast`).

`label`, `train` and `evaluate` below are the parts on their own, for people who bring the others themselves.
"""

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from ..core.extras import import_extra
from ..core.runs.jsonl import read_jsonl, write_jsonl
from ..core.runs.plan import Work, mean_tokens, steps_of
from ..core.runs.report import write_atomically
from ..core.runs.run import MUTABLE_ON_RESUME, Run, Stage, check_resume, folder_lock, training_settings
from ..core.training.load import fit, last_checkpoint
from ..core.training.preflight import Training
from ..embedded import resolve_model_name
from .arguments import WeakToStrongArguments, filter_of, parse_variant, refuse_unused, split_layers
from .data.examples import Example, Pair, load_examples, load_pairs, split_halves
from .data.prepare import source_settings, training_set
from .data.select import keep_confident
from .evaluation import (
    CEILING,
    MOST_SUBGROUPS,
    STRONG,
    TEACHER_PREFIX,
    WEAK,
    Predictions,
    evaluate_run,
    load_run,
    scores,
)
from .forecast import forecast
from .labels.learners import Learner, Rows, StageLabels, bootstrap_chain, fingerprint, folder_name, prediction_rows
from .labels.transformer_learner import TransformerLearner, predict_saved, saved_class_names
from .report import forecast_text, recovered, write_label_report
from .trainers.classification import WeakToStrongTrainer
from .trainers.configs import WeakToStrongConfig, WeakToStrongRewardConfig
from .trainers.features import FeatureStore
from .trainers.reward import WeakToStrongRewardTrainer


logger = logging.getLogger(__name__)

_MUTABLE_ON_RESUME = MUTABLE_ON_RESUME | {
    "seed", "seeds", "variants", "save_models", "subgroup_column",
    "dataset_name", "dataset_train_split", "unlabelled", "predictions", "weak_predictions", "ceiling_predictions",
    "check_predictions", "check_models", "test_labels",
}  # fmt: skip
# What a run depends on that forecasts; folders of earlier versions have no word of it
_OF_FORECASTS = ("unlabelled", "check_models", "test_labels")

SKLEARN, CHECK = "sklearn:", "check:"


@dataclass
class WeakToStrongRun(Run):
    """One run: its settings, its folder, and a method for each stage."""

    args: WeakToStrongArguments
    config: WeakToStrongConfig | WeakToStrongRewardConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        self._rows: dict[str, Rows] = {}
        self._class_names: list[str] | None = None
        self._learners: dict[tuple[str, bool], Learner] = {}

    @property
    def is_pairs(self) -> bool:
        return self.args.task == "reward"

    @property
    def trained(self) -> list[str]:
        """The strong models: the ceiling, where there are true labels to train it on, and one a variant."""
        return list(self.args.variants) if self.args.check_models else [CEILING, *self.args.variants]

    def needs_processes(self) -> bool:
        return super().needs_processes() and not getattr(self.config, "linear_probe", False)

    def stages(self) -> Iterator[Stage]:
        """Every stage in order: its method's name, its seed and variant, and the file that says it is done."""
        for seed in self.args.seeds:
            yield Stage("label", f"{seed}", self._predictions(seed, WEAK), f"seed {seed}: weak labels")
            for variant in self.trained:
                label = f"seed {seed}: strong model, {'true labels' if variant == CEILING else variant}"
                yield Stage("train", f"{seed}/{variant}", self._predictions(seed, variant), label)

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """What labels and models depend on, beside seeds and variants, of which more may be added."""
        settings = training_settings(self.config, _MUTABLE_ON_RESUME)
        settings["learning_rate"] = self.config.rate(self.model_args.use_peft)
        settings |= {name: value for name, value in asdict(self.args).items() if name not in _MUTABLE_ON_RESUME}
        if self.args.check_models:
            settings |= {name: getattr(self.args, name) for name in _OF_FORECASTS}
        for name, rows in (("examples", self.examples), ("test_examples", self.test_examples)):
            if getattr(self.args, name):
                settings[f"{name}_in_file"] = fingerprint(rows())
        started = (self.folder / "labels").exists() or any(self.folder.glob("seed_*"))
        return {"settings.json": (settings | asdict(self.model_args), started)}

    def check(self) -> None:
        """Raise a one-line `ValueError` for what is missing, or would be ignored, before anything is loaded."""
        args, model_args = self.args, self.model_args
        for name in ("examples", "test_examples"):
            if not getattr(args, name):
                raise ValueError(f"`{name}` is missing: name a file or data set with true labels.")
        if not model_args.model_name_or_path or not args.weak_models:
            raise ValueError("`model_name_or_path` (the strong model) and `weak_models` are needed.")
        if not args.variants:
            raise ValueError("`variants` is empty: name at least one loss, such as soft_ce.")
        if args.check_models and not args.unlabelled:
            raise ValueError(
                "`check_models` needs `unlabelled`: rows for the student, since they learn from the rest."
            )
        if not args.check_models:
            refuse_unused(args, ("test_labels",), "without `check_models`: true labels say what was gained")
        for name in (model_args.model_name_or_path, *args.weak_models, *args.bootstrap_models, *args.check_models):
            split_layers(name)
        if model_args.model_name_or_path.startswith(SKLEARN):
            raise ValueError("`model_name_or_path` must be a transformer: scikit-learn models are weak ones.")
        if self.is_pairs:
            refuse_unused(args, ("text_column", "text_template", "label_column"), "with `task: reward`")
        if args.save_models:
            _check_savable(model_args)
        if getattr(self.config, "linear_probe", False):
            if model_args.load_in_4bit or model_args.load_in_8bit:
                raise ValueError("`linear_probe` trains on states of a model that is not quantised: choose one.")
            refuse_unused(model_args, ("use_peft",), "with `linear_probe`, which trains the head only")
            refuse_unused(self.config, ("overlong_policy",), "with `linear_probe`, which truncates")
        self.test_examples()
        if args.check_models:
            self.unlabelled_rows()

    def trainings(self) -> Iterator[Training]:
        """Of every transformer, under its name."""
        numbers = range(1 if self.is_pairs else len(self.class_names))
        rows: list[dict[str, Any]] = [
            {"text": "Hello", "soft_labels": [float(n == m) for m in numbers]} for n in numbers
        ]
        if self.is_pairs:
            rows = [{"chosen": "Hello", "rejected": "No", "preference": 0.9}] * 2
        for name in dict.fromkeys((self.model_args.model_name_or_path, *self.weak_names)):
            learner = self.learner(name, weak=name != self.model_args.model_name_or_path)
            if isinstance(learner, TransformerLearner):
                config, layers = copy.copy(learner.config), split_layers(name)[1]
                options = {"num_labels": len(numbers)} | ({"num_hidden_layers": layers} if layers else {})
                trainer_class: Any = WeakToStrongRewardTrainer if self.is_pairs else WeakToStrongTrainer
                if not self.is_pairs:
                    config.class_names, config.linear_probe = self.class_names, False
                model_class = AutoModelForSequenceClassification
                yield Training(trainer_class, learner.model_args, config, rows, model_class, options, name)

    @property
    def weak_names(self) -> list[str]:
        """All models but the strong one."""
        return [*self.args.weak_models, *self.args.bootstrap_models, *self.args.check_models]

    def works(self) -> Iterator[Work]:
        strong, args, seeds = self.model_args.model_name_or_path, self.args, len(self.args.seeds)
        texts = [f"{row.chosen}{row.rejected}" if isinstance(row, Pair) else row.text for row in self.examples()]
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_name(split_layers(strong)[0]))
        long, tests, known = (
            mean_tokens(tokenizer, texts, asked=False),
            len(self.test_examples()),
            round(len(texts) * args.weak_share),
        )
        rest = len(self.unlabelled_rows()) if args.check_models else len(texts) - known
        probe, models = getattr(self.config, "linear_probe", False), {name: name for name in self.weak_names}
        for label, name in (models | dict.fromkeys(self.trained, strong)).items():
            is_weak = label not in self.trained
            learner, number = self.learner(name, weak=name != strong), known if is_weak else rest
            if isinstance(learner, TransformerLearner):
                asked = tests + known * (probe and is_weak) + rest * (probe or is_weak)
                yield Work(f"{label}: ask", name, asked * seeds, long)
                steps, seen = (n * seeds for n in steps_of(learner.config, number, self.processes))
                yield Work(f"{label}: train", name, seen, trained=0 if probe else long, steps=steps)

    # The stages

    def label(self, of: str) -> None:
        """Train the weak models on one half of the examples and let them label the other, and the test rows."""
        seed, test = int(of), self.test_examples()
        labelled, rest = split_halves(self.examples(), share=self.args.weak_share, seed=seed)
        target: Rows = rest
        if self.args.check_models:
            self._check(rest, seed)
            target = self.unlabelled_rows()
        *earlier, last = self.make_labels(labelled, target, seed, self._label_folder(seed), {"test": test})
        shown = {f"{TEACHER_PREFIX}stage-{number}": stage.soft for number, stage in enumerate(earlier)}
        if len(last.by_learner) > 1:
            shown |= {f"{TEACHER_PREFIX}{folder_name(name)}": own for name, own in last.by_learner.items()}
        for name, own in (shown | {WEAK: last.soft}).items():  # the student's teacher is the last of the chain
            write_jsonl(self._predictions(seed, name), prediction_rows(test, own["test"]))

    def _check(self, rows: Rows, seed: int) -> None:
        """Let the models that check learn from rows the teacher has not seen, and predict the test rows."""
        for name in self.args.check_models:
            learner, path = self.learner(name, weak=True), self._predictions(seed, f"{CHECK}{folder_name(name)}")
            truth = np.eye(len(self.class_names))[np.array([row.label for row in rows], dtype=int)]
            learner.fit(rows, truth, seed=seed, folder=self.folder / f"seed_{seed}" / "checks" / folder_name(name))
            write_jsonl(path, prediction_rows(self.test_examples(), learner.predict(self.test_examples())))

    def train(self, of: str) -> None:
        """Train the strong model on the weak labels, or the true ones, and ask it about the test rows."""
        seed, _, variant = of.partition("/")
        rows, soft_labels = self.weak_labels(int(seed))
        loss, weigh, keep = ("soft_ce", False, False) if variant == CEILING else parse_variant(variant)
        if variant == CEILING:
            soft_labels = np.eye(len(self.class_names))[np.array([row.label for row in rows], dtype=int)]
        if keep:
            names, share = self.class_names, self.args.keep_share
            kept, summary = keep_confident(soft_labels, share, class_names=names, seed=int(seed))
            print(summary)
            rows, soft_labels = [rows[place] for place in kept], soft_labels[kept]
        learner = self.learner(self.model_args.model_name_or_path)
        assert isinstance(learner, TransformerLearner)  # `check` refuses others as the strong model
        folder = self.folder / f"seed_{seed}" / variant
        own = {"loss_type": loss, "weight_by_confidence": weigh}
        learner.fit(rows, soft_labels, seed=int(seed), folder=folder / "train", **own)
        if self.args.save_models:
            learner.trainer.save_model(str(folder / "model"))
            (folder / "model" / "training_args.bin").unlink(missing_ok=True)  # as in `fit`
        probs = learner.predict(self.test_examples())
        if learner.trainer.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "cost.json", json.dumps(learner.cost) + "\n")
            write_jsonl(self._predictions(seed, variant), prediction_rows(self.test_examples(), probs))

    def write_report(self) -> Path:
        """Compare all models over the seeds and write the report."""
        wanted, everything = (WEAK, *self.trained), load_run(self.folder / "predictions")
        predictions = {
            seed: {n: own for n, own in everything[seed].items() if n in wanted or n.startswith(TEACHER_PREFIX)}
            for seed in self.args.seeds
        }
        evaluation: dict[str, Any] = {}
        if self.args.test_labels:
            evaluation = evaluate_run(
                predictions,
                groups=self._groups(),
                subgroups=self._subgroups(),
                costs=self._costs(),
                class_names=self.class_names,
            )
        if self.args.check_models:
            evaluation["forecast"] = self._forecast({seed: everything[seed] for seed in self.args.seeds})
        write_atomically(self.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        weak_reports = [
            {"seed": seed} | json.loads((self._label_folder(seed) / "report.json").read_text(encoding="utf-8"))
            for seed in self.args.seeds
        ]
        return write_label_report(self.folder, evaluation, self.settings()["settings.json"][0], weak_reports)

    def _forecast(self, predictions: dict[int, dict[str, Predictions]]) -> dict[str, dict[str, Any]]:
        """What each strong model gained, by how far the models that check agree with it and with its teacher."""
        ids = next(iter(predictions.values()))[WEAK].ids
        names = {name: f"{CHECK}{folder_name(name)}" for name in self.args.check_models}
        said = {
            name: [own[name].in_order(ids).predicted for own in predictions.values()]
            for name in (WEAK, *self.args.variants, *names.values())
        }
        checkers = {name: said[own] for name, own in names.items()}
        groups = self._groups()
        own_groups = None if groups is None else [groups[row_id] for row_id in ids]
        return {name: forecast(said[WEAK], said[name], checkers, groups=own_groups) for name in self.args.variants}

    # What the stages share

    def learner(self, name: str, *, weak: bool = False) -> Learner:
        """A model by name, made once; weak ones may have a learning rate and epochs of their own."""
        if (name, weak) not in self._learners:
            self._learners[name, weak] = self._make_learner(name, weak)
        return self._learners[name, weak]

    def _make_learner(self, name: str, weak: bool) -> Learner:
        if name.startswith(SKLEARN):
            import_extra("sklearn")
            from .labels.sklearn_learner import SklearnLearner

            return SklearnLearner(name.removeprefix(SKLEARN))
        config, store = copy.copy(self.config), None
        config.loss_type, config.weight_by_confidence = "soft_ce", False  # a variant sets its own
        if weak and self.args.weak_learning_rate is not None:
            config.learning_rate = self.args.weak_learning_rate
        if weak and self.args.weak_num_train_epochs is not None:
            config.num_train_epochs = self.args.weak_num_train_epochs
        model_args = self.model_args
        if name != model_args.model_name_or_path:
            model_args = replace(model_args, model_revision="main")  # a revision is that of the strong model
        if getattr(config, "linear_probe", False):
            depends_on = f"{config.max_length}-{model_args.dtype}-{model_args.model_revision}"
            store = FeatureStore(self.folder / "features" / f"{folder_name(f'{name}-{depends_on}')}.npz")
        return TransformerLearner(name, config, model_args, self.class_names, store)

    def make_labels(
        self, labelled, target, seed: int, folder: Path, eval_sets: dict[str, Any], output: Path | None = None
    ) -> list[StageLabels]:
        """Train the weak models, and those between, on rows with true labels, and let them label the target rows."""
        stages = [self.args.weak_models, *([name] for name in self.args.bootstrap_models)]
        results = bootstrap_chain(
            [[self.learner(name, weak=True) for name in names] for names in stages],
            labelled,
            target,
            num_classes=len(self.class_names),
            seed=seed,
            folder=folder,
            ensemble=self.args.ensemble,
            calibrate=self.args.calibrate,
            calibration_share=self.args.calibration_share,
            eval_sets=eval_sets,
            output=output,
        )
        for learner in self._learners.values():
            if isinstance(learner, TransformerLearner):
                learner.release()
        summary = "\n".join(result.report.summary for result in results)
        print(summary)
        own = {"summary": summary} | asdict(results[-1].report)
        write_atomically(folder / "report.json", json.dumps(own, indent=2) + "\n")
        return results

    def weak_labels(self, seed: int) -> tuple[Rows, np.ndarray]:
        """The rows the weak models labelled, with their true labels, and the soft labels `(N, K)` they gave."""
        path = self._label_folder(seed) / f"stage_{len(self.args.bootstrap_models)}" / "weak_labels.jsonl"
        given = read_jsonl(path, required=("id", "soft_labels"))
        rows = {row.id: row for row in (self.unlabelled_rows() if self.args.check_models else self.examples())}
        return [rows[row["id"]] for row in given], np.array([row["soft_labels"] for row in given])

    def examples(self) -> Rows:
        """Examples with true labels, of which the weak models see one half."""
        if "examples" not in self._rows:
            own = self.args
            self._rows["examples"] = self._load(own.examples, own.examples_split, own.examples_where, own.num_examples)
        return self._rows["examples"]

    def test_examples(self) -> Rows:
        """Held-out examples, without those that are among `examples` too."""
        if "test" in self._rows:
            return self._rows["test"]
        own = self.args
        examples = self.examples() if own.examples else []
        known = {_content(row) for row in examples}
        rows = self._load(
            own.test_examples, own.test_split, own.test_where, own.num_test_examples, labelled=own.test_labels
        )
        new = [row for row in rows if _content(row) not in known]
        if not new:
            remedy = "use `examples_where` and `test_where`, or other files"
            raise ValueError(f"all {len(rows)} test examples are among `examples` too: {remedy}.")
        if len(new) < len(rows):
            logger.warning("%d of %d test examples are among `examples` and left out", len(rows) - len(new), len(rows))
        if shared := {row.group for row in examples} & {row.group for row in new} - {None}:
            logger.warning("%d groups (%s, ...) have rows in `examples` and in the test", len(shared), min(shared))
        self._rows["test"] = new
        return new

    def unlabelled_rows(self) -> Rows:
        """Rows to label; their true labels, if they have any, are not looked at."""
        if self.args.examples:
            self.examples()  # which say what the classes are called
        return self._load(self.args.unlabelled, self.args.examples_split, labelled=False)

    @property
    def class_names(self) -> list[str]:
        """What the classes are called; of pairs the two columns."""
        if self._class_names is None:
            self.examples()
        return self._class_names

    def _load(
        self,
        source: str,
        split: str,
        where: str | None = None,
        limit: int | None = None,
        *,
        labelled: bool = True,
        groups: str | None = None,
    ) -> Rows:
        own = self.args
        options: dict[str, Any] = {"split": split, "limit": limit, "where": filter_of(where, "where")}
        options |= {"group_column": groups or own.group_column}
        if self.is_pairs:
            pairs, names = load_pairs(source, **options), ["chosen", "rejected"]
            rows: Rows = pairs if labelled else [replace(pair, label=None) for pair in pairs]
        else:
            options |= {"text_template": own.text_template, "text_column": own.text_column}
            options |= {"label_column": own.label_column if labelled else None}
            rows, names = load_examples(source, class_names=self._class_names or self.config.class_names, **options)
        self._class_names = self._class_names or names
        unknown = [row.id for row in rows if row.label is None]
        if unknown and labelled:
            raise ValueError(f"{source}: row {unknown[0]} has no label; true labels are needed here.")
        return rows

    def _predictions(self, seed: int | str, model: str) -> Path:
        return self.folder / "predictions" / f"seed_{seed}" / f"{model}.jsonl"

    def _label_folder(self, seed: int) -> Path:
        return self.folder / f"seed_{seed}" / "labels"

    def _groups(self) -> dict[str, str | None] | None:
        """Group of each test row, where rows have some."""
        if not self.args.group_column:
            return None
        if not self.args.test_examples:
            raise ValueError("`group_column` needs `test_examples`, which says what group each prediction belongs to.")
        return {row.id: row.group for row in self.test_examples()}

    def _subgroups(self) -> dict[str, str | None] | None:
        """What scores of test rows are broken down by: a column of its own, or that of groups if they are few."""
        own = self.args
        if own.subgroup_column is None:
            groups = self._groups()
            return groups if groups and 1 < len(set(groups.values()) - {None}) <= MOST_SUBGROUPS else None
        rows = self._load(
            own.test_examples, own.test_split, own.test_where, own.num_test_examples, groups=own.subgroup_column
        )
        return {row.id: row.group for row in rows}

    def _costs(self) -> dict[str, dict[str, Any]]:
        """What training each strong model took: a value for each seed."""
        costs = {}
        for variant in self.trained:
            paths = [self.folder / f"seed_{seed}" / variant / "cost.json" for seed in self.args.seeds]
            own = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            costs[variant] = {name: [cost[name] for cost in own] for name in own[0]}
        return costs


def _content(row: Example | Pair) -> str | frozenset[str]:
    """What two rows have in common if they are the same; a pair is so in either order."""
    return row.text if isinstance(row, Example) else frozenset((row.chosen, row.rejected))


def _check_savable(model_args: ModelConfig) -> None:
    name = model_args.model_name_or_path
    if model_args.use_peft and split_layers(name)[1] is not None:
        raise ValueError(f"{name} with `use_peft`: a saved adapter does not know that its base was cut: choose one.")


# The parts on their own


def label(run: WeakToStrongRun) -> str:
    """Let weak models label rows of `unlabelled`, or the half of the examples they were not trained on; and predict
    test examples, where given, into `weak_predictions.jsonl`, which `evaluate` takes. Returns where, for a person."""
    if not run.args.examples or not run.args.weak_models:
        raise ValueError("`label` needs `examples` with true labels, and `weak_models`.")
    if run.args.unlabelled:
        labelled = run.examples()  # which say what the classes are called
        target = run.unlabelled_rows()
    else:
        labelled, target = split_halves(run.examples(), share=run.args.weak_share, seed=run.config.seed)
    eval_sets = {"test": run.test_examples()} if run.args.test_examples else {}
    output = run.folder / "weak_labels.jsonl"
    with folder_lock(run.folder):
        run.claim()
        last = run.make_labels(labelled, target, run.config.seed, run.folder / "labels", eval_sets, output)[-1]
        for name, rows in eval_sets.items():
            write_jsonl(run.folder / "weak_predictions.jsonl", prediction_rows(rows, last.soft[name]))
    return f"rows with weak labels: {output}"


def train(run: WeakToStrongRun) -> Path:
    """Train the strong model on rows with weak labels, from its last checkpoint; returns where the model is."""
    target = run.folder / "model"
    config = copy.copy(run.config)
    config.output_dir = str(run.folder / "train")
    _check_savable(run.model_args)
    path, layers = split_layers(run.model_args.model_name_or_path)
    dataset = training_set(run.args.dataset_name, run.args.dataset_train_split, is_pairs=run.is_pairs)
    claim_training(run)
    # An adapter made for language modelling, which is TRL's default, would leave the head untrained
    model_args = replace(run.model_args, model_name_or_path=resolve_model_name(path), lora_task_type="SEQ_CLS")
    if layers is not None:
        config.model_init_kwargs = (config.model_init_kwargs or {}) | {"num_hidden_layers": layers}
    trainer_class = WeakToStrongRewardTrainer if run.is_pairs else WeakToStrongTrainer
    fit(trainer_class, model_args, config, dataset, None, target)
    return target


def claim_training(run: Any, more: dict[str, Any] | None = None) -> None:
    """Write what `train` of a run trains with, or refuse to go on with other settings or rows."""
    if run.config.process_index:
        return
    settings = {"task": run.args.task} | training_settings(run.config) | asdict(run.model_args) | (more or {})
    settings |= source_settings(run.args.dataset_name, run.args.dataset_train_split)
    target = run.folder / "model"
    started = target.exists() or any(last_checkpoint(str(folder)) for folder in run.folder.glob("train*"))
    check_resume(run.folder / "training_settings.json", settings, made=str(target), started=started)


def evaluate(run: WeakToStrongRun) -> str:
    """Ask a trained model about test examples, and compare it with the weak one and the ceiling where those are given.
    Returns what came out, for a person."""
    if not run.args.predictions:
        run.args.predictions = str(run.folder / "predictions.jsonl")
        write_jsonl(run.args.predictions, _ask(run))
    paths = {STRONG: run.args.predictions, WEAK: run.args.weak_predictions, CEILING: run.args.ceiling_predictions}
    models = {name: Predictions.load(path) for name, path in paths.items() if path}
    checked = _checked(run, models)
    evaluation: dict[str, Any]
    if not models[STRONG].labelled:
        evaluation = {"scores": {STRONG: {}}}
    elif WEAK in models:
        evaluation = evaluate_run({run.config.seed: models}, groups=run._groups())
    else:
        evaluation = {"scores": {STRONG: {name: {"value": value} for name, value in scores(models[STRONG]).items()}}}
    if checked:
        evaluation["forecast"] = {STRONG: checked}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    own = ", ".join(f"{name} {value['value']:.3f}" for name, value in evaluation["scores"][STRONG].items())
    texts = [f"{run.folder / 'evaluation.json'}: {own or 'no true labels, no scores'}."]
    texts += [recovered(evaluation["pgr"]["accuracy"][STRONG])] if "pgr" in evaluation else []
    return " ".join([*texts, forecast_text(checked)] if checked else texts)


def _checked(run: WeakToStrongRun, models: dict[str, Predictions]) -> dict[str, Any] | None:
    """The forecast by `check_predictions`, where there are any."""
    paths = run.args.check_predictions
    if not paths:
        if not models[STRONG].labelled:
            raise ValueError("the test rows have no true labels: name `weak_predictions` and `check_predictions`.")
        return None
    if WEAK not in models:
        raise ValueError("`check_predictions` needs `weak_predictions`, those of the teacher.")
    everything = models | {path: Predictions.load(path) for path in paths}
    ids = models[STRONG].ids
    for name, own in everything.items():
        if odd := set(own.ids) ^ set(ids):
            raise ValueError(f"{name}: only it or the predictions have row {min(odd)!r}; let all predict one file")
    said = {name: [own.in_order(ids).predicted] for name, own in everything.items()}
    return forecast(said[WEAK], said[STRONG], {path: said[path] for path in paths})


def _ask(run: WeakToStrongRun) -> list[dict]:
    """Prediction rows of a trained model; of a classifier the labels are read with the class names it knows."""
    config, model_args = run.config, run.model_args
    if not model_args.model_name_or_path or not run.args.test_examples:
        raise ValueError("`evaluate` needs `model_name_or_path` and `test_examples`, or `predictions`.")
    name = resolve_model_name(model_args.model_name_or_path)
    if not run.is_pairs and (names := saved_class_names(name, model_args, config.trust_remote_code)):
        if config.class_names not in (None, names):
            raise ValueError(f"{name} has the classes {names}, not {config.class_names}: leave `class_names` out.")
        config.class_names = names
    rows = run.test_examples()
    return prediction_rows(rows, predict_saved(name, rows, len(run.class_names), config, model_args))
