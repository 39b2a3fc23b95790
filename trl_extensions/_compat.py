"""Every non-public name of TRL, transformers and accelerate this package relies on, and nothing else.

Names are imported on demand; a TRL that moved one, or is outside the supported range, gives a single error.
"""

import importlib
from importlib.metadata import version

from packaging.version import Version


TRL_MINIMUM, TRL_BELOW = Version("1.16"), Version("2")
SUPPORTED = f"trl>={TRL_MINIMUM},<{TRL_BELOW}"

PRIVATE_NAMES = {
    "BaseTrainer": "trl.trainer.base_trainer:_BaseTrainer",
    "ChunkedDivergenceFunction": "trl.kernels.chunked_divergence",
    "ChunkedLogProbFunction": "trl.kernels.chunked_logprob",
    "ForwardRedirection": "trl.models.utils:_ForwardRedirection",
    "LANGUAGES": "transformers.models.whisper.tokenization_whisper",
    "add_fused_lm_head": "trl.trainer.utils",
    "addmm_fp32": "trl.kernels.chunked_logprob:_addmm_fp32",
    "chunked_divergence_loss": "trl.trainer.distillation_trainer:_chunked_divergence_loss",
    "compute_dtype": "trl.kernels.chunked_divergence:_compute_dtype",
    "create_model_from_path": "trl.trainer.utils",
    "disable_dropout_in_model": "trl.trainer.utils",
    "disable_gradient_checkpointing": "trl.models.utils",
    "get_config_model_id": "trl.trainer.utils",
    "global_then_local_main_first": "trl.trainer.utils",
    "is_deepspeed_zero3_enabled": "transformers.integrations.deepspeed",
    "fsdp2_prepare_model": "accelerate.utils.fsdp_utils",
    "maybe_gather_lm_head_ctx": "trl.trainer.utils",
    "prepare_deepspeed": "trl.models.utils",
    "print_env": "trl.scripts.env",
    "project": "trl.kernels.chunked_divergence:_project",
    "resolve_accelerate_config_argument": "trl.cli.accelerate_config",
    "suppress_seqcls_warning": "trl.trainer.reward_trainer",
    "unwrap_model_for_generation": "trl.models.utils",
    "validate_launch_command": "accelerate.commands.launch:_validate_launch_command",
    "use_adapter": "trl.trainer.utils",
    "use_triton": "trl.kernels.chunked_logprob:_use_triton",
}
"""Name here -> module that holds it, with `:name_there` where it is called otherwise."""


def check_trl_version(installed: str | None = None) -> None:
    """Raise one clear `ImportError` if TRL is outside the range this package was tested with."""
    installed = installed or version("trl")
    if not TRL_MINIMUM <= Version(Version(installed).base_version) < TRL_BELOW:
        what = f"trl_extensions works with {SUPPORTED}, but trl {installed} is installed"
        raise ImportError(f"{what}. Run: pip install '{SUPPORTED}'")


def __getattr__(name: str):
    if name not in PRIVATE_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_trl_version()
    module_name, _, there = PRIVATE_NAMES[name].partition(":")
    try:
        value = getattr(importlib.import_module(module_name), there or name)
    except (ImportError, AttributeError) as error:
        found = f"trl {version('trl')}, transformers {version('transformers')}"
        what = f"`{there or name}` from `{module_name}`, which the installed versions do not offer ({found})"
        raise ImportError(f"trl_extensions needs {what}. Supported: {SUPPORTED}.") from error
    globals()[name] = value
    return value
