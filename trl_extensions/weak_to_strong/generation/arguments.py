"""Settings of the generation form: prompts, what scores answers, and which of them the strong model learns from."""

from dataclasses import dataclass, field

from ...core.inputs import PromptArguments


@dataclass
class GenerationArguments(PromptArguments):
    """Weak models answer `prompts`, a scorer chooses among the answers, the strong model learns the chosen ones.

    Raises:
        ValueError: A value outside its range, naming the field.
    """

    scorer: str = field(
        default="profanity",
        metadata={
            "help": "What scores answers: profanity, or YAML such as {kind: classifier, model: ..., label: toxic}; "
            "kinds: profanity, classifier, judge, evaluate, phrases."
        },
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Keep answers with a score at least this good; which way is the scorer's."}
    )
    best_of: int | None = field(default=None, metadata={"help": "Keep only so many answers a prompt, the best."})
    budget: int | None = field(default=None, metadata={"help": "Keep only so many answers in all, the best."})
    min_tokens: int = field(default=0, metadata={"help": "Drop answers of fewer tokens."})
    keep_truncated: bool = field(
        default=False, metadata={"help": "Keep answers cut off by `max_new_tokens`, as continuations always are."}
    )
    ceiling_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Trusted answers (`prompt`, `completion`) that the ceiling is trained on; none, no PGR."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.threshold is None and self.best_of is None and self.budget is None:
            self.best_of = 1
