"""Settings of the SAMI commands beside those of the trainer, the model and the engine."""

from dataclasses import dataclass, field

from ..core.generation.engine_spec import parse_engine
from ..core.judge.pairwise import MODES
from .filters import ResponseFilters
from .templates import check_template


@dataclass
class SAMIArguments:
    """Queries, principles, sampling and rounds. One YAML serves `sample`, `train`, `evaluate` and `run`.

    The defaults of the rounds are the published ones (arXiv 2404.14313, section 4): batches of 128 queries, one
    gradient step a batch, 2, 4 and 6 batches.

    Raises:
        ValueError: A value outside its range, naming the field.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "train: rows to train on, a JSONL of `sample` or a data set with SAMI columns."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "train: split of `dataset_name`."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "train: held-out rows, for `eval_strategy` and the guard."}
    )
    queries: str | None = field(
        default=None, metadata={"help": "Queries: a .jsonl, .json or .csv file, or a data set on the hub."}
    )
    query_column: str | None = field(default=None, metadata={"help": "Column of the queries; guessed if left out."})
    query_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression with one group that cuts the query out of the column."}
    )
    query_split: str = field(default="train", metadata={"help": "Split of a data set on the hub."})
    num_queries: int | None = field(default=None, metadata={"help": "Use at most this many queries."})
    principles: str | None = field(default=None, metadata={"help": "YAML file of principles."})
    num_constitutions: int = field(default=2, metadata={"help": "Constitutions per query (C)."})
    sampling_template: str | None = field(
        default=None,
        metadata={"help": "Prompt to sample training responses with; fields {query} and {constitution}."},
    )
    max_new_tokens: int = field(default=350, metadata={"help": "Longest response, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Strings that end a response."})
    keep_truncated: bool = field(
        default=False, metadata={"help": "Train on rows with a response that hit `max_new_tokens` before its end."}
    )
    max_response_tokens: int | None = field(
        default=None, metadata={"help": "Drop rows with a response longer than this."}
    )
    rounds: int = field(default=3, metadata={"help": "run: rounds of expert iteration."})
    queries_per_step: int = field(default=128, metadata={"help": "run: queries in one gradient step."})
    steps_first_round: int = field(default=2, metadata={"help": "run: gradient steps of the first round."})
    steps_growth: int = field(default=2, metadata={"help": "run: further steps each round has over the one before."})
    num_eval_queries: int = field(default=64, metadata={"help": "Queries held out for evaluation."})
    eval_batch_tokens: int = field(default=4096, metadata={"help": "Padded tokens per batch when scoring."})
    original_model: str | None = field(
        default=None, metadata={"help": "evaluate: the original of a fully fine-tuned model, for KL."}
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Judge each round's held-out responses against the original's: a model that runs in this process, "
            "or YAML such as `{engine: endpoint, model: ..., base_url: ...}`."
        },
    )
    judge_mode: str = field(
        default="scores",
        metadata={
            "help": "`scores`: the judge writes two numbers, `verdict`: A, B or tie, `logprobs`: its probabilities of "
            "A and B, for small models."
        },
    )
    judge_max_new_tokens: int = field(
        default=64, metadata={"help": "Longest reply of the judge; more for one that thinks aloud."}
    )
    judge_against: str | None = field(
        default=None, metadata={"help": "evaluate: eval_samples.jsonl of the model to judge against."}
    )

    def __post_init__(self):
        least = {
            "num_constitutions": 2, "max_new_tokens": 1, "rounds": 1, "queries_per_step": 1, "steps_first_round": 1,
            "steps_growth": 0, "num_eval_queries": 2, "eval_batch_tokens": 1, "judge_max_new_tokens": 1,
        }  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")
        if self.num_queries is not None and self.num_queries < 1:
            raise ValueError(f"`num_queries` must be at least 1, got {self.num_queries}.")
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.sampling_template is not None:
            check_template(self.sampling_template, "sampling_template")
        if self.judge_mode not in MODES:
            raise ValueError(f"`judge_mode` must be one of {', '.join(MODES)}, got {self.judge_mode!r}.")
        if self.judge is not None and not parse_engine(self.judge, "judge").arguments.engine_model:
            raise ValueError("`judge` names no model: add `model` to it.")

    def filters(self) -> ResponseFilters:
        """What disqualifies a row from training."""
        return ResponseFilters(max_tokens=self.max_response_tokens, drop_truncated=not self.keep_truncated)

    def evaluation_filters(self) -> ResponseFilters:
        """Evaluation keeps every row that can be scored."""
        return ResponseFilters(evasive_openings=(), drop_truncated=False, drop_echo=False, drop_equal=False)

    def steps_of(self, round_: int) -> int:
        """Gradient steps of round 1, 2, ..."""
        return self.steps_first_round + (round_ - 1) * self.steps_growth
