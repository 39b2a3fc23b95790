"""Prompts, held-out prompts and how they are answered: the arguments of every method that samples outputs."""

import random
from dataclasses import dataclass, field

from .generation.types import GenerationParams
from .inputs import Query, load_queries


@dataclass
class PromptArguments:
    """Prompts and sampling.

    Raises:
        ValueError: A value outside its range, naming the field.
    """

    prompts: str | None = field(
        default=None, metadata={"help": "Prompts: a .jsonl, .json or .csv file, or a data set on the hub."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts; guessed if left out."})
    prompt_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression with one group that cuts the prompt out of the column."}
    )
    prompt_split: str = field(default="train", metadata={"help": "Split of a data set on the hub."})
    num_prompts: int | None = field(default=None, metadata={"help": "Use at most this many prompts."})
    num_eval_prompts: int = field(default=200, metadata={"help": "Prompts held out for evaluation."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message of every chat."})
    plain_prompts: bool = field(
        default=False, metadata={"help": "Continue prompts as they stand, even if the model has a chat template."}
    )
    greedy: bool = field(default=True, metadata={"help": "Sample one greedy output a prompt."})
    num_samples: int = field(default=1, metadata={"help": "Random outputs a prompt, beside the greedy one."})
    num_eval_samples: int = field(default=1, metadata={"help": "Random outputs a held-out prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of random outputs."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of random outputs."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest output, in tokens."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Strings that end an output."})

    def __post_init__(self):
        check_least(self, num_eval_prompts=2, num_samples=0, num_eval_samples=0, max_new_tokens=1)
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"`num_prompts` must be at least 1, got {self.num_prompts}.")
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.params()

    def params(self, seed: int = 0) -> GenerationParams:
        """How outputs are sampled."""
        return GenerationParams(self.max_new_tokens, self.temperature, self.top_p, tuple(self.stop), seed)

    def load_prompts(self, seed: int) -> tuple[list[Query], list[Query]]:
        """Training and held-out prompts: one seeded shuffle, the first `num_eval_prompts` held out.

        Raises:
            ValueError: Too few prompts, or as `core.queries.load_queries`.
        """
        prompts = load_queries(
            self.prompts,
            column=self.prompt_column,
            pattern=self.prompt_pattern,
            split=self.prompt_split,
            limit=self.num_prompts,
            chats=True,
        )
        if len(prompts) < self.num_eval_prompts + 1:
            raise ValueError(
                f"{self.prompts} holds {len(prompts)} prompts, of which num_eval_prompts={self.num_eval_prompts} are "
                "held out: give more prompts or lower `num_eval_prompts`."
            )
        random.Random(seed).shuffle(prompts)
        return prompts[self.num_eval_prompts :], prompts[: self.num_eval_prompts]


def check_least(arguments, **least: int) -> None:
    """Raise a one-line `ValueError` for a field that is no whole number, or a smaller one than given here."""
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")
