"""Published alignment methods as drop-in TRL trainers: public names, imported on first use.

Importing this package costs no more than Python's own machinery: torch, transformers and TRL are loaded by the first
name that needs them.
"""

import importlib
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING


try:
    __version__ = version("trl-extensions")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"

# It would say with every command that a kernel is missing which training does not use: inference on avx512_bf16 does
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PUBLIC = {
    "CodecLM": "trl_extensions.codeclm.pipeline.codec",
    "CodecLMConfig": "trl_extensions.codeclm.config",
    "DataCollatorForCodecLM": "trl_extensions.codeclm.collator",
    "SAMIConfig": "trl_extensions.sami.config",
    "SAMITrainer": "trl_extensions.sami.trainer",
    "TNTConfig": "trl_extensions.tnt.config",
    "TNTTrainer": "trl_extensions.tnt.trainer",
    "WeakToStrongConfig": "trl_extensions.weak_to_strong.trainers.configs",
    "WeakToStrongRewardConfig": "trl_extensions.weak_to_strong.trainers.configs",
    "WeakToStrongRewardTrainer": "trl_extensions.weak_to_strong.trainers.reward",
    "WeakToStrongSFTConfig": "trl_extensions.weak_to_strong.trainers.configs",
    "WeakToStrongSFTTrainer": "trl_extensions.weak_to_strong.trainers.sft",
    "WeakToStrongTrainer": "trl_extensions.weak_to_strong.trainers.classification",
}

_METHODS = ("codeclm", "sami", "tnt", "weak_to_strong")

__all__ = [*_PUBLIC, *_METHODS, "__version__"]

if TYPE_CHECKING:  # the same for type checkers; `as` says that the names are public
    from .codeclm.collator import DataCollatorForCodecLM as DataCollatorForCodecLM
    from .codeclm.config import CodecLMConfig as CodecLMConfig
    from .codeclm.pipeline.codec import CodecLM as CodecLM
    from .sami.config import SAMIConfig as SAMIConfig
    from .sami.trainer import SAMITrainer as SAMITrainer
    from .tnt.config import TNTConfig as TNTConfig
    from .tnt.trainer import TNTTrainer as TNTTrainer
    from .weak_to_strong.trainers.classification import WeakToStrongTrainer as WeakToStrongTrainer
    from .weak_to_strong.trainers.configs import WeakToStrongConfig as WeakToStrongConfig
    from .weak_to_strong.trainers.configs import WeakToStrongRewardConfig as WeakToStrongRewardConfig
    from .weak_to_strong.trainers.configs import WeakToStrongSFTConfig as WeakToStrongSFTConfig
    from .weak_to_strong.trainers.reward import WeakToStrongRewardTrainer as WeakToStrongRewardTrainer
    from .weak_to_strong.trainers.sft import WeakToStrongSFTTrainer as WeakToStrongSFTTrainer


def __getattr__(name: str):
    if name in _METHODS:
        return importlib.import_module(f"trl_extensions.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {sorted(_PUBLIC)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
