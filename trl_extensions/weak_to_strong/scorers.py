"""What says how good an answer of a weak model is: a number a text, by a classifier, a measurement or a phrase list.

`create_scorer` builds any of them, the judge of `judge_scorer.py` included, from what stands in a config.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..core.classifiers import TextClassifier, load_profanity_check
from ..core.generation import EngineArguments, Prompt, create_engine


class Scorer(Protocol):
    """What every scorer offers.

    Two more attributes are read where they exist: `counts` (a `Counter` of what went wrong, by kind, over all calls)
    and `failures` (of the last call: index of a text -> the raw answers out of which no score could be read).

    Attributes:
        name: Key of the scores in the rows.
        higher_is_better: Whether a higher score means a better answer.
        settings: JSON-ready values that the scores depend on; a resumed run must have the same ones.
    """

    name: str
    higher_is_better: bool
    settings: dict[str, Any]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """A number for each completion, `None` where there is none to give. `prompts[i]` is what `completions[i]`
        answers or continues; no completion is empty."""
        ...


class ProfanityScorer:
    """The probability that a text is profane, by the linear model of `alt-profanity-check`; lower is better.

    Args:
        name: Key of the scores.

    Raises:
        ImportError: `alt-profanity-check` is not installed.
    """

    higher_is_better = False

    def __init__(self, *, name: str = "profanity"):
        self.name = name
        self.settings: dict[str, Any] = {"kind": "profanity"}
        self._predict = load_profanity_check()

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Probabilities in [0, 1]; prompts are not looked at."""
        return self._predict(completions)


