"""Configuration of `TNTTrainer`."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..core.training.checks import reject_sft_settings
from .loss import SMOOTH_OVER, VARIANTS, check_objective


@dataclass
class TNTConfig(SFTConfig):
    """`SFTConfig` plus what targeted negative training (TNT, arXiv 2406.13660) adds.

    Args:
        variant (`str`, *optional*, defaults to `"ff"`):
            How the model is drawn to its target at unwanted and at kept tokens: `"ff"`, `"rr"`, `"rf"` (forward or
            reverse KL), `"fll"`, `"rll"` (log-likelihood of kept tokens), or the baselines `"ul"` (unlikelihood) and
            `"nl"` (negative likelihood). See `tnt.loss`.
        alpha (`float`, *optional*, defaults to `1.0`):
            Weight of unwanted tokens beside kept ones.
        smoothing (`float`, *optional*, defaults to `1e-6`):
            Probability a reverse KL's target gives to a banned token, so that it stays finite. Unused by `"ff"`,
            `"fll"`, `"ul"` and `"nl"`.
        smooth_over (`str`, *optional*, defaults to `"banned"`):
            `"banned"`: only the banned token gets that mass. `"vocabulary"`: every entry of a reverse KL's target
            does, kept positions included, as in the published code; moves much mass in a large vocabulary.
        share_prefix (`bool`, *optional*, defaults to `False`):
            Compute a prompt once for all rows of a batch that have it: the same loss for fewer tokens, where several
            samples of a prompt are trained on and the prompt is the longer part. Rows of one prompt are then drawn
            side by side, in random order of the prompts. Models that cannot do this exactly (sliding windows,
            attention kernels without masks of their own, ...) go on as without it, and a log line says why.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switch dropout off, so that the model starts where its original is.

    Raises:
        ValueError: A value outside its range or choices, or a setting of `SFTConfig` that TNT cannot honour.
    """

    variant: str = field(
        default="ff",
        metadata={
            "help": "How the model is drawn to its target, at unwanted and at kept tokens.",
            "choices": list(VARIANTS),
        },
    )
    alpha: float = field(default=1.0, metadata={"help": "Weight of unwanted tokens beside kept ones."})
    smoothing: float = field(
        default=1e-6, metadata={"help": "Probability a reverse KL's target gives to a banned token."}
    )
    smooth_over: str = field(
        default="banned",
        metadata={
            "help": "What `smoothing` is given to: the banned token, or every entry (the published code).",
            "choices": list(SMOOTH_OVER),
        },
    )
    share_prefix: bool = field(
        default=False,
        metadata={"help": "Compute a prompt once for all rows of a batch that have it, and draw these together."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch dropout off in the policy."})

    def __post_init__(self):
        super().__post_init__()
        check_objective(self.variant, self.alpha, self.smoothing, self.smooth_over)
        reject_sft_settings(
            self,
            "TNT",
            because="weighs every token itself",
            loss_type="set `variant` instead",
            rows="give `input_ids`, `labels`, `negative_mask`",
        )
