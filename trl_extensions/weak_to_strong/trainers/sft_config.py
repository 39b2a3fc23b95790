"""Configuration of `WeakToStrongSFTTrainer`."""

from dataclasses import dataclass, field

from trl import SFTConfig


TOKEN_LOSSES = ("forward_kl", "reverse_kl")


@dataclass
class WeakToStrongSFTConfig(SFTConfig):
    """`SFTConfig` plus how the token distributions of a weak model are learned.

    Args:
        token_loss (`str`, *optional*, defaults to `"forward_kl"`):
            Divergence at every scored token, used where the trainer is given a `weak_model`: `"forward_kl"`, KL(weak
            || strong), has the gradient of cross-entropy with the weak model's probabilities; `"reverse_kl"`,
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
