# ruff: noqa: RUF009 (`_option` makes a field)
"""Settings of `SAMITrainer`, and of the SAMI commands beside those of the trainer, the model and the engine."""

from dataclasses import dataclass
from typing import ClassVar

from trl import SFTConfig

from ..core.inputs import QueryArguments
from ..core.judge.pairwise import JudgeArguments
from ..core.options import check_choices, check_least, option, renamed
from ..core.training.load import RunsHere, reject_sft_settings
from .data import check_template


PAIRS = ("random", "desired")


def _check_positive(settings: SFTConfig | QueryArguments, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, (int, float)) or value <= 0):
            raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")


@renamed(overflow="overlong_policy")
@dataclass
class SAMIConfig(RunsHere, SFTConfig):
    """`SFTConfig` plus what SAMI (arXiv 2404.14313) adds. A batch of `per_device_train_batch_size` counts queries.

    Every query is scored C x C times in a step, each response under each constitution.

    Args:
        beta: Weight of KL(policy || original), in nats per response token of the matching pairs, added to the loss.
        preserve_weight: Weight of KL(original || policy) on the responses behind the query without a constitution, in
            nats per response token, added to the loss: it keeps the model as it was where no constitution stands
            (the locality loss of model editing, arXiv 2110.11309). Rows then need `plain_prompt`, or `query`. 0 is the
            published loss.
        logp_reduction: How token log-probabilities become a response's in the loss: `"mean"` per token (the published
            setting: a loose bound is raised) or `"sum"` (the tight one; gradients grow with length).
        length_weight: Weight of log(response tokens), added to the scores that the rows of the loss contrast, which
            makes long responses less likely (see `sami.loss.sami_loss`). 0 is the published loss.
        score_end: Score the token that ends a response with it; the released code does not.
        prompt_template: How rows with `query` and `constitutions` become a prompt, with the fields `{query}` and
            `{constitution}`; one user message if the tokenizer has a chat template, else plain text. Default:
            `trl_extensions.sami.data.TRAINING_TEMPLATE`.
        overlong_policy: For a row whose longest prompt and longest response together exceed `max_length` tokens:
            `"error"`, `"drop"` the row, or `"truncate"` its responses on the right. The last two are logged.
        log_kl: Log KL to the original also when `beta` is 0. Costs a forward of the original over the matching pairs
            and, without PEFT, the memory of a second model.
        share_prefix: Lay each prompt out once with its C responses behind it: the same scores for C (P + C R) tokens a
            query instead of C^2 (P + R). Models that cannot do this exactly (sliding windows, ...) use one sequence
            per pair, and a log line says why.
        disable_dropout: Switch dropout off, so that all C x C scores of a query come from the same network.
        guard_steps: Every this many steps, sample greedy responses to `guard_num_queries` queries of `eval_dataset`,
            each under all of its constitutions, and look for over-optimisation; 0 is off. They have at most
            `guard_max_new_tokens` tokens and end at one of `guard_stop`.
        guard_max_kl: Stop training when KL to the original on the samples exceeds this many nats per token.
        guard_max_length_ratio, guard_min_length_ratio: Stop when their mean length, over that before training, is
            beyond these.
        guard_min_distinct_2: Stop when the share of distinct word pairs in them falls below this (repetition).
        guard_references: Rows of `prompt` and `completion`, what people wrote. To the first `guard_num_queries` of
            the prompts, without a constitution, answers are sampled too. `run` takes those of `eval_references`.
        guard_min_unchanged: Stop when fewer of these answers are what they were before training, word for word.
        guard_max_reference_change: Stop when the nats of the first 4 `guard_num_queries` completions have risen by
            more than this share (0.02: 2 %).

    Raises:
        ValueError: A value outside its range or choices, or a setting of `SFTConfig` that SAMI cannot honour.
    """

    rates: ClassVar = {"adapter": 2e-4, "all": 2e-6}
    shown: ClassVar = (1500, 1, 3)

    beta: float = option(0.0, "Weight of KL(policy || original) per response token, added to the loss.")
    preserve_weight: float = option(0.0, "Weight of KL(original || policy) without a constitution, added to the loss.")
    logp_reduction: str = option("mean", "Log-probability of a response: mean per token, or sum.", "mean", "sum")
    length_weight: float = option(0.0, "Weight of log(response tokens) in the contrast of responses; 0 is off.")
    score_end: bool = option(True, "Score the token that ends a response.")
    prompt_template: str | None = option(None, "Prompt of rows of parts; fields {query} and {constitution}.")
    overlong_policy: str = option("error", "For rows longer than `max_length`.", "error", "drop", "truncate")
    log_kl: bool = option(True, "Log KL to the original also when `beta` is 0 (without PEFT: keeps a second model).")
    share_prefix: bool = option(True, "Score all responses behind one copy of each prompt, where that is exact.")
    disable_dropout: bool = option(True, "Switch dropout off in the policy.")
    guard_steps: int = option(0, "Check fresh held-out samples for over-optimisation every N steps; 0 is off.")
    guard_num_queries: int = option(4, "Held-out queries the guard samples for.")
    guard_max_new_tokens: int = option(128, "Length limit of the guard's samples (tokens).")
    guard_stop: list[str] | None = option(None, "Strings that end the guard's samples.")
    guard_max_kl: float | None = option(None, "Stop above this KL to the original on fresh samples (nats per token).")
    guard_max_length_ratio: float | None = option(None, "Stop above this multiple of the untrained samples' length.")
    guard_min_length_ratio: float | None = option(None, "Stop below this multiple of the untrained samples' length.")
    guard_min_distinct_2: float | None = option(None, "Stop below this share of distinct word pairs in samples.")
    guard_references: str | None = option(None, "Rows of prompts and human completions that the guard watches.")
    guard_min_unchanged: float | None = option(None, "Stop below this share of answers unchanged, no constitution.")
    guard_max_reference_change: float | None = option(None, "Stop above this relative change in their nats.")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, "logp_reduction", "overlong_policy")
        for name in ("beta", "preserve_weight", "length_weight"):
            if not isinstance(getattr(self, name), (int, float)) or getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(self, name)!r}.")
        if self.prompt_template is not None:
            check_template(self.prompt_template, "prompt_template")
        check_least(self, guard_steps=0, guard_num_queries=1, guard_max_new_tokens=1)
        limits = (
            "guard_max_kl", "guard_max_length_ratio", "guard_min_length_ratio", "guard_min_distinct_2",
            "guard_min_unchanged", "guard_max_reference_change",
        )  # fmt: skip
        _check_positive(self, *limits)
        if self.guard_steps == 0 and any(getattr(self, name) is not None for name in limits):
            raise ValueError("A `guard_` limit is set but `guard_steps` is 0, so it would never be looked at.")
        reject_sft_settings(self, "SAMI", own_data=True)


