"""Configurations of the weak-to-strong trainers."""

from dataclasses import dataclass, field

from trl import RewardConfig, SFTConfig

from ...core.options import renamed
from .objective import LOSSES, Objective


OVERLONG = ("truncate", "drop", "error")
TOKEN_LOSSES = ("forward_kl", "reverse_kl")


@renamed(weak_loss="loss_type")
@dataclass
class WeakLossArguments:
    """How a strong model learns from weak labels; a mixin for configurations.

    Args:
        loss_type: `"soft_ce"` (imitate), `"confidence"`, `"product"` or `"reverse_kl"`; see `weak_to_strong.loss`.
        confidence_coef: Weight in [0, 1] of the strong model's own class in the confidence loss.
        product_alpha: Weight of the weak labels in the product loss.
        product_beta: Weight of the strong model in the product loss.
        loss_warmup_ratio: Share of training over which `confidence_coef` or `product_beta` rises linearly from 0.
        weight_by_confidence: Multiply each training row's weight by how sure its soft label is: 0 for a uniform one,
            highest for a one-hot one, 1 on average.
    """

    loss_type: str = field(
        default="soft_ce",
        metadata={"help": "How the strong model learns from the weak labels.", "choices": list(LOSSES)},
    )
    confidence_coef: float = field(
        default=0.5, metadata={"help": "Weight of the strong model's own class in the confidence loss, from 0 to 1."}
    )
    product_alpha: float = field(default=1.0, metadata={"help": "Weight of the weak labels in the product loss."})
    product_beta: float = field(default=1.0, metadata={"help": "Weight of the strong model in the product loss."})
    loss_warmup_ratio: float = field(
        default=0.1,
        metadata={"help": "Share of training over which confidence_coef or product_beta rises linearly from 0."},
    )
    weight_by_confidence: bool = field(
        default=False, metadata={"help": "Weight training rows by how sure their soft label is."}
    )

    def objective(self) -> Objective:
        """The loss these settings describe."""
        weights = self.confidence_coef, self.product_alpha, self.product_beta
        return Objective(self.loss_type, *weights, self.loss_warmup_ratio)

    def check_weak_loss(self) -> None:
        """Raise `ValueError`, one line, for a setting out of range; a YAML file bypasses the parser's choices."""
        self.objective()
        if not isinstance(self.weight_by_confidence, bool):
            raise ValueError(f"`weight_by_confidence` must be true or false, got {self.weight_by_confidence!r}.")


@renamed(overlong="overlong_policy")
@dataclass
class WeakToStrongConfig(WeakLossArguments, RewardConfig):
    """`RewardConfig` plus what weak-to-strong classification (arXiv 2312.09390, 2410.12621) adds.

    Its `max_length` cuts instead of dropping, see `overlong_policy`.

    Args:
        num_labels: Classes of the head. By default as many as `class_names` has, or as the training labels show.
        class_names: Names of the classes, in the order of the soft labels; needed to read a `label` column of texts.
        overlong_policy: What to do with texts above `max_length` tokens: `"truncate"` on the right, `"drop"` the row,
            `"error"`.
        linear_probe: Train the head only. Each text then runs through the frozen backbone once, before training.
        probe_batch_tokens: Most tokens, padding included, in a batch of that run.

    Raises:
        ValueError: A value outside its range or choices, or a setting of `RewardConfig` that has no meaning here.
    """

    num_labels: int | None = field(
        default=None, metadata={"help": "Classes of the head; by default taken from class_names or the labels."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, in the order of the soft labels."}
    )
    overlong_policy: str = field(
        default="truncate",
        metadata={"help": "What to do with texts above max_length tokens.", "choices": list(OVERLONG)},
    )
    linear_probe: bool = field(default=False, metadata={"help": "Train the head only, on features computed once."})
    probe_batch_tokens: int = field(
        default=16384, metadata={"help": "Most tokens in a batch when features of a linear probe are computed."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_weak_loss()
        if self.overlong_policy not in OVERLONG:
            raise ValueError(f"`overlong_policy` must be one of {', '.join(OVERLONG)}, got {self.overlong_policy!r}.")
        if not isinstance(self.linear_probe, bool):
            raise ValueError(f"`linear_probe` must be true or false, got {self.linear_probe!r}.")
        if type(self.probe_batch_tokens) is not int or self.probe_batch_tokens < 1:
            raise ValueError(f"`probe_batch_tokens` must be a whole number above 0, got {self.probe_batch_tokens!r}.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no effect on soft labels: smooth the labels themselves.")
        for name in ("center_rewards_coefficient", "eos_token", "activation_offloading"):
            if getattr(self, name):
                raise ValueError(f"`{name}` belongs to reward models and has no effect on a classifier: leave it out.")
        if self.num_labels is not None and (type(self.num_labels) is not int or self.num_labels < 2):
            raise ValueError(f"`num_labels` must be a whole number of at least 2, got {self.num_labels!r}.")
        names = self.class_names
        if names is None:
            return
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not texts or len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"`class_names` must be a list of at least 2 different texts, got {names!r}.")
        if self.num_labels not in (None, len(names)):
            raise ValueError(f"`num_labels` is {self.num_labels}, `class_names` has {len(names)}: give one of them.")


@renamed()
@dataclass
class WeakToStrongRewardConfig(WeakLossArguments, RewardConfig):
    """`RewardConfig` plus how a reward model learns from weak preferences (arXiv 2312.09390, 2410.12621).

    A pair counts as two classes, "`chosen` is better" and "`rejected` is better", with the soft labels
    `[preference, 1 - preference]`. See `WeakLossArguments` for the arguments.

    Raises:
        ValueError: A value outside its range or choices.
    """

    def __post_init__(self):
        super().__post_init__()
        self.check_weak_loss()


@dataclass
class WeakToStrongSFTConfig(SFTConfig):
    """`SFTConfig` plus how the token distributions of a weak model are learned.

    Args:
        token_loss: Divergence at every scored token, used where the trainer is given a `weak_model`: `"forward_kl"`,
            KL(weak || strong), has the gradient of cross-entropy with the weak model's probabilities; `"reverse_kl"`,
            KL(strong || weak), keeps to what the weak model thinks likely without having to cover all of it.

    Raises:
        ValueError: Another `token_loss`.
    """

    token_loss: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence from a `weak_model`'s token distributions: KL(weak||strong) or KL(strong||weak).",
            "choices": list(TOKEN_LOSSES),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.token_loss not in TOKEN_LOSSES:
            raise ValueError(f"`token_loss` must be one of {', '.join(TOKEN_LOSSES)}, got {self.token_loss!r}.")
