# ruff: noqa: RUF009 (`option` makes a field)
"""Configurations of the weak-to-strong trainers."""

from dataclasses import dataclass
from typing import ClassVar

from transformers.trainer_utils import SaveStrategy
from trl import RewardConfig, SFTConfig

from ...core.options import check_choices, check_least, option, renamed
from ...core.training.load import RunsHere
from .objective import LOSSES, Objective


@renamed(weak_loss="loss_type")
@dataclass
class WeakLossArguments(RunsHere):
    """How a strong model learns from weak labels; a mixin for configurations.

    Args:
        loss_type: `"soft_ce"` (imitate), `"confidence"`, `"product"` or `"reverse_kl"`; see `weak_to_strong.loss`.
        confidence_coef: Weight in [0, 1] of the strong model's own class in the confidence loss.
        product_alpha, product_beta: Weights of the weak labels and of the strong model in the product loss.
        loss_warmup_ratio: Share of training over which `confidence_coef` or `product_beta` rises linearly from 0.
        weight_by_confidence: Multiply each training row's weight by how sure its soft label is: 0 for a uniform one,
            highest for a one-hot one, 1 on average.
    """

    shown: ClassVar = (1000, 1, 8)

    loss_type: str = option("soft_ce", "How the strong model learns from the weak labels.", *LOSSES)
    confidence_coef: float = option(0.5, "Weight of the strong model's own class in the confidence loss, 0 to 1.")
    product_alpha: float = option(1.0, "Weight of the weak labels in the product loss.")
    product_beta: float = option(1.0, "Weight of the strong model in the product loss.")
    loss_warmup_ratio: float = option(
        0.1, "Share of training over which confidence_coef or product_beta rises linearly from 0."
    )
    weight_by_confidence: bool = option(False, "Weight training rows by how sure their soft label is.")

    def __post_init__(self):
        super().__post_init__()
        self.objective()  # raises for a setting out of range
        if not isinstance(self.weight_by_confidence, bool):
            raise ValueError(f"`weight_by_confidence` must be true or false, got {self.weight_by_confidence!r}.")

    def objective(self) -> Objective:
        """The loss these settings describe."""
        weights = self.confidence_coef, self.product_alpha, self.product_beta
        return Objective(self.loss_type, *weights, self.loss_warmup_ratio)


@renamed(overlong="overlong_policy")
@dataclass
class WeakToStrongConfig(WeakLossArguments, RewardConfig):
    """`RewardConfig` plus what weak-to-strong classification (arXiv 2312.09390, 2410.12621) adds.

    Args:
        num_labels: Classes of the head. By default as many as `class_names` has, or as the training labels show.
        class_names: Names of the classes, in the order of the soft labels; needed to read a `label` column of texts.
        overlong_policy: What to do with texts above `max_length` tokens, which `RewardConfig` drops: `"truncate"` on
            the right, `"drop"` the row, `"error"`.
        learning_rate, num_train_epochs: By default 2e-3 for a head alone, 2e-4 for an adapter, 2e-5 for all weights;
            as many epochs as show 1,000 rows, from 1 to 8, or, to a head alone, 6,000, from 3 to 30.
        linear_probe: Train the head only. Each text then runs through the frozen backbone once, before training.
        probe_batch_tokens: Most tokens, padding included, in a batch of that run.

    Raises:
        ValueError: A value outside its range or choices, or a setting of `RewardConfig` that has no meaning here.
    """

    num_labels: int | None = option(None, "Classes of the head; by default taken from class_names or the labels.")
    class_names: list[str] | None = option(None, "Names of the classes, in the order of the soft labels.")
    overlong_policy: str = option("truncate", "For texts above max_length tokens.", "truncate", "drop", "error")
    linear_probe: bool = option(False, "Train the head only, on features computed once.")
    probe_batch_tokens: int = option(16384, "Most tokens in a batch when features of a linear probe are computed.")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, "overlong_policy")
        check_least(self, probe_batch_tokens=1)
        if self.linear_probe is True:
            self.shown = (6000, 3, 30)  # which costs nothing, on features
            as_by_default = (self.save_strategy, self.save_steps) == ("steps", 500)
            if as_by_default and not self.load_best_model_at_end:
                self.save_strategy = SaveStrategy.NO  # a checkpoint would hold all of the frozen model
        if self.num_labels is not None:
            check_least(self, num_labels=2)
        if not isinstance(self.linear_probe, bool):
            raise ValueError(f"`linear_probe` must be true or false, got {self.linear_probe!r}.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no effect on soft labels: smooth the labels themselves.")
        for name in ("center_rewards_coefficient", "eos_token", "activation_offloading"):
            if getattr(self, name):
                raise ValueError(f"`{name}` belongs to reward models and has no effect on a classifier: leave it out.")
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
    `[preference, 1 - preference]`. Arguments and errors are those of `WeakLossArguments`.
    """


@dataclass
class WeakToStrongSFTConfig(RunsHere, SFTConfig):
    """`SFTConfig` plus how the token distributions of a weak model are learned.

    Args:
        token_loss: Divergence at every scored token, used where the trainer is given a `weak_model`: `"forward_kl"`,
            KL(weak || strong), has the gradient of cross-entropy with the weak model's probabilities; `"reverse_kl"`,
            KL(strong || weak), keeps to what the weak model thinks likely without having to cover all of it. Another
            one raises a `ValueError`.
    """

    token_loss: str = option("forward_kl", "Divergence from a `weak_model`, per token.", "forward_kl", "reverse_kl")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, "token_loss")
