"""How fluent answers are: their perplexity under a model that none of the training touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...core.generation import TransformersEngine
from ...core.generation.types import Prompt
from ...core.modeling.batches import eval_mode, in_batches
from ...core.modeling.chunked import token_logps
from ...core.modeling.head import last_hidden_states, output_head
from ...core.stats import bootstrap
from ...core.training.encoding import encode_prompt, pad_rows


class FluencyScorer:
    """Scores answers by the nats per token that a model needs for them behind their prompts; lower is more fluent."""

    name, higher_is_better, range = "nats_per_token", False, (0.0, math.inf)

    def __init__(self, engine: TransformersEngine):
        self.model, self.tokenizer, self.batch_tokens = engine.model, engine.tokenizer, engine.batch_tokens
        self.settings = {"kind": "fluency", "model": engine.name}

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """A number for each completion; None where it has no tokens."""
        heads = [encode_prompt(self.tokenizer, prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        tails = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
        rows = [[*head, *tail] for head, tail in zip(heads, tails, strict=True)]
        found: list[float | None] = [None] * len(rows)
        with eval_mode(self.model), torch.inference_mode():
            for places in in_batches(list(map(len, rows)), self.batch_tokens, "Fluency", progress=False):
                ids = pad_rows([rows[i] for i in places], 0)
                mask = pad_rows([[1] * len(rows[i]) for i in places], 0)
                own = [[0] * len(heads[i]) + [1] * len(tails[i]) for i in places]
                scored = pad_rows(own, 0)[:, 1:].bool()
                device = self.model.device
                states = last_hidden_states(self.model, input_ids=ids.to(device), attention_mask=mask.to(device))
                states = states[:, :-1][scored.to(device)]
                logps = token_logps(states, output_head(self.model, states), ids[:, 1:][scored].to(device)).cpu()
                for place, values in zip(places, logps.split([len(tails[i]) for i in places]), strict=True):
                    found[place] = -values.mean().item() if len(values) else None
        return found


def compare_fluency(nats: Mapping[str, Sequence[Sequence[float | None]]], base: str | None) -> dict[str, Any]:
    """Perplexities of several models' answers to the same prompts.

    Args:
        nats: Model -> nats per token `(P, n)` of n answers to P prompts, None for an empty one.
        base: The model that others are compared with, or None.

    Returns:
        JSON-ready, model -> `value`, `low`, `high`: the exponential of the mean over answers, with a 95 % bootstrap
        interval over prompts; `ratio`, the same over the base's, paired by prompt; and `empty`, the share of answers
        without text, which no perplexity speaks of. Values are None where there is no answer with text.
    """
    sums = {name: _sums(rows) for name, rows in nats.items()}

    def log_perplexity(name: str, times: np.ndarray) -> np.ndarray:
        total, count = (times @ sums[name]).T
        return np.divide(total, count, out=np.full(len(times), np.nan), where=count > 0)

    found: dict[str, Any] = {}
    for name, rows in nats.items():
        everything = sum(map(len, rows))
        found[name] = _exponentials(lambda times, name=name: log_perplexity(name, times), len(rows))
        found[name]["empty"] = 1 - sums[name][:, 1].sum() / everything
        if base is not None and name != base:
            found[name]["ratio"] = _exponentials(
                lambda times, name=name: log_perplexity(name, times) - log_perplexity(base, times), len(rows)
            )
    return found


def _sums(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Nats and number of the answers with text, `(P, 2)`."""
    texts = [[value for value in row if value is not None] for row in rows]
    return np.array([[sum(row), len(row)] for row in texts], dtype=float)


def _exponentials(logarithm: Any, prompts: int) -> dict[str, Any]:
    value = float(logarithm(np.ones((1, prompts)))[0])
    if math.isnan(value):
        return {"value": None, "low": None, "high": None}
    low, high = bootstrap(logarithm, prompts) if prompts > 1 else (None, None)
    return {"value": math.exp(value)} | {
        name: None if bound is None else math.exp(bound) for name, bound in (("low", low), ("high", high))
    }
