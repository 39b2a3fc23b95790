"""Settings of the CodecLM commands beside those of the codec, the trainer and the model."""

from dataclasses import dataclass, field

from ..core.prompt_arguments import check_least


@dataclass
class CodecLMArguments:
    """What happens with the pairs. One YAML serves all commands.

    Raises:
        ValueError: A value outside its range or choices, naming the field.
    """

    train: bool = field(
        default=False,
        metadata={
            "help": "run: fine-tune the target on the pairs and compare it with the strong model, before and after. "
            "The options of SFTConfig and ModelConfig are there only with this."
        },
    )
    weight_by: str | None = field(
        default=None,
        metadata={
            "help": "train: weigh rows by their `gap`, or so that each `metadata` counts alike. Default: alike."
        },
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "train: share of the pairs held out, to see what their likelihood becomes."}
    )
    benchmark: str | None = field(
        default=None,
        metadata={
            "help": "train: prompts to compare the models on: a file, or a data set on the hub. None: no comparison."
        },
    )
    benchmark_column: str | None = field(default=None, metadata={"help": "Its column; guessed if left out."})
    num_benchmark_prompts: int | None = field(default=None, metadata={"help": "Use at most this many."})
    judge: str | None = field(
        default=None, metadata={"help": "train: the model that compares answers: an engine. Default: the scorer."}
    )
    judge_mode: str = field(
        default="scores",
        metadata={"help": "How it is asked: `scores` (two numbers), `verdict` (A, B or tie) or `logprobs` (A or B)."},
    )
    description: str | None = field(
        default=None, metadata={"help": "metadata: what the instructions should be like, in a few sentences."}
    )
    num_metadata: int = field(default=20, metadata={"help": "metadata: how many to propose."})
    output: str | None = field(
        default=None, metadata={"help": "metadata: the YAML file to write. Default: output_dir/metadata.yaml."}
    )
    format: str = field(
        default="prompt_completion",
        metadata={"help": "export: columns of data.jsonl, `prompt_completion` or `messages`."},
    )

    def __post_init__(self):
        check_least(self, num_metadata=1)
        if self.num_benchmark_prompts is not None:
            check_least(self, num_benchmark_prompts=2)
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"`validation_share` must be at least 0 and below 1, got {self.validation_share!r}.")
        for name, choices in (
            ("weight_by", (None, "gap", "metadata")),
            ("judge_mode", ("scores", "verdict", "logprobs")),
            ("format", ("prompt_completion", "messages")),
        ):
            if getattr(self, name) not in choices:
                offered = ", ".join(str(choice) for choice in choices if choice)
                raise ValueError(f"`{name}` must be one of {offered}, got {getattr(self, name)!r}.")


@dataclass
class FolderArguments:
    """Where data is made, without a trainer."""

    output_dir: str = field(default="codeclm", metadata={"help": "The run's folder."})
    seed: int = field(default=42, metadata={"help": "Of everything that is drawn."})
