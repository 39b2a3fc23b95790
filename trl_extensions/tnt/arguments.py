"""Settings of the TNT commands beside those of the trainer, the model and the engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from ..core.generation import EngineArguments, create_engine
from ..core.prompt_arguments import PromptArguments, check_least
from .annotate.phrases import PhraseAnnotator, load_phrases
from .annotate.rows import Annotator
from .logs.candidate_file import load_candidates


@dataclass
class TNTArguments(PromptArguments):
    """Prompts, sampling and evaluation. One YAML serves every `trl-ext tnt` command.

    Raises:
        ValueError: A value outside its range, naming the field.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Outputs: for `annotate` those to mark, for `train` and `run` annotated ones; JSONL or data set."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a data set on the hub."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of `eval_dataset_name` on the hub."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "train: annotated held-out outputs, for `eval_strategy`."}
    )
    clean_ratio: float | None = field(
        default=None, metadata={"help": "Train on at most this many clean outputs per unwanted one; all if left out."}
    )
    logs: str | None = field(
        default=None, metadata={"help": "candidates, annotate: JSONL of deployed outputs with flags or complaints."}
    )
    original_model: str | None = field(
        default=None, metadata={"help": "evaluate: the model before the patch; the base of an adapter if left out."}
    )
    eval_batch_tokens: int = field(default=4096, metadata={"help": "Padded tokens per batch when scoring."})

    def __post_init__(self):
        super().__post_init__()
        check_least(self, eval_batch_tokens=1)
        if self.clean_ratio is not None and self.clean_ratio < 0:
            raise ValueError(f"`clean_ratio` must be at least 0, got {self.clean_ratio}.")


@dataclass
class AnnotatorArguments:
    """What is unwanted. Several annotators together mark what any of them marks.

    Raises:
        ValueError: A value outside its choices, or an option whose annotator is not switched on.
    """

    phrases: list[str] = field(default_factory=list, metadata={"help": "Unwanted words and phrases."})
    phrases_file: str | None = field(default=None, metadata={"help": "File of them: .txt, one a line, or .json."})
    patterns: list[str] = field(default_factory=list, metadata={"help": "Unwanted regular expressions."})
    candidates: str | None = field(
        default=None, metadata={"help": "Unwanted phrases from logs: what `candidates` wrote and a person edited."}
    )
    ignore_case: bool = field(default=True, metadata={"help": "Phrases and patterns: ignore case."})
    inflections: bool = field(default=False, metadata={"help": "Phrases: English endings of the last word too."})
    first_word: bool = field(
        default=False,
        metadata={"help": "Phrases: mark only the word each begins with, which removes as much and moves less."},
    )
    classifier: str | None = field(
        default=None, metadata={"help": "A sequence classifier whose label marks what is unwanted."}
    )
    classifier_label: str | None = field(default=None, metadata={"help": "That label."})
    profanity: bool = field(default=False, metadata={"help": "Mark profanity, by alt-profanity-check."})
    threshold: float = field(default=0.5, metadata={"help": "Classifier and profanity: mark above this probability."})
    unit: Literal["sentence", "window"] = field(
        default="sentence", metadata={"help": "Classifier and profanity: what is scored at once."}
    )
    judge_task: str | None = field(
        default=None, metadata={"help": "What a language model is to quote as unwanted, in words."}
    )
    judge_model: str | None = field(default=None, metadata={"help": "That language model."})
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Its OpenAI-compatible server; it runs in this process if left out."}
    )

    def __post_init__(self):
        for name in ("phrases", "patterns"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.unit not in ("sentence", "window"):
            raise ValueError(f"`unit` must be sentence or window, got {self.unit!r}.")
        if self.classifier_label and not self.classifier:
            raise ValueError("`classifier_label` needs `classifier`.")
        if bool(self.judge_task) != bool(self.judge_model):
            raise ValueError("a judge needs both `judge_task` and `judge_model`.")
        if self.judge_base_url and not self.judge_task:
            raise ValueError("`judge_base_url` needs `judge_task` and `judge_model`.")

    def check(self) -> None:
        """Raise a one-line `ValueError` where nothing is said to be unwanted."""
        names = ("phrases", "phrases_file", "patterns", "candidates", "classifier", "profanity", "judge_task")
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"nothing says what is unwanted: give one of {', '.join(f'`{name}`' for name in names)}.")

    def build(self, *, with_candidates: bool = True) -> list[Annotator]:
        """The annotators; loads models.

        Args:
            with_candidates: Whether to look for the kept `candidates` too; if not, nothing else need be asked for.

        Raises:
            ValueError: None is asked for, or what one of them refuses.
            ImportError: An optional package is missing.
        """
        if with_candidates:
            self.check()
        annotators: list[Annotator] = []
        if self.phrases or self.phrases_file or self.patterns:
            phrases = [*self.phrases, *(load_phrases(self.phrases_file) if self.phrases_file else [])]
            annotators.append(
                PhraseAnnotator(
                    phrases,
                    self.patterns,
                    ignore_case=self.ignore_case,
                    inflections=self.inflections,
                    first_word=self.first_word,
                )
            )
        if with_candidates and self.candidates:
            annotators.append(PhraseAnnotator(self._kept_candidates(), first_word=self.first_word, name="candidates"))
        if self.classifier:
            from .annotate.classifiers import ClassifierAnnotator

            annotators.append(ClassifierAnnotator(self.classifier, self.classifier_label, self.threshold, self.unit))
        if self.profanity:
            from .annotate.classifiers import ProfanityAnnotator

            annotators.append(ProfanityAnnotator(self.threshold, self.unit))
        if self.judge_task:
            from .annotate.judge import JudgeAnnotator

            annotators.append(JudgeAnnotator(self._judge(), self.judge_task))
        return annotators

    def _kept_candidates(self) -> list[str]:
        kept = [form for entry in load_candidates(self.candidates) if entry.keep for form in entry.forms]
        if not kept:
            raise ValueError(f"{self.candidates}: no candidate is kept; set `keep: true` on what is unwanted")
        return kept

    def _judge(self):
        engine = "endpoint" if self.judge_base_url else "transformers"
        return create_engine(
            EngineArguments(engine=engine, engine_model=self.judge_model, engine_base_url=self.judge_base_url)
        )

    def settings(self) -> dict:
        """JSON-ready values that say what is unwanted, for a run that is resumed; the phrases of a file included."""
        values = {name: value for name, value in vars(self).items() if name not in ("judge_base_url",)}
        if self.phrases_file and os.path.isfile(self.phrases_file):
            values["phrases_file"] = load_phrases(self.phrases_file)
        if self.candidates and os.path.isfile(self.candidates):
            values["candidates"] = self._kept_candidates()
        return values
