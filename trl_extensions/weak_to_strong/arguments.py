"""Settings of the weak-to-strong commands beside those of the trainer, the model and the engine."""

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from ..core.inputs import PromptArguments
from ..core.options import option, renamed
from .trainers.configs import LOSSES


@renamed(form="task", middle_models="bootstrap_models")
@dataclass
class WeakToStrongArguments:
    """Examples, weak models and what is compared. One YAML serves every `trl-ext w2s` command.

    Raises:
        ValueError: A value outside its range, naming the field.
    """

    task: Literal["classification", "reward", "generation"] = option(
        "classification", "What is labelled: texts by class, pairs by which is better, or prompts by answers."
    )
    dataset_name: str | None = option(None, "train: rows with weak labels, a file of `label` or a data set.")
    dataset_train_split: str = option("train", "train: split of `dataset_name`.")
    examples: str | None = option(
        None, "Examples with true labels: a .jsonl, .json, .csv, .tsv or .parquet file, or a data set on the hub."
    )
    examples_split: str = option("train", "Split of a data set on the hub.")
    examples_where: str | None = option(None, "Take only rows with this value in a column, as `split=train`.")
    num_examples: int | None = option(None, "Use at most this many examples, drawn once.")
    unlabelled: str | None = option(
        None, "label, or run with `check_models`: rows to label, if not the other half of `examples`."
    )
    test_examples: str | None = option(None, "Held-out examples with true labels.")
    test_labels: bool = option(True, "Whether they have any; without, `run` with `check_models` only forecasts.")
    test_split: str = option("test", "Split of a data set on the hub.")
    test_where: str | None = option(None, "As `examples_where`, for `test_examples`.")
    num_test_examples: int | None = option(None, "Use at most this many of them.")
    text_column: str | None = option(None, "classification: column of the text; guessed.")
    text_template: str | None = option(None, "classification: text made of columns, as `{question}\\n{text}`.")
    label_column: str = option("label", "classification: column of the true label.")
    group_column: str | None = option(None, "Rows with the same value (a question, a document) stay on one side.")
    subgroup_column: str | None = option(None, "Column of the test rows that scores are broken down by; few values.")
    weak_models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Weak models: ids or paths, `NAME[:4]` for the first 4 layers, or sklearn:tfidf-logreg, "
            "sklearn:naive-bayes, sklearn:char-logreg."
        },
    )
    bootstrap_models: list[str] = field(
        default_factory=list, metadata={"help": "Models between weak and strong; each learns from the one before it."}
    )
    check_models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "run: train on weak labels of `unlabelled` and forecast what was gained, without a ceiling, by "
            "these models: two or more, of other kinds than `weak_models`, which learn from the rest of `examples`."
        },
    )
    weak_share: float = option(0.5, "Share of the examples the weak models learn from.")
    ensemble: Literal["soft", "hard", "accuracy"] = option(
        "soft", "How several weak models vote: mean, majority, or weighted by accuracy."
    )
    calibrate: bool = option(True, "Calibrate weak labels by temperature on held-back rows.")
    calibration_share: float = option(0.2, "Share of the weak half held back for that.")
    keep_share: float = option(0.5, "Of a variant ending in `+kept`: share of rows kept, the most confident ones.")
    weak_learning_rate: float | None = option(None, "Learning rate of the weak models, if not `learning_rate`.")
    weak_num_train_epochs: float | None = option(None, "Epochs of the weak models, if not `num_train_epochs`.")
    variants: list[str] = field(
        default_factory=lambda: list(LOSSES),
        metadata={
            "help": "run: the strong models to compare, a loss each: soft_ce, confidence, product, reverse_kl; "
            "`+weights` weighs rows by confidence, `+kept` keeps the confident ones."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "run: repeat all of it with these."})
    save_models: bool = option(False, "run: keep the strong models, not only what they say.")
    predictions: str | None = option(
        None, "evaluate: predictions of the strong model; made from the model if left out."
    )
    weak_predictions: str | None = option(None, "evaluate: those of the weak one, for PGR.")
    check_predictions: list[str] = field(
        default_factory=list,
        metadata={"help": "evaluate: those of models or annotators that check, for a forecast without true labels."},
    )
    ceiling_predictions: str | None = option(
        None, "evaluate: those of the strong model trained on true labels, for PGR."
    )

    def __post_init__(self):
        choices = {"task": ("classification", "reward", "generation"), "ensemble": ("soft", "hard", "accuracy")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name in ("weak_share", "calibration_share", "keep_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        for name in ("num_examples", "num_test_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ValueError(f"`{name}` must be at least 2, got {getattr(self, name)}.")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"`seeds` must be one or more different numbers, got {self.seeds}.")
        if repeated := {name for name in self.weak_models if self.weak_models.count(name) > 1}:
            raise ValueError(f"`weak_models` names {min(repeated)!r} twice: an ensemble needs different models.")
        for variant in self.variants:
            parse_variant(variant)
        for name in ("examples_where", "test_where"):
            filter_of(getattr(self, name), name)


@dataclass
class GenerationArguments(PromptArguments):
    """Weak models answer `prompts`, the strong model learns their answers (all, or those that a scorer chooses), and
    one or two scorers measure on held-out prompts what came of it.

    Raises:
        ValueError: A value outside its range, naming the field.
    """

    scorer: str = option(
        "profanity",
        "What measures answers (and chooses, by `threshold`, `best_of` or `budget`): profanity, or YAML such as "
        "{kind: classifier, model: ..., label: toxic}; kinds: profanity, classifier, judge, evaluate, phrases.",
    )
    confirm_scorer: str | None = option(
        None, "A second scorer, as `scorer`, that only measures: what is chosen by one scorer flatters it."
    )
    writer_dataset_name: str | None = option(
        None, "Clean answers (`prompt`, `completion`) that the weak models are fine-tuned on before they write."
    )
    threshold: float | None = option(None, "Keep answers with a score at least this good; which way is the scorer's.")
    best_of: int | None = option(None, "Keep only so many answers a prompt, the best.")
    budget: int | None = option(None, "Keep only so many answers in all, the best.")
    min_tokens: int = option(0, "Drop answers of fewer tokens.")
    keep_truncated: bool = option(False, "Keep answers cut off by `max_new_tokens`, as continuations always are.")
    ceiling_dataset_name: str | None = option(
        None, "Trusted answers (`prompt`, `completion`) that the ceiling is trained on; none, no PGR."
    )


def parse_variant(variant: str) -> tuple[str, bool, bool]:
    """A variant's loss, whether rows are weighed by confidence, and whether only confident ones are kept."""
    loss, *suffixes = variant.split("+")
    if loss not in LOSSES or not set(suffixes) <= {"weights", "kept"}:
        known = f"{', '.join(LOSSES)}, with `+weights` or `+kept` behind it"
        raise ValueError(f"`variants`: {variant!r} is none; give one of {known}.")
    return loss, "weights" in suffixes, "kept" in suffixes


def filter_of(text: str | None, name: str) -> dict[str, str] | None:
    """`split=train` as `{"split": "train"}`."""
    if text is None:
        return None
    column, equals, value = text.partition("=")
    if not equals or not column.strip():
        raise ValueError(f"`{name}` must be a column, `=` and a value, as `split=train`; got {text!r}.")
    return {column.strip(): value.strip()}


def split_layers(name: str) -> tuple[str, int | None]:
    """A model's name and how many of its first layers are meant: `gpt2[:6]` is `("gpt2", 6)`, `gpt2` all of them."""
    match = re.fullmatch(r"(.+?)(?:\[:(\d+)\])?", name)
    if match is None or "[" in match[1] or match[2] == "0":
        raise ValueError(f"{name!r}: write NAME[:4] for the first 4 layers of a model.")
    return match[1], int(match[2]) if match[2] else None


def refuse_unused(arguments: Any, names: Iterable[str], because: str) -> None:
    """Refuse fields with another value than their default that would have no effect, `because` of what is said."""
    known = {f.name: f for f in fields(arguments)}
    defaults = {n: f.default if f.default_factory is MISSING else f.default_factory() for n, f in known.items()}
    given = [f"`{name}`" for name in names if getattr(arguments, name) != defaults[name]]
    if given:
        verb, them = ("has", "it") if len(given) == 1 else ("have", "them")
        raise ValueError(f"{', '.join(given)} {verb} no effect {because}: leave {them} out.")
