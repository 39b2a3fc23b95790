"""Configuration of `SAMITrainer`."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..core.training.checks import reject_sft_settings


_CHOICES = {
    "logp_reduction": ("mean", "sum"),
    "overflow": ("error", "drop", "truncate"),
}


@dataclass
class SAMIConfig(SFTConfig):
    """`SFTConfig` plus what SAMI (arXiv 2404.14313) adds. A batch of `per_device_train_batch_size` counts queries.

    Every query is scored C x C times in a step, each response under each constitution.

    Args:
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of KL(policy || original), in nats per response token of the matching pairs, added to the loss.
        logp_reduction (`str`, *optional*, defaults to `"mean"`):
            How token log-probabilities become a response's: `"mean"` per token (the published setting) or `"sum"`
            (makes the mutual information bound a true one; gradients grow with length).
        prompt_template (`str` or `None`, *optional*):
            For rows with `query` and `constitutions`: how they become a prompt, with the fields `{query}` and
            `{constitution}`. The result is one user message if the tokenizer has a chat template, else plain text.
            Defaults to `trl_extensions.sami.sampling.TRAINING_TEMPLATE`.
        overflow (`str`, *optional*, defaults to `"error"`):
            What to do with a row whose longest prompt and longest response together exceed `max_length` tokens:
            `"error"`, `"drop"` the row, or `"truncate"` its responses on the right (never the prompts). The last two
            are counted and logged.
        log_kl (`bool`, *optional*, defaults to `True`):
            Log KL to the original also when `beta` is 0. Costs a forward of the original over the matching pairs and,
            without PEFT, the memory of a second model.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Lay each prompt out once with its C responses behind it: the same scores for C (P + C R) tokens a query
            instead of C^2 (P + R). Models that cannot do this exactly (sliding windows, attention kernels without
            masks of their own, ...) use one sequence per pair, and a log line says why.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switch dropout off, so that all C x C scores of a query come from the same network.
        guard_steps (`int`, *optional*, defaults to `0`):
            Every this many steps, sample responses to held-out prompts and look for over-optimisation; 0 is off.
            Prompts come from `eval_dataset`.
        guard_num_queries (`int`, *optional*, defaults to `4`):
            Held-out queries the guard samples for, each under all of its constitutions, greedily.
        guard_max_new_tokens (`int`, *optional*, defaults to `128`):
            Length limit of those samples, in tokens.
        guard_stop (`list[str]` or `None`, *optional*):
            Strings that end those samples, for models without an end of their own.
        guard_max_kl (`float` or `None`, *optional*):
            Stop training when KL to the original on the fresh samples exceeds this many nats per token.
        guard_max_length_ratio (`float` or `None`, *optional*):
            Stop when their mean length exceeds this multiple of what it was before training.
        guard_min_length_ratio (`float` or `None`, *optional*):
            Stop when their mean length falls below this multiple of what it was before training.
        guard_min_distinct_2 (`float` or `None`, *optional*):
            Stop when the share of distinct word pairs in them falls below this (repetition, gibberish).

    Raises:
        ValueError: A value outside its range or choices, or a setting of `SFTConfig` that SAMI cannot honour.
    """

    beta: float = field(
        default=0.0,
        metadata={"help": "Weight of KL(policy || original) per response token, added to the loss."},
    )
    logp_reduction: str = field(
        default="mean",
        metadata={
            "help": "How token log-probabilities become a response's: mean per token, or sum.",
            "choices": ["mean", "sum"],
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Prompt for rows with `query` and `constitutions`; fields {query} and {constitution}."},
    )
    overflow: str = field(
        default="error",
        metadata={
            "help": "Rows longer than `max_length`: error, drop the row, or truncate its responses (never prompts).",
            "choices": ["error", "drop", "truncate"],
        },
    )
    log_kl: bool = field(
        default=True,
        metadata={"help": "Log KL to the original also when `beta` is 0 (without PEFT: keeps a second model)."},
    )
    share_prefix: bool = field(
        default=True,
        metadata={"help": "Score all responses behind one copy of each prompt, where the model can do so exactly."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch dropout off in the policy."})
    guard_steps: int = field(
        default=0, metadata={"help": "Check fresh held-out samples for over-optimisation every N steps; 0 is off."}
    )
    guard_num_queries: int = field(default=4, metadata={"help": "Held-out queries the guard samples for."})
    guard_max_new_tokens: int = field(default=128, metadata={"help": "Length limit of the guard's samples (tokens)."})
    guard_stop: list[str] | None = field(default=None, metadata={"help": "Strings that end the guard's samples."})
    guard_max_kl: float | None = field(
        default=None, metadata={"help": "Stop when KL to the original on fresh samples exceeds this (nats per token)."}
    )
    guard_max_length_ratio: float | None = field(
        default=None, metadata={"help": "Stop when fresh samples are longer than this multiple of the untrained ones."}
    )
    guard_min_length_ratio: float | None = field(
        default=None,
        metadata={"help": "Stop when fresh samples are shorter than this multiple of the untrained ones."},
    )
    guard_min_distinct_2: float | None = field(
        default=None, metadata={"help": "Stop when the share of distinct word pairs in fresh samples falls below."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not isinstance(self.beta, (int, float)) or self.beta < 0:
            raise ValueError(f"`beta` must be a number of at least 0, got {self.beta!r}.")
        if self.prompt_template is not None:
            from .templates import check_template

            check_template(self.prompt_template, "prompt_template")
        self._check_guard()
        reject_sft_settings(
            self,
            "SAMI",
            because="scores pairs of rows",
            loss_type="leave it out",
            rows="SAMI rows are tokenised by the trainer",
        )

    def _check_guard(self):
        for name, least in (("guard_steps", 0), ("guard_num_queries", 1), ("guard_max_new_tokens", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {getattr(self, name)!r}.")
        limits = ("guard_max_kl", "guard_max_length_ratio", "guard_min_length_ratio", "guard_min_distinct_2")
        for name in limits:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or value <= 0):
                raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")
        if self.guard_steps == 0 and any(getattr(self, name) is not None for name in limits):
            raise ValueError("A `guard_` limit is set but `guard_steps` is 0, so it would never be looked at.")
