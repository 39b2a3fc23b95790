"""Configuration of `TNTTrainer`, and the settings of the TNT commands beside it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trl import SFTConfig

from ..core.generation import create_engine, parse_engine
from ..core.inputs import PromptArguments
from ..core.options import check_least, message, option, renamed
from ..core.training.load import RunsHere, reject_sft_settings
from .loss import SMOOTH_OVER, VARIANTS, check_objective


if TYPE_CHECKING:
    from .annotate.rows import Annotator
    from .search import Target

DEFAULT_MARKED = 500


@dataclass
class TNTConfig(RunsHere, SFTConfig):
    """`SFTConfig` plus what targeted negative training (TNT, arXiv 2406.13660) adds.

    Args:
        variant (`str`, *optional*, defaults to `"ff"`):
            How the model is drawn to its target at unwanted and at kept tokens: `"ff"`, `"rr"`, `"rf"` (forward or
            reverse KL), `"fll"`, `"rll"` (log-likelihood of kept tokens), or the baselines `"ul"` (unlikelihood) and
            `"nl"` (negative likelihood). See `tnt.loss`.
        alpha (`float`, *optional*, defaults to `1.0`):
            Weight of unwanted tokens beside kept ones.
        smoothing (`float`, *optional*, defaults to `1e-6`):
            Probability a reverse KL's target gives to a banned token, so that it stays finite. Unused by `"ff"`,
            `"fll"`, `"ul"` and `"nl"`.
        smooth_over (`str`, *optional*, defaults to `"banned"`):
            `"banned"`: only the banned token gets that mass. `"vocabulary"`: every entry of a reverse KL's target
            does, kept positions included, as in the published code; moves much mass in a large vocabulary.
        share_prefix (`bool`, *optional*, defaults to `False`):
            Compute a prompt once for all rows of a batch that have it: the same loss for fewer tokens, where prompts
            are longer than their completions. Rows of one prompt are then drawn side by side. Models that cannot do
            this exactly (sliding windows, attention kernels without masks of their own, ...) go on as without it, and
            a log line says why.
        num_train_epochs (`float`, *optional*, defaults to `0.0`):
            0: as many as show the model about 300 outputs with something unwanted, but 1 at least and 16 at most.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switch dropout off, so that the model starts where its original is.
    """

    rates: ClassVar = {"adapter": 3e-4, "all": 5e-6}
    shown: ClassVar = (300, 1, 16)  # of outputs with something unwanted

    variant: str = option("ff", "How unwanted and kept tokens are drawn to their target.", *VARIANTS)
    alpha: float = option(1.0, "Weight of unwanted tokens beside kept ones.")
    smoothing: float = option(1e-6, "Probability a reverse KL's target gives a banned token.")
    smooth_over: str = option("banned", "What gets it: the banned token, or every entry.", *SMOOTH_OVER)
    share_prefix: bool = option(False, "Compute a prompt once for all its rows of a batch.")
    disable_dropout: bool = option(True, "Switch dropout off in the policy.")

    def __post_init__(self):
        super().__post_init__()
        check_objective(self.variant, self.alpha, self.smoothing, self.smooth_over)
        reject_sft_settings(self, "TNT", own_data=True)


@dataclass
class TNTArguments(PromptArguments):
    """Prompts, sampling and evaluation. One YAML serves every `trl-ext tnt` command."""

    dataset_name: str | None = option(None, "Outputs: `annotate`: those to mark; `train`, `run`: annotated ones.")
    dataset_train_split: str = option("train", "Split of a data set on the hub.")
    dataset_test_split: str = option("test", "Split of `eval_dataset_name` on the hub.")
    eval_dataset_name: str | None = option(None, "train: annotated held-out outputs, for `eval_strategy`.")
    target_reduction: float | None = option(None, "Share of unwanted outputs to take off, of 1: trains until it is.")
    min_preserved: float | None = option(None, "Least share of clean outputs to leave unchanged word for word, of 1.")
    max_kl: float | None = option(None, "Most nats per token from the original, on its clean outputs.")
    max_rounds: int = option(4, "Rounds of training towards these targets, at most.")
    scales: list[float] = field(
        default_factory=lambda: [0.5, 0.7, 0.85, 1.0, 1.25],
        metadata={"help": "Factors on a round's finished adapter that are tried on the validation prompts."},
    )
    validation_share: float = option(0.25, "Share of the training prompts held off for that, by a hash of each.")
    num_validation_prompts: int = option(400, "Use at most this many of them.")
    min_marked: int | None = option(
        None, "Sample prompts that showed the unwanted again until so many outputs did; 500 with a target, else 0."
    )
    max_more_samples: int = option(4000, "Outputs sampled for `min_marked`, at most.")
    clean_ratio: float | None = option(None, "Clean outputs to train on per unwanted one, at most; all if left out.")
    logs: str | None = option(None, "candidates, annotate: JSONL of deployed outputs with flags or complaints.")
    original_model: str | None = option(None, "evaluate: the model before the patch; an adapter's base if left out.")
    eval_batch_tokens: int = option(4096, "Padded tokens per batch when scoring.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, eval_batch_tokens=1, max_rounds=1, num_validation_prompts=2, max_more_samples=1)
        self.scales = [self.scales] if isinstance(self.scales, (int, float)) else list(self.scales)
        if not self.scales or not all(0 < scale <= 2 for scale in self.scales):
            raise ValueError(f"`scales` must be numbers above 0, at most 2, got {self.scales}.")
        for name, most in (("target_reduction", 1), ("min_preserved", 1), ("max_kl", 1e9), ("validation_share", 0.5)):
            if (value := getattr(self, name)) is not None and not 0 < value <= most:
                raise ValueError(f"`{name}` must be above 0 and at most {most:g}, got {value}.")
        if self.min_marked is not None:
            check_least(self, min_marked=0)
        if self.clean_ratio is not None and self.clean_ratio < 0:
            raise ValueError(f"`clean_ratio` must be at least 0, got {self.clean_ratio}.")

    def target(self) -> Target | None:
        """What a run trains to, if anything."""
        from .search import Target

        asked = (self.target_reduction, self.min_preserved, self.max_kl)
        return None if asked == (None, None, None) else Target(*asked)

    def least_marked(self) -> int:
        """`min_marked`, or what it is where nobody said."""
        return self.min_marked if self.min_marked is not None else DEFAULT_MARKED if self.target() else 0


@renamed(judge_model="judge")
@dataclass
class AnnotatorArguments:
    """What is unwanted. Several annotators together mark what any of them marks."""

    phrases: list[str] = field(default_factory=list, metadata={"help": "Unwanted words and phrases."})
    phrases_file: str | None = option(None, "File of them: .txt, one a line, or .json.")
    patterns: list[str] = field(default_factory=list, metadata={"help": "Unwanted regular expressions."})
    candidates: str | None = option(None, "Unwanted phrases from logs: what `candidates` wrote and a person edited.")
    ignore_case: bool = option(True, "Phrases and patterns: ignore case.")
    inflections: bool = option(False, "Phrases: English endings of the last word too.")
    first_word: bool = option(False, "Phrases: mark only the word each begins with, which moves less.")
    classifier: str | None = option(None, "A sequence classifier.")
    classifier_label: str | None = option(None, "Its label that means unwanted.")
    profanity: bool = option(False, "Mark profanity, by alt-profanity-check.")
    threshold: float = option(0.5, "Classifier and profanity: mark above this probability.")
    unit: Literal["sentence", "window"] = option("sentence", "Classifier and profanity: what is scored at once.")
    judge_task: str | None = option(None, "What a language model is to quote, in words.")
    judge: str | None = option(None, "Quotes it: a model to run here, or YAML as {model: ..., base_url: ...}.")
    judge_base_url: str | None = option(None, "Old, goes in the next version: a `base_url` in `judge`.")

    def __post_init__(self):
        for name in ("phrases", "patterns"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.unit not in ("sentence", "window"):
            raise ValueError(f"`unit` must be sentence or window, got {self.unit!r}.")
        if self.classifier_label and not self.classifier:
            raise ValueError("`classifier_label` needs `classifier`.")
        if bool(self.judge_task) != bool(self.judge):
            raise ValueError("a judge needs both `judge_task` and `judge`.")
        if self.judge_base_url:
            warnings.warn(message("judge_base_url", "base_url` in `judge"), FutureWarning, stacklevel=3)

    def check(self) -> None:
        """Raise a one-line `ValueError` where nothing is said to be unwanted."""
        names = ("phrases", "phrases_file", "patterns", "candidates", "classifier", "profanity", "judge_task")
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"nothing says what is unwanted: give one of {', '.join(f'`{name}`' for name in names)}.")

    def build(self, *, with_candidates: bool = True) -> list[Annotator]:
        """The annotators, loaded; without candidates there may be none."""
        if with_candidates:
            self.check()
        from .annotate.classifiers import ClassifierAnnotator, ProfanityAnnotator
        from .annotate.judge import JudgeAnnotator
        from .annotate.phrases import PhraseAnnotator, load_phrases

        annotators: list[Annotator] = []
        if self.phrases or self.phrases_file or self.patterns:
            phrases = [*self.phrases, *(load_phrases(self.phrases_file) if self.phrases_file else [])]
            options = {name: getattr(self, name) for name in ("ignore_case", "inflections", "first_word")}
            annotators.append(PhraseAnnotator(phrases, self.patterns, **options))
        if with_candidates and self.candidates:
            options = {"severities": self._candidates(), "labels": self._candidates("text")}
            forms = list(options["labels"])
            annotators.append(PhraseAnnotator(forms, first_word=self.first_word, name="candidates", **options))
        if self.classifier:
            annotators.append(ClassifierAnnotator(self.classifier, self.classifier_label, self.threshold, self.unit))
        if self.profanity:
            annotators.append(ProfanityAnnotator(self.threshold, self.unit))
        if self.judge_task and self.judge:
            judge = parse_engine(self.judge, "judge").arguments
            if self.judge_base_url:
                judge = replace(judge, engine="endpoint", engine_base_url=self.judge_base_url)
            annotators.append(JudgeAnnotator(create_engine(judge), self.judge_task))
        return annotators

    def _candidates(self, field: str = "severity") -> dict[str, Any]:
        """Every form of the selected candidates, and a field of its candidate."""
        from .logs import load_candidates

        entries = load_candidates(str(self.candidates))
        selected = {form: getattr(entry, field) for entry in entries if entry.selected for form in entry.forms}
        if not selected:
            raise ValueError(f"{self.candidates}: no candidate is selected; set `selected: true` on what is unwanted")
        return selected

    def settings(self) -> dict:
        """JSON-ready values that say what is unwanted, with the phrases of files, for a run that is resumed."""
        from .annotate.phrases import load_phrases

        values = {name: value for name, value in vars(self).items() if not name.startswith("judge_base")}
        engine = parse_engine(values.pop("judge"), "judge").arguments if self.judge else None
        values["judge_model"] = engine and engine.engine_model  # where it runs is no part of it
        if self.phrases_file and os.path.isfile(self.phrases_file):
            values["phrases_file"] = load_phrases(self.phrases_file)
        if self.candidates and os.path.isfile(self.candidates):
            values["candidates"] = self._candidates()
        return values
