"""The engines of a run, loaded when they are first needed and once where they are the same."""

from __future__ import annotations

from dataclasses import replace

from ..core.generation import EngineSpec, create_engine, parse_engine
from ..core.generation.types import GenerationEngine
from .config import CodecLMConfig


class Engines:
    """What `strong`, `target`, `scorer` and `judge` stand for.

    Args:
        config: The first three settings.
        model: The target where none is set: the model that is trained.
        judge: The fourth; the scorer if left out.

    Raises:
        ValueError: A setting that cannot be read, or no strong model.
    """

    def __init__(self, config: CodecLMConfig, model: str | None = None, judge: str | None = None):
        if not config.strong:
            raise ValueError("`strong` is missing: name the model that writes instructions, see the docs.")
        scorer = config.scorer or config.strong
        own = {"strong": config.strong, "target": config.target or model, "scorer": scorer, "judge": judge or scorer}
        self.specs: dict[str, EngineSpec] = {
            role: _resolved(parse_engine(value, role)) for role, value in own.items() if value
        }
        self._built: list[tuple[EngineSpec, GenerationEngine]] = []

    @property
    def prices(self) -> dict[str, tuple[float, float]]:
        """By role: of a million tokens read, and a million written."""
        return {role: spec.prices for role, spec in self.specs.items()}

    def build(self, role: str) -> GenerationEngine:
        """The engine of a role."""
        spec = self.specs[role]
        for other, engine in self._built:
            if other.arguments == spec.arguments:
                return engine
        engine = create_engine(spec.arguments)
        self._built.append((spec, engine))
        return engine


def _resolved(spec: EngineSpec) -> EngineSpec:
    """With the embedded model's path in place of its alias, so that the two are one engine."""
    from ..embedded import resolve_model_name

    arguments = spec.arguments
    if arguments.engine == "endpoint" or not arguments.engine_model:
        return spec
    return replace(spec, arguments=replace(arguments, engine_model=resolve_model_name(arguments.engine_model)))
