"""What a run would do, and what that would take: estimates, before anything is done."""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from ..training.encoding import encode_prompt


@dataclass
class Work:
    """What a stage does, at most: `rows` made, scored or seen in training, `steps` of an optimizer; tokens of a row
    that `model` reads (forward alone), writes, and is trained on. Without a model, rows are calls of a server at
    `prices` (of a million tokens read, and written)."""

    stage: str
    model: str
    rows: float
    read: float = 0
    written: float = 0
    trained: float = 0
    steps: float = 0
    prices: tuple[float, float] = (0, 0)


def mean_tokens(tokenizer: Any, texts: Sequence[str], *, asked: bool = True) -> float:
    """Mean number of tokens of texts, of about 200 of them that lie evenly; if `asked`, as messages of a chat."""
    some = list(texts)[:: max(1, len(texts) // 200)]
    mean = sum(map(len, tokenizer(some, add_special_tokens=False)["input_ids"])) / max(1, len(some))
    is_chat, chat = asked and tokenizer.chat_template, [{"role": "user", "content": ""}]
    return mean + (len(encode_prompt(tokenizer, chat, "a prompt")) if is_chat else 0)


def steps_of(config: Any, rows: int, processes: int = 1, counted: int | None = None) -> tuple[int, int]:
    """Optimizer steps of a training on rows, as `Trainer` counts them, and rows seen; `counted` as in `epochs`."""
    at_once, together = config.per_device_train_batch_size * processes, config.gradient_accumulation_steps
    an_epoch = max(1, math.ceil(math.ceil(rows / at_once) / together))
    epochs = config.epochs(rows if counted is None else counted)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(epochs * an_epoch)
    return steps, round(min(steps / an_epoch * rows, steps * at_once * together))


def estimate(works: Sequence[Work], models: dict[str, Any], config: Any) -> tuple[str, dict[str, Any]]:
    """The works with FLOPs, hours, their sums, and the peak of memory in training, as a table and JSON-ready.

    FLOPs of N parameters (arXiv 2001.08361): 2 N a token that is read or written, 6 N one that is trained on, 4 N with
    frozen weights under an adapter, 2 N more where activations are computed anew. Hours: FLOPs by 0.4 of the speed at
    which this machine multiplies matrices now. Bytes: 4 a weight (twice where all are trained, since a method may keep
    the original), 12 a trained one (gradient, two moments), of each token of a batch in half precision 34 times the
    hidden size a layer (arXiv 2205.05198; 2 where they are computed anew), 256 MiB for logits. `models` are by the
    names in `works`, with or without weights; `config` is the trainer's.
    """
    speed, stages, peak = functools.cache(_flops_per_second), [], 0.0
    for work in works:
        own = {name: getattr(work, name) * work.rows for name in ("read", "written", "trained")}
        own |= {"steps": work.steps, "calls": 0 if work.model else work.rows, "flops": 0.0, "hours": 0.0}
        own["money"] = (own["read"] * work.prices[0] + own["written"] * work.prices[1]) / 1e6
        if (model := models.get(work.model)) is not None:
            size, learned = (
                sum(p.numel() for p in model.parameters() if p.requires_grad >= least) for least in (0, 1)
            )
            anew, text, full = bool(config.gradient_checkpointing), model.config.get_text_config(), learned == size
            of_trained = 4 + 2 * full + 2 * anew
            dtype = getattr(torch, str(model.config.dtype).removeprefix("torch."), torch.float32)
            dtype = torch.bfloat16 if work.trained and config.bf16 else dtype
            own["flops"] = size * (2 * (own["read"] + own["written"]) + of_trained * own["trained"])
            if work.trained:
                of_token = text.num_hidden_layers * text.hidden_size * (2 if anew else 34) * (1 if config.bf16 else 2)
                batch = config.per_device_train_batch_size * work.trained * of_token
                peak = max(peak, 4 * size * (1 + full) + 12 * learned + batch + 2**28)
            own["hours"] = own["flops"] / 0.4 / speed(config.device, dtype) / 3600
        stages.append({"stage": work.stage, "rows": work.rows, **own})
    table = pd.DataFrame(stages).set_index("stage")
    table.loc["in all"] = table.sum()
    shown = table.loc[:, table.any()].map(lambda value: f"{value:,.0f}" if 10 <= value < 1e9 else f"{value:.3g}")
    note = f"Training takes about {peak / 2**30:.1f} GiB; tokens are upper bounds, hours estimates, none of servers in"
    return f"{shown.to_string()}\n{note}", {"stages": stages, "total": table.iloc[-1].to_dict(), "memory_bytes": peak}


def _flops_per_second(device: Any, dtype: torch.dtype) -> float:
    """Of a product of 256 rows and a matrix, measured over half a second."""
    number, start = 0, time.perf_counter()
    left, right = (torch.ones(rows, 2048, device=device, dtype=dtype) for rows in (256, 2048))
    while (seconds := time.perf_counter() - start) < 0.5:
        (left @ right).sum().item()
        number += 2 * 256 * 2048**2
    return number / seconds
