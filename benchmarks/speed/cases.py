"""What is compared: each case runs a few ways of doing one thing beside each other, on models of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from . import paths_sami, paths_tnt
from .measure import Step
from .models import Size, backbone_parameters, clear_gradients, head_parameters, make_model


RESPONSE = 60


@dataclass(frozen=True)
class SamiCase:
    """A SAMI step on one query, all weights trained; the paths are the ways to do it."""

    constitutions: int
    prompt: int
    paths: tuple[str, ...] = ("plain", "ours")
    group = "sami"

    @property
    def name(self) -> str:
        return f"SAMI, C = {self.constitutions}, prompt {self.prompt}"

    def steps(self, paths: Sequence[str], size: Size | None = None) -> dict[str, Step]:
        """A step by path, on one model."""
        model = make_model(size or Size())
        query = paths_sami.make_query(self.constitutions, self.prompt, RESPONSE, model.config.vocab_size)
        return {path: partial(_sami, model, paths_sami.PATHS[path], query) for path in paths}

    def floor(self) -> int:
        """FLOPs that no way of doing it can go below: six per token and weight, three products of two."""
        query = paths_sami.make_query(self.constitutions, self.prompt, RESPONSE, 128)
        backbone, head = _weights(Size())
        return 6 * (query.layout_tokens * backbone + query.scored_tokens * head)


@dataclass(frozen=True)
class TntCase:
    """A TNT step on 4 x 256 tokens; the paths are the ways to do it."""

    frozen_head: bool
    paths: tuple[str, ...] = ("dense", "ours", "distillation", "no head")
    group = "tnt"

    @property
    def name(self) -> str:
        return f"TNT, {'frozen' if self.frozen_head else 'trained'} head"

    def steps(self, paths: Sequence[str], size: Size | None = None) -> dict[str, Step]:
        """A step by path, on one pair of models."""
        run = _tnt_runner(size or Size(), self.frozen_head)
        return {path: partial(run, paths_tnt.PATHS[path]) for path in paths}

    def floor(self) -> int:
        """As for SAMI, plus two per token and weight of the original; a frozen head has no gradient of its own."""
        batch = paths_tnt.make_batch(4, 256, 128)
        backbone, head = _weights(Size())
        return 8 * batch.tokens * backbone + (6 if self.frozen_head else 8) * batch.scored_tokens * head


@dataclass(frozen=True)
class SamiGrowth:
    """Our SAMI step by the number of constitutions; the paths are those numbers."""

    prompt: int = 64
    paths: tuple[str, ...] = ("2", "4", "6", "8")
    group = "growth"
    name = "SAMI by number of constitutions"

    def steps(self, paths: Sequence[str], size: Size | None = None) -> dict[str, Step]:
        """A step by number of constitutions, on one model."""
        model = make_model(size or Size())
        queries = {c: paths_sami.make_query(int(c), self.prompt, RESPONSE, model.config.vocab_size) for c in paths}
        return {c: partial(_sami, model, paths_sami.ours, query) for c, query in queries.items()}


@dataclass(frozen=True)
class TntGrowth:
    """Our TNT step by the size of the vocabulary; the paths are those sizes."""

    paths: tuple[str, ...] = ("8192", "32768", "65536", "152064")
    group = "growth"
    name = "TNT by vocabulary"

    def steps(self, paths: Sequence[str], size: Size | None = None) -> dict[str, Step]:
        """A step by vocabulary, each on models of its own."""
        sizes = {path: size or Size(vocabulary=int(path)) for path in paths}
        return {path: partial(_tnt_runner(own, False), paths_tnt.ours) for path, own in sizes.items()}


Case = SamiCase | TntCase | SamiGrowth | TntGrowth


def all_cases() -> list[Case]:
    """The full set, those with a target first."""
    with_sft = SamiCase(2, 200, ("plain", "ours", "SFT", "SFT at labels", "SFT of matching pairs"))
    first = [with_sft, TntCase(False), SamiCase(4, 200), SamiCase(4, 450), TntCase(True), SamiCase(3, 200)]
    second = [SamiCase(2, 64), SamiCase(2, 450), SamiCase(3, 64), SamiCase(4, 64), SamiCase(3, 450)]
    return [*first, *second, SamiGrowth(), TntGrowth()]


def quick_cases() -> list[Case]:
    """A few that take two minutes on one core."""
    return [SamiCase(2, 64), TntCase(False)]


def _sami(model: nn.Module, path: Callable, query: paths_sami.Query):
    clear_gradients(model)
    return path(model, query)


def _tnt_runner(size: Size, frozen_head: bool) -> Callable:
    policy, original = make_model(size, 0, frozen_head=frozen_head), make_model(size, 1).requires_grad_(False).eval()
    batch = paths_tnt.make_batch(4, 256, size.vocabulary)

    def run(path: Callable):
        clear_gradients(policy)
        return path(policy, original, batch)

    return run


def _weights(size: Size) -> tuple[int, int]:
    """Weights of the backbone and of the head, of a model that is never allocated."""
    with torch.device("meta"):
        model = make_model(size)
    return backbone_parameters(model), head_parameters(model)
