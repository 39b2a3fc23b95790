"""Giving memory back between models."""

import gc
import sys


def free_memory() -> None:
    """Give models of a finished stage back before the next one loads its own; loads no torch where there is none."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
