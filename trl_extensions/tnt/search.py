"""Training to a target, which the paper leaves to the reader: prompts held off the training ones for validation,
rounds of training whose `alpha` follows what is short, several scales of each round's adapter, and what is chosen.

A point is a dictionary: `round`, `steps`, `alpha`, `scale` (factor on what the adapter adds to the weights),
`reduction` and `preserved` (see `measure`) and `kl` (nats per token, or None).
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.generation.types import Prompt
from ..core.stats import wilson
from .evaluation import preservation


WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Target:
    """What a patch has to reach; None where nothing is asked."""

    reduction: float | None = None  # least share of the unwanted outputs taken off
    preserved: float | None = None  # least share of clean outputs unchanged word for word
    kl: float | None = None  # most nats per token from the original, on clean outputs

    def room(self, point: dict[str, Any]) -> dict[str, float]:
        """How far a point is inside of each limit, negative where it misses it: shares, and the share of `kl` left."""
        room = {}
        if self.reduction is not None:
            room["reduction"] = point["reduction"]["value"] - self.reduction
        if self.preserved is not None:
            room["preserved"] = point["preserved"]["value"] - self.preserved
        if self.kl is not None:
            room["kl"] = 1 - point["kl"] / self.kl
        return room

    def is_met(self, point: dict[str, Any]) -> bool:
        return min(self.room(point).values()) >= 0

    def keeps(self, point: dict[str, Any]) -> bool:
        """Whether a point changes no more than it may."""
        return all(value >= 0 for name, value in self.room(point).items() if name != "reduction")


@dataclass(frozen=True)
class MoreReport:
    """Outputs `sampled` again, of so many prompts; and how many have something unwanted, before and with them."""

    path: Path
    prompts: int
    sampled: int
    marked_before: int
    marked: int
    wanted: int

    @property
    def summary(self) -> str:
        """One line for a log, and for the report."""
        end = "enough" if self.marked >= self.wanted else "`max_more_samples` allows no more"
        return (
            f"{self.sampled} further outputs of the {self.prompts} prompts that showed something unwanted: "
            f"{self.marked} outputs have it, {self.marked_before} before, {self.wanted} wanted: {end}."
        )


def place_of(prompt: Prompt) -> float:
    """A number in [0, 1) that depends on nothing but the prompt: those below the share to hold off are held off, so
    that rows may be added, in any order, and all outputs to one prompt lie on one side."""
    own = prompt if isinstance(prompt, str) else [[message["role"], message.get("content")] for message in prompt]
    digest = hashlib.sha256(json.dumps(own).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def measure(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Both axes of a point, from the greedy outputs of original and patched model to the same validation prompts:
    `reduction` (1 - outputs with a span after / before; Wilson's interval is that of the share after) and `preserved`
    (share of the original's clean outputs unchanged word for word), each `{"value", "low", "high"}`; `outputs` and,
    with a span, `marked_before` and `marked`."""
    marked, left = (sum(bool(row["negative_spans"]) for row in rows) for rows in (before, after))
    low, high = (len(after) * bound / marked for bound in wilson(left, len(after)))
    # As one quotient: 1 - 11 / 20 falls short of 0.45 by the last bit
    reduction = {"value": (marked - left) / marked, "low": 1 - high, "high": 1 - low}
    kept = preservation(before, after)["clean"]["exact_match"]
    counts = {"outputs": len(after), "marked_before": marked, "marked": left}
    return counts | {"reduction": reduction, "preserved": kept}


def choose(points: Sequence[dict[str, Any]], target: Target) -> dict[str, Any]:
    """The point to take: of those that meet the target the one with most room on its tighter side, since validation
    rows are few; where only one side is asked for, the best on the other; where none meets it, the nearest."""
    meeting = [point for point in points if target.is_met(point)]
    if meeting and target.preserved is None and target.kl is None:
        return max(meeting, key=lambda point: point["preserved"]["value"])
    if meeting and target.reduction is None:
        return max(meeting, key=lambda point: point["reduction"]["value"])
    return max(meeting or points, key=lambda point: min(target.room(point).values()))


def next_alpha(point: dict[str, Any], target: Target) -> float:
    """`alpha` of the round behind a point: twice where too much is left, half where too much has changed."""
    short = target.reduction is not None and target.room(point)["reduction"] < 0
    if short == target.keeps(point):
        return point["alpha"] * (2.0 if short else 0.5)
    return point["alpha"]


def stopped_by(points: Sequence[dict[str, Any]], target: Target) -> tuple[str, str]:
    """What ended the search, in a word (`target`, `rounds`, `preservation`, `trade-off`) and in sentences."""
    chosen, rounds = choose(points, target), points[-1]["round"]
    if target.is_met(chosen):
        return "target", "The target was met on the validation rows."
    strongest = max(points, key=lambda point: point["reduction"]["value"])
    steps = f"{rounds} round{'s' if rounds > 1 else ''} ({points[-1]['steps']} steps)"
    if target.reduction is not None and strongest["reduction"]["value"] < target.reduction:
        most = f"no point of {steps} takes {target.reduction:.0%} off; the most is {describe(strongest)}"
        return "rounds", f"The limit on training stopped it: {most}. Give more marked outputs, or raise `max_rounds`."
    kept = [point for point in points if target.keeps(point)]
    if not kept:
        gentlest = max(points, key=lambda point: point["preserved"]["value"])
        least = f"every point of {steps} changes more than it may; the least is {describe(gentlest)}"
        return "preservation", f"What was to be preserved stopped it: {least}. Give more clean rows, or lower scales."
    off = max((point for point in points if target.reduction is None or target.room(point)["reduction"] >= 0),
              key=lambda point: min(target.room(point).values()))  # fmt: skip
    gentle = max(kept, key=lambda point: point["reduction"]["value"])
    ends = (
        f"of those that take enough off, the nearest is {describe(off)}; of those that keep enough, {describe(gentle)}"
    )
    return "trade-off", f"The trade-off stopped it, after {steps}: {ends}. More marked outputs and clean rows move it."


def describe(point: dict[str, Any]) -> str:
    """A point in a few words."""
    kl = "" if point["kl"] is None else f", {point['kl']:.4f} nats per token from the original"
    return (
        f"{point['reduction']['value']:.0%} off with {point['preserved']['value']:.0%} unchanged{kl} (round "
        f"{point['round']}, {point['steps']} steps, alpha {point['alpha']:g}, scale {point['scale']:g})"
    )


def as_json(points: Iterable[dict[str, Any]], target: Target) -> dict[str, Any]:
    """What is written to `search.json`."""
    points = list(points)
    limit, words = stopped_by(points, target)
    chosen = choose(points, target)
    return {"target": asdict(target), "stopped_by": limit, "words": words, "chosen": chosen, "points": points}


def can_scale(folder: Path) -> bool:
    """Whether a folder holds an adapter all of whose change is proportional to its matrices B: a plain LoRA."""
    if not (folder / WEIGHTS).is_file():
        return False
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    others = ("use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
    plain = config.get("bias", "none") == "none" and not any(config.get(name) for name in others)
    return config.get("peft_type") == "LORA" and plain


def scale_adapter(source: Path, target: Path, scale: float) -> None:
    """Copy a model's folder to `target`, which is replaced; what its adapter adds to the weights times `scale`."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    if scale != 1.0:
        weights = load_file(target / WEIGHTS)
        scaled = {name: value * scale if _is_b(name) else value for name, value in weights.items()}
        save_file(scaled, target / WEIGHTS, metadata={"format": "pt"})


def _is_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B" in name