@renamed(
    queries="prompts", query_column="prompt_column", query_pattern="prompt_pattern", query_split="prompt_split",
    num_queries="num_prompts", num_eval_queries="num_eval_prompts", queries_per_step="effective_batch_size",
    steps_first_round="steps_per_round", steps_growth="steps_per_round_increment",
)  # fmt: skip
@dataclass
class SAMIArguments(JudgeArguments, QueryArguments):
    """Queries (`prompts`), principles, sampling and rounds. One YAML serves `sample`, `train`, `evaluate` and `run`.

    The defaults of the rounds are the published ones (arXiv 2404.14313, section 4): batches of 128 queries, one
    gradient step a batch, 2, 4 and 6 batches. A value outside its range raises a `ValueError` that names the field.
    """

    dataset_name: str | None = option(None, "train: rows, a file of `sample` or a data set with SAMI's columns.")
    dataset_train_split: str = option("train", "train: split of `dataset_name`.")
    eval_dataset_name: str | None = option(None, "train: held-out rows, for `eval_strategy` and the guard.")
    num_eval_prompts: int = option(64, "Queries held out for evaluation.")
    max_new_tokens: int = option(350, "Longest response, in tokens.")
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.")
    principles: str | None = option(None, "YAML file of principles.")
    eval_principles: str | None = option(None, "YAML file of principles that are not trained, to evaluate on too.")
    num_constitutions: int = option(2, "Constitutions per query (C).")
    num_eval_constitutions: int = option(4, "Constitutions per held-out query; all there are, if those are fewer.")
    pairs: str = option("random", "Constitutions of a query: any, or the all-definitions one and others.", *PAIRS)
    sampling_template: str | None = option(None, "Prompt of training responses; fields {query} and {constitution}.")
    keep_truncated: bool = option(False, "Train on rows with a response that hit `max_new_tokens` before its end.")
    max_response_tokens: int | None = option(None, "Drop rows with a response longer than this.")
    filter_by_check: bool = option(False, "Drop rows with a response that fails the `check` of its principles.")
    eval_references: str | None = option(None, "Rows of prompts and human completions, whose likelihood should stay.")
    eval_multiple_choice: str | None = option(None, "Rows of question, choices and answer, to see accuracy stay.")
    rounds: int = option(3, "run: rounds of expert iteration.")
    effective_batch_size: int = option(128, "Queries in one gradient step, over all processes and micro-batches.")
    steps_per_round: int = option(2, "run: gradient steps of the first round.")
    steps_per_round_increment: int = option(2, "run: further steps each round has over the one before.")
    absorb: bool = option(False, "run: train the last model, asked nothing but the query, to obey all definitions.")
    absorb_epochs: float = option(1.0, "run: epochs of that over the training queries.")
    absorb_learning_rate: float | None = option(None, "run: its learning rate. Default: `learning_rate`.")
    eval_batch_tokens: int = option(4096, "Padded tokens per batch when scoring.")
    original_model: str | None = option(None, "evaluate: the original of a fully fine-tuned model, for KL.")
    judge_against: str | None = option(None, "evaluate: eval_samples.jsonl of the model to judge against.")

    def __post_init__(self):
        QueryArguments.__post_init__(self)
        JudgeArguments.__post_init__(self)
        check_least(
            self, num_constitutions=2, num_eval_constitutions=2, effective_batch_size=1, steps_per_round=1,
            steps_per_round_increment=0, eval_batch_tokens=1,
        )  # fmt: skip
        check_least(self, 1000, rounds=1)
        _check_positive(self, "absorb_epochs", "absorb_learning_rate")
        if self.sampling_template is not None:
            check_template(self.sampling_template, "sampling_template")
        check_choices(self, "pairs")

    def steps_of(self, round_: int) -> int:
        """Gradient steps of round 1, 2, ..."""
        return self.steps_per_round + (round_ - 1) * self.steps_per_round_increment
