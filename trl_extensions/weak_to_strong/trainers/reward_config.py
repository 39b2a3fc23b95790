"""Configuration of `WeakToStrongRewardTrainer`."""

from dataclasses import dataclass

from trl import RewardConfig

from .configs import WeakLossArguments


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
