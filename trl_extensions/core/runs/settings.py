"""Settings written beside the data they made, so that a resumed run cannot quietly mix two of them."""

import json
import os
from collections.abc import Iterator, Set
from dataclasses import fields
from pathlib import Path
from typing import Any

from .report import write_atomically


# Settings of a trainer that may change between a kill and the restart: they decide where and how fast, not what
FREE_SETTINGS = {
    "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id", "log_level",
    "log_level_replica", "logging_steps", "logging_strategy", "logging_first_step", "save_steps", "save_strategy",
    "save_total_limit", "hub_token", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo",
    "resume_from_checkpoint", "dataloader_num_workers", "dataset_num_proc", "use_cpu", "local_rank", "ddp_backend",
    "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "per_device_eval_batch_size",
}  # fmt: skip


def binding_settings(config: Any, free: Set[str] = FREE_SETTINGS) -> dict[str, Any]:
    """The fields of a trainer's configuration, JSON-ready, that a resumed run must share: all but the free ones."""
    known = {f.name for f in fields(config)} - free
    return {name: value for name, value in config.to_dict().items() if name in known}


def claim_settings(path: str | os.PathLike, settings: dict[str, Any], *, made: str, in_use: bool) -> None:
    """Write settings to a JSON file, or make sure they are the ones in it.

    Args:
        path: The file.
        settings: JSON-ready values, dicts of them included.
        made: What was made with them, for messages.
        in_use: Whether anything was made yet; if not, the file is replaced.

    Raises:
        ValueError: Something was made with other settings (the message names each), or the file is missing or broken.
    """
    path = Path(path)
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they are in the file
    if not in_use:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{made} exists already, but {path.name} beside it is missing or not JSON; restore that file to resume, "
            "or use another output"
        ) from None
    differences = list(_differences(earlier, settings))
    if differences:
        raise ValueError(
            f"{made} was made with other settings: {'; '.join(differences)}; use the same ones to resume, or another "
            "output"
        )


def _differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            yield from _differences(earlier.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif earlier != now:
        yield f"{name} was {_short(earlier)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
