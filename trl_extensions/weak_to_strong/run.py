"""From weak labels to a strong model and what it recovered, for classification and for preferences.

For every seed: split the examples in two halves, train the weak models on the true labels of one, let them label the
other, train the strong model on those labels (once per variant) and on the true ones (the ceiling), and ask all of
them about the same held-out examples (arXiv 2312.09390, section 3). Every stage leaves a file when it is done and is
skipped when that file is there, so the same command resumes a run that was killed anywhere:

    output_dir/settings.json, report.md, report.json, evaluation.json, figures
    output_dir/features/       states of texts under frozen models, with `linear_probe`
    output_dir/seed_0/         labels/ of the weak models, and a folder for the training of each strong one
    output_dir/predictions/    seed_0/weak.jsonl, ceiling.jsonl, soft_ce.jsonl, ...: what each said of the test rows
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from trl import ModelConfig

from ..core.runs.jsonl import read_jsonl, write_jsonl
from ..core.runs.report import write_atomically
from ..core.runs.run import MUTABLE_ON_RESUME, Stage, check_resume, run_stages, training_settings
from .arguments import WeakToStrongArguments, filter_of, parse_variant, split_layers
from .data.examples import Example, Pair, load_examples, load_pairs, split_halves
from .data.select import keep_confident
from .evaluation import CEILING, TEACHER_PREFIX, WEAK, evaluate_run, load_run
from .labels.labelling import bootstrap_chain
from .labels.learners import Learner, fingerprint, folder_name, prediction_rows
from .labels.sklearn_learner import SklearnLearner
from .labels.transformer_learner import TransformerLearner
from .trainers.configs import WeakToStrongConfig
from .trainers.feature_store import FeatureStore
from .trainers.reward_config import WeakToStrongRewardConfig
from .unused_fields import refuse_unused


logger = logging.getLogger(__name__)

_MUTABLE_ON_RESUME = MUTABLE_ON_RESUME | {
    "seed", "seeds", "variants", "save_models",
    "dataset_name", "dataset_train_split", "unlabelled", "predictions", "weak_predictions", "ceiling_predictions",
}  # fmt: skip

SKLEARN = "sklearn:"


@dataclass
class WeakToStrongRun:
    """One run: its settings, its folder, and a method for each stage.

    Args:
        args: Examples, weak models and what is compared.
        config: How models are trained; `output_dir` is the run's folder.
        model_args: The strong model, LoRA and quantisation.
    """

    args: WeakToStrongArguments
    config: WeakToStrongConfig | WeakToStrongRewardConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        self._loaded: dict[str, list[Example] | list[Pair]] = {}
        self._class_names: list[str] | None = None
        self._learners: dict[tuple[str, bool], Learner] = {}

    @property
    def is_pairs(self) -> bool:
        return self.args.form == "reward"

    def claim(self) -> None:
        """Write the run's settings, or refuse to resume a run that was started with others."""
        in_use = (self.folder / "labels").exists() or any(self.folder.glob("seed_*"))
        check_resume(self.folder / "settings.json", self._settings(), made=str(self.folder), started=in_use)

    def _settings(self) -> dict[str, Any]:
        settings = training_settings(self.config, _MUTABLE_ON_RESUME)
        settings |= {name: value for name, value in asdict(self.args).items() if name not in _MUTABLE_ON_RESUME}
        sources = {"examples": self.examples, "test_examples": self.test_examples}
        contents = {
            f"{name}_in_file": fingerprint(rows()) for name, rows in sources.items() if getattr(self.args, name)
        }
        return settings | asdict(self.model_args) | contents

    def stages(self) -> Iterator[Stage]:
        """Every stage in order: its method's name, its seed and variant, and the file that says it is done."""
        for seed in self.args.seeds:
            said = self.folder / "predictions" / f"seed_{seed}"
            yield Stage("label", f"{seed}", said / f"{WEAK}.jsonl", f"seed {seed}: weak labels")
            for variant in (CEILING, *self.args.variants):
                label = f"seed {seed}: strong model, {'true labels' if variant == CEILING else variant}"
                yield Stage("train", f"{seed}/{variant}", said / f"{variant}.jsonl", label)

    def execute(self, perform: Callable[[str, str], Any] | None = None) -> Path:
        """Carry out what is not done yet and write the report.

        Args:
            perform: Carries out one stage given its method's name and what it is of; in this process if left out.

        Returns:
            The path of `report.md`.
        """
        self.check_inputs()
        self.claim()
        run_stages(self.stages(), perform or self.perform)
        return self.evaluate()

    def perform(self, name: str, of: str) -> None:
        """Carry out one stage in this process."""
        getattr(self, name)(of)

    # The stages

    def label(self, of: str) -> None:
        """Train the weak models on one half of the examples and let them label the other, and the test rows."""
        seed = int(of)
        labelled, target = split_halves(self.examples(), share=self.args.weak_share, seed=seed)
        self.label_with(labelled, target, seed, self.label_folder(seed), {"test": self.test_examples()})
        last = self.label_folder(seed) / f"stage_{len(self.args.middle_models)}"
        said = self.folder / "predictions" / f"seed_{seed}"
        teachers = sorted((last / "learners").glob("*/test.jsonl"))
        for path in teachers if len(teachers) > 1 else []:
            write_jsonl(said / f"{TEACHER_PREFIX}{path.parent.name}.jsonl", read_jsonl(path))
        for number in range(len(self.args.middle_models)):  # the student's teacher is the last of the chain
            earlier = read_jsonl(self.label_folder(seed) / f"stage_{number}" / "test.jsonl")
            write_jsonl(said / f"{TEACHER_PREFIX}stage-{number}.jsonl", earlier)
        write_jsonl(said / f"{WEAK}.jsonl", read_jsonl(last / "test.jsonl"))

    def train(self, of: str) -> None:
        """Train the strong model on the weak labels, or the true ones, and ask it about the test rows."""
        seed, _, variant = of.partition("/")
        rows, soft_labels = self.weak_labels(int(seed))
        if variant == CEILING:
            settings = {"weak_loss": "soft_ce", "weight_by_confidence": False}
            soft_labels = np.eye(len(self.class_names))[[row.label for row in rows]]
        else:
            loss, weigh, keep = parse_variant(variant)
            settings = {"weak_loss": loss, "weight_by_confidence": weigh}
            if keep:
                kept, summary = keep_confident(
                    soft_labels, self.args.keep_share, class_names=self.class_names, seed=int(seed)
                )
                print(summary)
                rows, soft_labels = [rows[place] for place in kept], soft_labels[kept]
        learner = self.learner(self.model_args.model_name_or_path)
        folder = self.folder / f"seed_{seed}" / variant
        learner.fit(rows, soft_labels, None, seed=int(seed), folder=folder / "train", **settings)
        if self.args.save_models:
            learner.save(folder / "model")
        probs = learner.predict(self.test_examples())
        if learner.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "cost.json", json.dumps(learner.cost) + "\n")
            said = self.folder / "predictions" / f"seed_{seed}" / f"{variant}.jsonl"
            write_jsonl(said, prediction_rows(self.test_examples(), probs))

    def evaluate(self) -> Path:
        """Compare all models over the seeds and write the report."""
        from .report import write_label_report

        wanted = [WEAK, CEILING, *self.args.variants]
        everything = load_run(self.folder / "predictions")
        predictions = {
            seed: {
                name: own
                for name, own in everything[seed].items()
                if name in wanted or name.startswith(TEACHER_PREFIX)
            }
            for seed in self.args.seeds
        }
        groups = {row.id: row.group for row in self.test_examples()}
        evaluation = evaluate_run(predictions, groups=groups if self.args.group_column else None, costs=self._costs())
        write_atomically(self.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        weak_reports = [
            {"seed": seed} | json.loads((self.label_folder(seed) / "report.json").read_text(encoding="utf-8"))
            for seed in self.args.seeds
        ]
        return write_label_report(self.folder, evaluation, self._settings(), weak_reports)

    # What the stages share

    def learner(self, name: str, *, weak: bool = False) -> Learner:
        """A model by name, made once; weak ones may have a learning rate and epochs of their own."""
        if (name, weak) not in self._learners:
            self._learners[name, weak] = self._make_learner(name, weak)
        return self._learners[name, weak]

    def _make_learner(self, name: str, weak: bool) -> Learner:
        if name.startswith(SKLEARN):
            return SklearnLearner(name.removeprefix(SKLEARN))
        config, store = copy.copy(self.config), None
        config.weak_loss, config.weight_by_confidence = "soft_ce", False  # a variant sets its own
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

    def examples(self) -> list[Example] | list[Pair]:
        """Examples with true labels, of which the weak models see one half."""
        return self._load("examples", self.args.examples, self.args.examples_split, self.args.examples_where,
                          self.args.num_examples)  # fmt: skip

    def test_examples(self) -> list[Example] | list[Pair]:
        """Held-out examples."""
        if "test" in self._loaded:
            return self._loaded["test"]
        known = {_content(row) for row in self.examples()} if self.args.examples else set()
        rows = self._load("test", self.args.test_examples, self.args.test_split, self.args.test_where,
                          self.args.num_test_examples)  # fmt: skip
        new = [row for row in rows if _content(row) not in known]
        if not new:
            raise ValueError(
                f"all {len(rows)} test examples are among `examples` too: use `examples_where` and `test_where`, or "
                "other files."
            )
        if len(new) < len(rows):
            logger.warning("%d of %d test examples are among `examples` and left out", len(rows) - len(new), len(rows))
        shared = {row.group for row in self.examples()} & {row.group for row in new} - {None} if known else ()
        if shared:
            logger.warning("%d groups (%s, ...) have rows in `examples` and in the test", len(shared), min(shared))
        self._loaded["test"] = new
        return new

    @property
    def class_names(self) -> list[str]:
        """What the classes are called; of pairs the two columns."""
        if self._class_names is None:
            self.examples()
        return self._class_names

    def _load(self, part: str, source: str, split: str, where: str | None, limit: int | None):
        if part in self._loaded:
            return self._loaded[part]
        options = {"split": split, "group_column": self.args.group_column, "limit": limit, "seed": 0}
        options["where"] = filter_of(where, f"{part}_where")
        if self.is_pairs:
            self._loaded[part], names = load_pairs(source, **options), ["chosen", "rejected"]
        else:
            self._loaded[part], names = load_examples(
                source,
                text_template=self.args.text_template,
                text_column=self.args.text_column,
                label_column=self.args.label_column,
                class_names=self._class_names or self.config.class_names,
                **options,
            )
        self._class_names = self._class_names or names
        unknown = [row.id for row in self._loaded[part] if row.label is None]
        if unknown:
            raise ValueError(f"{source}: row {unknown[0]} has no label; true labels are needed here.")
        return self._loaded[part]

    def label_with(self, labelled, target, seed: int, folder: Path, extra: dict[str, Any] | None = None) -> Path:
        """Train the weak models, and those between, on rows with true labels; returns the file of labels."""
        stages = [self.args.weak_models, *([name] for name in self.args.middle_models)]
        reports = bootstrap_chain(
            [[self.learner(name, weak=True) for name in names] for names in stages],
            labelled,
            target,
            num_classes=len(self.class_names),
            seed=seed,
            folder=folder,
            ensemble=self.args.ensemble,
            calibrate=self.args.calibrate,
            calibration_share=self.args.calibration_share,
            extra=extra,
        )
        for learner in self._learners.values():
            if isinstance(learner, TransformerLearner):
                learner.release()
        for report in reports:
            print(report.summary)
        own = {"summary": "\n".join(report.summary for report in reports)} | asdict(reports[-1])
        write_atomically(folder / "report.json", json.dumps(own, indent=2) + "\n")
        return Path(reports[-1].path)

    def label_folder(self, seed: int) -> Path:
        return self.folder / f"seed_{seed}" / "labels"

    def weak_labels(self, seed: int) -> tuple[list[Example] | list[Pair], np.ndarray]:
        """The rows the weak models labelled, with their true labels, and the soft labels `(N, K)` they gave."""
        path = self.label_folder(seed) / f"stage_{len(self.args.middle_models)}" / "weak_labels.jsonl"
        given = read_jsonl(path, required=("id", "soft_labels"))
        rows = {row.id: row for row in self.examples()}
        return [rows[row["id"]] for row in given], np.array([row["soft_labels"] for row in given])

    def _costs(self) -> dict[str, dict[str, Any]]:
        """What training each strong model took: a value for each seed."""
        costs = {}
        for variant in (CEILING, *self.args.variants):
            paths = [self.folder / f"seed_{seed}" / variant / "cost.json" for seed in self.args.seeds]
            own = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            costs[variant] = {name: [cost[name] for cost in own] for name in own[0]}
        return costs

    def check_inputs(self) -> None:
        """Raise a one-line `ValueError` for what is missing before anything is loaded."""
        args = self.args
        for name in ("examples", "test_examples"):
            if not getattr(args, name):
                raise ValueError(f"`{name}` is missing: name a file or data set with true labels.")
        if not self.model_args.model_name_or_path or not args.weak_models:
            raise ValueError("`model_name_or_path` (the strong model) and `weak_models` are needed.")
        if not args.variants:
            raise ValueError("`variants` is empty: name at least one loss, such as soft_ce.")
        for name in (*args.weak_models, *args.middle_models):
            split_layers(name)
        if self.model_args.model_name_or_path.startswith(SKLEARN):
            raise ValueError("`model_name_or_path` must be a transformer: scikit-learn models are weak ones.")
        self._check_options()
        self.test_examples()

    def _check_options(self) -> None:
        """Refuse what would be ignored, or would not work."""
        if self.is_pairs:
            refuse_unused(self.args, ("text_column", "text_template", "label_column"), "with `form: reward`")
        _, layers = split_layers(self.model_args.model_name_or_path)
        if self.args.save_models and self.model_args.use_peft and layers is not None:
            raise ValueError(
                "`save_models` with `use_peft` and `[:N]`: a saved adapter does not know that its base was cut; leave "
                "one of them out."
            )
        if getattr(self.config, "linear_probe", False):
            if self.model_args.load_in_4bit or self.model_args.load_in_8bit:
                raise ValueError(
                    "`linear_probe` trains a head on states of a model that is not quantised: choose one."
                )
            refuse_unused(self.model_args, ("use_peft",), "with `linear_probe`, which trains the head only")
            refuse_unused(self.config, ("overlong",), "with `linear_probe`, which truncates")


def _content(row: Example | Pair) -> str | frozenset[str]:
    """What two rows have in common if they are the same; a pair is so in either order."""
    return row.text if isinstance(row, Example) else frozenset((row.chosen, row.rejected))
