"""A module of the library `evaluate` as a scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.generation.types import Prompt
from .scorer_range import checked_range


class EvaluateScorer:
    """A number for each text from any module of the library `evaluate`, such as the measurement `toxicity`.

    Args:
        module: Path of the module's `.py` file or folder, which works offline, or its name.
        key: Which output to take. May be left out if there is one. Where the module gives one number for all texts,
            it is asked about each text alone.
        higher_is_better: Whether a higher number means a better text.
        range: The lowest and the highest number the module gives.
        input_name: What the module calls its texts. May be left out if it has one input, or `predictions`.
        config_name: Configuration of the module, if it has several.
        module_type: `"metric"`, `"measurement"` or `"comparison"`; needed for some names, never for paths.
        arguments: Further arguments of the module's `compute`, such as `{"model_id": "gpt2"}`.
        name: Key of the scores; the module's own name when left out.

    Raises:
        ValueError: The module cannot be loaded, or needs an input beside the texts; a range that is none.
    """

    def __init__(
        self,
        module: str,
        key: str | None = None,
        *,
        higher_is_better: bool,
        range: tuple[float, float] = (0.0, 1.0),
        input_name: str | None = None,
        config_name: str | None = None,
        module_type: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        name: str | None = None,
    ):
        self.range = checked_range(range)
        self._module = _load_module(module, config_name, module_type)
        self.name = name or self._module.name.replace("--", "/").split("/")[-1]
        self.higher_is_better = higher_is_better
        self.key = key
        self._input = _input_name(module, self._module, input_name)
        self._arguments = dict(arguments or {})
        self.settings: dict[str, Any] = {
            "kind": "evaluate",
            "module": str(module),
            "config_name": config_name,
            "key": key,
            "input_name": self._input,
            "arguments": self._arguments,
            "higher_is_better": higher_is_better,
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Numbers as the module gives them; prompts are not looked at.

        Raises:
            ValueError: The output `key` is not there, or is neither a number nor one for each text.
        """
        value = self._compute(completions)
        if isinstance(value, (int, float)):  # of all texts together
            value = [value] if len(completions) == 1 else [self._compute([text]) for text in completions]
        return list(value)

    def _compute(self, texts: Sequence[str]) -> Any:
        output = self._module.compute(**{self._input: list(texts)}, **self._arguments)
        key = self.key
        if key is None and isinstance(output, dict) and len(output) == 1:
            key = next(iter(output))
        if not isinstance(output, dict) or key not in output:
            given = ", ".join(map(repr, output)) if isinstance(output, dict) else type(output).__name__
            raise ValueError(f"scorer {self.name!r}: the module's output has no {key!r}; set `key` to one of: {given}")
        value = output[key]
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, str) or not isinstance(value, (int, float, Sequence)):
            raise ValueError(
                f"scorer {self.name!r}: output {key!r} is {type(value).__name__}; set `key` to one with numbers, of: "
                f"{', '.join(map(repr, output))}"
            )
        return value


def _load_module(module: str, config_name: str | None, module_type: str | None) -> Any:
    import evaluate

    try:
        # In memory: two runs on one machine would otherwise wait for each other's cache file
        return evaluate.load(str(module), config_name, module_type=module_type, keep_in_memory=True)
    except Exception as error:  # of many kinds: no network, no such module, a package that it imports
        reason = " ".join(str(error).split())
        raise ValueError(
            f"evaluate module {module}: it cannot be loaded ({type(error).__name__}: {reason:.200}); give the path of "
            "its .py file, or a name that the hub knows"
        ) from error


def _input_name(path: str, module: Any, name: str | None) -> str:
    features = module.features if isinstance(module.features, list) else [module.features]
    names = list(features[0])
    name = name or (names[0] if len(names) == 1 else "predictions")
    if name not in names:
        raise ValueError(f"evaluate module {path}: it has no input {name!r}; set `input_name` to one of {names}")
    needed = [other for other in names if other != name]
    if needed:
        raise ValueError(
            f"evaluate module {path}: it needs {needed} beside the texts; a scorer has only texts to give, so use a "
            "module that measures them alone, or a function of your own"
        )
    return name
