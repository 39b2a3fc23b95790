"""What is compared: each case runs a few ways of doing one thing beside each other, on models of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from . import paths_labels, paths_sami, paths_tnt, paths_w2s
from .measure import Step
from .models import Size, backbone_parameters, clear_gradients, head_parameters, make_classifier, make_model


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
        size = size or Size()
        run = _against_original(size, self.frozen_head, paths_tnt.make_batch(4, 256, size.vocabulary))
        return {path: partial(run, paths_tnt.PATHS[path]) for path in paths}

    def floor(self) -> int:
        """As for SAMI, plus two per token and weight of the original; a frozen head has no gradient of its own."""
        batch = paths_tnt.make_batch(4, 256, 128)
        backbone, head = _weights(Size())
        return 8 * batch.tokens * backbone + (6 if self.frozen_head else 8) * batch.scored_tokens * head


@dataclass(frozen=True)
class SharedPromptCase:
    """A TNT step on four samples of one prompt; the paths are with and without computing that four times."""

    prompt: int
    paths: tuple[str, ...] = ("apart", "shared")
    group = "shared"

    @property
    def name(self) -> str:
        return f"TNT, 4 samples of a prompt of {self.prompt}"

    def steps(self, paths: Sequence[str], size: Size | None = None) -> dict[str, Step]:
        """A step by path, on one pair of models."""
        size = size or Size()
        run = _against_original(size, False, paths_tnt.make_samples(4, self.prompt, RESPONSE, size.vocabulary))
        return {path: partial(run, paths_tnt.PATHS[path]) for path in paths}


@dataclass(frozen=True)
class WeakToStrongCase:
    """A step on a weak model's token distributions, 4 texts of 128 + 128 tokens; the paths are the ways to do it."""

    frozen_head: bool
    paths: tuple[str, ...] = ("dense", "ours", "TRL's kernel")
    group = "w2s"

    @property
    def name(self) -> str:
        return f"Weak-to-strong, {'frozen' if self.frozen_head else 'trained'} head"

    def steps(self, paths: Sequence[str], size: Size | None = None) -> dict[str, Step]:
        """A step by path, on one pair of models."""
        size = size or Size()
        run = _against_original(size, self.frozen_head, paths_w2s.make_batch(4, 128, 128, size.vocabulary))
        return {path: partial(run, paths_w2s.PATHS[path]) for path in paths}


@dataclass(frozen=True)
class LabelsCase:
    """Labelling 96 texts with a classifier; the paths are the ways to batch them."""

    paths: tuple[str, ...] = ("in file order", "ours")
    group = "labels"
    name = "Labelling 96 texts"

    def steps(self, paths: Sequence[str], size: Size | None = None) -> dict[str, Step]:
        """A pass by path, on one model."""
        size = size or Size()
        model, texts = make_classifier(size), paths_labels.make_texts(96, size.vocabulary)
        return {path: partial(paths_labels.PATHS[path], model, texts) for path in paths}


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
        batches = {path: paths_tnt.make_batch(4, 256, own.vocabulary) for path, own in sizes.items()}
        return {path: partial(_against_original(sizes[path], False, batches[path]), paths_tnt.ours) for path in paths}


Case = SamiCase | TntCase | SharedPromptCase | WeakToStrongCase | LabelsCase | SamiGrowth | TntGrowth


def all_cases() -> list[Case]:
    """The full set, those with a target first."""
    with_sft = SamiCase(2, 200, ("plain", "ours", "SFT", "SFT at labels", "SFT of matching pairs"))
    first = [with_sft, TntCase(False), SamiCase(4, 200), SamiCase(4, 450), TntCase(True), SamiCase(3, 200)]
    second = [SamiCase(2, 64), SamiCase(2, 450), SamiCase(3, 64), SamiCase(4, 64), SamiCase(3, 450)]
    others = [SharedPromptCase(200), SharedPromptCase(450), WeakToStrongCase(False), WeakToStrongCase(True)]
    return [*first, *second, *others, LabelsCase(), SamiGrowth(), TntGrowth()]


def quick_cases() -> list[Case]:
    """A few that take two minutes on one core."""
    return [SamiCase(2, 64), TntCase(False)]


def _sami(model: nn.Module, path: Callable, query: paths_sami.Query):
    clear_gradients(model)
    return path(model, query)


def _against_original(size: Size, frozen_head: bool, batch: Any) -> Callable:
    """Runs a path on a trained model, a frozen one and a batch."""
    policy, original = make_model(size, 0, frozen_head=frozen_head), make_model(size, 1).requires_grad_(False).eval()

    def run(path: Callable):
        clear_gradients(policy)
        return path(policy, original, batch)

    return run


def _weights(size: Size) -> tuple[int, int]:
    """Weights of the backbone and of the head, of a model that is never allocated."""
    with torch.device("meta"):
        model = make_model(size)
    return backbone_parameters(model), head_parameters(model)
