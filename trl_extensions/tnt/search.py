"""Training to a target, which the paper leaves to the reader: prompts held off the training ones for validation,
rounds of training whose `alpha` follows what is short, several scales of each round's adapter, and what is chosen.

A point is a dictionary: `round`, `steps`, `alpha`, `scale` (factor on what the adapter adds to the weights),
`reduction` and `preserved` (see `measure`) and `kl` (nats per token, or None).
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
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
        limits = {"reduction": self.reduction, "preserved": self.preserved}
        room = {name: point[name]["value"] - least for name, least in limits.items() if least is not None}
        return room if self.kl is None else room | {"kl": 1 - point["kl"] / self.kl}

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
    if target.is_met(choose(points, target)):
        return "target", "The target was met on the validation rows."
    enough = [point for point in points if target.room(point).get("reduction", 0) >= 0]
    kept = [point for point in points if target.keeps(point)]
    after = f", after {points[-1]['round']} rounds ({points[-1]['steps']} steps)"
    if not enough:
        strongest = max(points, key=lambda point: point["reduction"]["value"])
        most = f"no point takes {target.reduction:.0%} off; the most is {describe(strongest)}"
        return "rounds", f"The limit on training stopped it{after}: {most}. Mark more outputs, or raise `max_rounds`."
    nearest = max(enough, key=lambda point: min(target.room(point).values()))
    ends = f"of points that take enough off, the nearest is {describe(nearest)}"
    if not kept:
        ends += "; none keeps enough. Give more clean rows, or lower `scales`"
        return "preservation", f"What was to be preserved stopped it{after}: {ends}."
    gentle = max(kept, key=lambda point: point["reduction"]["value"])
    ends += f"; of those that keep enough, {describe(gentle)}"
    return "trade-off", f"The trade-off stopped it{after}: {ends}. More marked outputs and clean rows move it."


def describe(point: dict[str, Any]) -> str:
    """A point in a few words."""
    kl = "" if point["kl"] is None else f", {point['kl']:.4f} nats per token from the original"
    return (
        f"{point['reduction']['value']:.0%} off with {point['preserved']['value']:.0%} unchanged{kl} (round "
        f"{point['round']}, {point['steps']} steps, alpha {point['alpha']:g}, scale {point['scale']:g})"
    )


def as_json(points: Sequence[dict[str, Any]], target: Target) -> dict[str, Any]:
    """What is written to `search.json`."""
    found = dict(zip(("stopped_by", "words"), stopped_by(points, target), strict=True))
    return {"target": asdict(target), **found, "chosen": choose(points, target), "points": points}


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
        factors = {name: scale if ".lora_B." in name or ".lora_embedding_B" in name else 1.0 for name in weights}
        scaled = {name: value * factors[name] for name, value in weights.items()}
        save_file(scaled, target / WEIGHTS, metadata={"format": "pt"})
