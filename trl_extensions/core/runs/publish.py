"""What becomes of a finished run's model: its card, the hub, and what to do next."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...embedded import public_name
from ..generation.types import is_adapter_directory
from .report import quoted


MOST_SCORES = 30


def finish(run: Any, model: Path, report: dict[str, Any], push: bool = False, generates: bool = True) -> str:
    """Complete the card beside a trained model with what a run's report says, push both under the run's name, or
    `hub_model_id`, if so told, and return what to do next, a line each."""
    from huggingface_hub import HfApi

    config = getattr(run, "output", None) or run.config
    name, base, license = run.folder.resolve().name, public_name(str(run.model_args.model_name_or_path)), None
    api, after = HfApi(token=config.hub_token), f"hf upload {name} {model}"
    if push:
        with contextlib.suppress(Exception):  # a base that is not on the hub, or says nothing of a licence
            license = getattr(api.model_info(base).card_data, "license", None)
    if (model / "README.md").is_file():
        data = [getattr(own, of, None) for own in vars(run).values() for of in ("prompts", "examples", "dataset_name")]
        _complete_card(model / "README.md", name, base, license, data, report)
    if push:
        repo = api.create_repo(config.hub_model_id or name, private=config.hub_private_repo, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=model, commit_message=f"Model of {name}")
        after = f"done, https://huggingface.co/{repo}"
    chat = f"pipeline('text-generation', '{model}')([{{'role': 'user', 'content': 'Hello'}}])[0]['generated_text'][-1]"
    lines = [f'ask:   python -c "from transformers import pipeline; print({chat})"', f"serve: vllm serve {model}"]
    if is_adapter_directory(model):
        merged = f"M.from_pretrained('{model}').merge_and_unload().save_pretrained('{model}-merged')"
        lines[1] = f"serve: vllm serve {base} --enable-lora --lora-modules {name}={model}"
        lines.append(f'merge: python -c "from peft import AutoPeftModelForCausalLM as M; {merged}"')
    return "\n".join([*lines[: 3 * generates], f"push:  {after}"])


def scores_of(numbers: Any, name: str = "") -> Iterator[tuple[str, float, float, float]]:
    """Every estimate with an interval in a report: its name, such as patched/greedy/share, its value, low and high."""
    if isinstance(numbers, dict):
        value, low, high = (numbers.get(part) for part in ("value", "low", "high"))
        if isinstance(value, (int, float)) and isinstance(low, (int, float)) and isinstance(high, (int, float)):
            yield name, value, low, high
        for key, part in numbers.items():
            yield from scores_of(part, f"{name}/{key}".lstrip("/"))


def _complete_card(path: Path, name: str, base: str, license: str | None, data: list, report: dict[str, Any]) -> None:
    from huggingface_hub import EvalResult, ModelCard

    card, scores = ModelCard.load(path), list(scores_of(report))[:MOST_SCORES]
    own, held_out = card.data, ("text-generation", "held-out", "held out by the run")
    vars(own).pop("licence", None)  # a placeholder of TRL's
    own.model_name, own.license, own.base_model = name, license, None if os.path.isdir(base) else base
    own.datasets = [one for one in data if isinstance(one, str) and "/" in one and not os.path.exists(one)] or None
    own.eval_results = [
        EvalResult(*held_out, m, v, metric_args={"low": a, "high": b}) for m, v, a, b in scores
    ] or None
    lines = [quoted(report.get("verdict", {}).get("text", "")), "", "| held out | value | 95 % interval |"]
    lines += ["| --- | --- | --- |", *(f"| {quoted(m)} | {v:.4g} | {a:.4g} to {b:.4g} |" for m, v, a, b in scores)]
    text = card.text.replace('model="None"', f'model="{name}"').replace("[None](https://huggingface.co/None)", base)
    if scores and "\n## Results\n" not in text:
        text = text.replace(
            "\n## Training procedure", "\n## Results\n\n" + "\n".join(lines) + "\n\n## Training procedure"
        )
    card.text = text
    card.save(path)
