"""Published alignment methods as drop-in TRL trainers: public names, imported on first use.

Importing this package costs no more than Python's own machinery: torch, transformers and TRL are loaded by the first
name that needs them.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING


try:
    __version__ = version("trl-extensions")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"

_PUBLIC = {
    "CodecLM": "trl_extensions.codeclm.codec",
    "CodecLMConfig": "trl_extensions.codeclm.codeclm_config",
    "DataCollatorForCodecLM": "trl_extensions.codeclm.collator",
    "SAMIConfig": "trl_extensions.sami.sami_config",
    "SAMITrainer": "trl_extensions.sami.sami_trainer",
    "TNTConfig": "trl_extensions.tnt.tnt_config",
    "TNTTrainer": "trl_extensions.tnt.tnt_trainer",
    "WeakToStrongConfig": "trl_extensions.weak_to_strong.w2s_config",
    "WeakToStrongRewardConfig": "trl_extensions.weak_to_strong.reward_config",
    "WeakToStrongRewardTrainer": "trl_extensions.weak_to_strong.reward_trainer",
    "WeakToStrongSFTConfig": "trl_extensions.weak_to_strong.sft_config",
    "WeakToStrongSFTTrainer": "trl_extensions.weak_to_strong.sft_trainer",
    "WeakToStrongTrainer": "trl_extensions.weak_to_strong.w2s_trainer",
}

__all__ = [
    "CodecLM",
    "CodecLMConfig",
    "DataCollatorForCodecLM",
    "SAMIConfig",
    "SAMITrainer",
    "TNTConfig",
    "TNTTrainer",
    "WeakToStrongConfig",
    "WeakToStrongRewardConfig",
    "WeakToStrongRewardTrainer",
    "WeakToStrongSFTConfig",
    "WeakToStrongSFTTrainer",
    "WeakToStrongTrainer",
    "__version__",
]

if TYPE_CHECKING:
    from .codeclm.codec import CodecLM
    from .codeclm.codeclm_config import CodecLMConfig
    from .codeclm.collator import DataCollatorForCodecLM
    from .sami.sami_config import SAMIConfig
    from .sami.sami_trainer import SAMITrainer
    from .tnt.tnt_config import TNTConfig
    from .tnt.tnt_trainer import TNTTrainer
    from .weak_to_strong.reward_config import WeakToStrongRewardConfig
    from .weak_to_strong.reward_trainer import WeakToStrongRewardTrainer
    from .weak_to_strong.sft_config import WeakToStrongSFTConfig
    from .weak_to_strong.sft_trainer import WeakToStrongSFTTrainer
    from .weak_to_strong.w2s_config import WeakToStrongConfig
    from .weak_to_strong.w2s_trainer import WeakToStrongTrainer


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {sorted(_PUBLIC)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