class ClassifierScorer:
    """The probability of one label under a sequence classifier of transformers.

    The classifier sees the completion alone, and only its first tokens if there are more than it takes.

    Args:
        model: Model id or directory.
        label: The label, as in `id2label` of the model's config. May be left out if the model has one label, or two:
            then it is the second.
        higher_is_better: Whether the label is a good one; not so for "toxic".
        batch_size: Texts scored at once.
        name: Key of the scores.

    Raises:
        ValueError: A batch size below 1, or a label that the model does not have (the message lists those it has).
        OSError: The model cannot be found.
    """

    def __init__(
        self,
        model: str,
        label: str | None = None,
        *,
        higher_is_better: bool = False,
        batch_size: int = 32,
        name: str = "classifier",
    ):
        self._classifier = TextClassifier(model, label, batch_size)
        self.name = name
        self.higher_is_better = higher_is_better
        self.settings: dict[str, Any] = {
            "kind": "classifier",
            "model": str(model),
            "label": self._classifier.label,
            "higher_is_better": higher_is_better,
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Probabilities in [0, 1]; prompts are not looked at."""
        return self._classifier.score(completions)


class EvaluateScorer:
    """A number for each text from any module of the library `evaluate`, such as the measurement `toxicity`.

    Args:
        module: Path of the module's `.py` file or folder, which works offline, or its name.
        key: Which output to take. May be left out if there is one. Where the module gives one number for all texts,
            it is asked about each text alone.
        higher_is_better: Whether a higher number means a better text.
        input_name: What the module calls its texts. May be left out if it has one input, or `predictions`.
        config_name: Configuration of the module, if it has several.
        module_type: `"metric"`, `"measurement"` or `"comparison"`; needed for some names, never for paths.
        arguments: Further arguments of the module's `compute`, such as `{"model_id": "gpt2"}`.
        name: Key of the scores; the module's own name when left out.

    Raises:
        ValueError: The module cannot be loaded, or needs an input beside the texts.
    """

    def __init__(
        self,
        module: str,
        key: str | None = None,
        *,
        higher_is_better: bool,
        input_name: str | None = None,
        config_name: str | None = None,
        module_type: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        name: str | None = None,
    ):
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


class PhraseScorer:
    """The share of phrases and regular expressions that are absent from a text; 1 means none occurs, higher is better.

    Args:
        phrases: Words and phrases. A stretch of white space in one matches any other, and one that begins or ends
            with a letter or digit does not go on with another: "cat" is not in "category".
        patterns: Regular expressions, searched for as they are.
        ignore_case: Whether case is ignored, in both.
        name: Key of the scores.

    Raises:
        ValueError: Nothing to look for, an empty phrase, or a pattern that is no regular expression.
        TypeError: A list that is a single text, or holds something else.
    """

    higher_is_better = True

    def __init__(
        self,
        phrases: Sequence[str] = (),
        patterns: Sequence[str] = (),
        *,
        ignore_case: bool = True,
        name: str = "phrases",
    ):
        for field, values in (("phrases", phrases), ("patterns", patterns)):
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise TypeError(f"`{field}` is {values!r:.60}; give a list of texts")
            if not all(value.strip() for value in values):
                raise ValueError(f"`{field}` holds an empty text; leave it out")
        if not phrases and not patterns:
            raise ValueError("scorer of kind phrases: give `phrases` or `patterns` to look for")
        self.name = name
        flags = re.IGNORECASE if ignore_case else re.NOFLAG
        self._expressions = [re.compile(_phrase_pattern(phrase), flags) for phrase in phrases]
        self._expressions += [_compile(pattern, flags) for pattern in patterns]
        self.settings: dict[str, Any] = {
            "kind": "phrases",
            "phrases": list(phrases),
            "patterns": list(patterns),
            "ignore_case": ignore_case,
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Shares in [0, 1]; prompts are not looked at."""
        number = len(self._expressions)
        return [
            sum(expression.search(text) is None for expression in self._expressions) / number for text in completions
        ]


class CallableScorer:
    """A function of your own as a scorer.

    Args:
        function: From prompts and completions (texts, as many of each) to a number or `None` for each.
        name: Key of the scores.
        higher_is_better: Whether a higher number means a better text.
        settings: JSON-ready values that the function depends on, so that a resumed run does not mix two of them.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None]],
        name: str,
        *,
        higher_is_better: bool,
        settings: Mapping[str, Any] | None = None,
    ):
        self._function = function
        self.name = name
        self.higher_is_better = higher_is_better
        self.settings: dict[str, Any] = {
            "kind": "callable",
            "higher_is_better": higher_is_better,
            **(settings or {}),
        }

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """What the function returns."""
        return self._function(prompts, completions)


def create_scorer(settings: str | Mapping[str, Any]) -> Scorer:
    """Build the scorer that a config describes.

    Args:
        settings: A dict with `kind` and the arguments of the class: `profanity` (`ProfanityScorer`), `classifier`
            (`ClassifierScorer`), `judge` (`JudgeScorer`, with `engine`, or the `model` that judges, and the `base_url`
            of the endpoint that serves it, if any), `evaluate` (`EvaluateScorer`) or `phrases` (`PhraseScorer`). As a
            text: the kind alone, or the dict in YAML (`"{kind: classifier, model: ./toxic, label: toxic}"`).

    Raises:
        ValueError: An unknown kind or argument, a missing one, or what the class refuses.
        ImportError: The kind needs a package that is not installed.
    """
    arguments = _read_settings(settings)
    kind = arguments.pop("kind")
    if kind == "judge":
        from .judge_scorer import JudgeScorer

        if "engine" not in arguments:
            arguments["engine"] = _judge_engine(arguments.pop("model", None), arguments.pop("base_url", None))
        build = JudgeScorer
    else:
        kinds = {
            "profanity": ProfanityScorer,
            "classifier": ClassifierScorer,
            "evaluate": EvaluateScorer,
            "phrases": PhraseScorer,
        }
        if kind not in kinds:
            raise ValueError(f"unknown kind of scorer {kind!r}; give one of {', '.join([*kinds, 'judge'])}")
        build = kinds[kind]
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(build).parameters)
        raise ValueError(f"scorer of kind {kind}: {error}; its arguments are {known}") from None
    return build(**arguments)


def _read_settings(settings: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(settings, str):
        import yaml

        try:
            read = yaml.safe_load(settings)
        except yaml.YAMLError:
            raise ValueError(
                f"scorer {settings!r} is not YAML; write e.g. '{{kind: phrases, phrases: [damn]}}'"
            ) from None
        settings = {"kind": read} if isinstance(read, str) else read
    if not isinstance(settings, Mapping) or not isinstance(settings.get("kind"), str):
        raise ValueError(f"scorer {settings!r}: give a kind such as 'profanity', or a dict with `kind` and arguments")
    return dict(settings)


def _judge_engine(model: str | None, base_url: str | None) -> Any:
    if not model:
        raise ValueError("scorer of kind judge: give the `model` that judges")
    engine = "endpoint" if base_url else "transformers"
    return create_engine(EngineArguments(engine=engine, engine_model=model, engine_base_url=base_url))


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


def _phrase_pattern(phrase: str) -> str:
    words = r"\s+".join(map(re.escape, phrase.split()))
    first, last = phrase.split()[0][0], phrase.split()[-1][-1]
    return (r"(?<![^\W_])" if first.isalnum() else "") + words + (r"(?![^\W_])" if last.isalnum() else "")


def _compile(pattern: str, flags: re.RegexFlag) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression ({error}); correct it") from None
