"""A constitution absorbed: a model trained, without one in its prompt, towards itself with the desired one.

The teacher is the model as it is before, with every principle's definition in its prompt; the student the same model
asked the bare query. On responses of the teacher the loss is KL(teacher || student) over the vocabulary, in nats per
response token: forward, because sum over t of KL(teacher_t || student_t) on the teacher's own samples is, by the chain
rule, an estimate of KL between whole responses, for which the reverse would need the student's samples.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset

from ..core.generation.sampling import SamplingReport, as_prompt, completion_text, load_outputs, sample_outputs
from ..core.generation.types import Generation, GenerationEngine, GenerationParams
from ..core.inputs import Query
from ..core.modeling.batches import free_memory
from ..core.modeling.chunked import chunked_kl
from ..core.modeling.head import output_head
from ..core.runs.report import write_atomically
from ..core.training.load import as_config
from .checks import disobeys, obedience
from .config import SAMIConfig
from .data import render, to_dataset
from .principles import Principle, sample_constitutions
from .sampling import ResponseFilters, rejection_reason
from .scores import matched_states, pair_lengths
from .trainer import SAMITrainer


logger = logging.getLogger(__name__)


class AbsorbTrainer(SAMITrainer):
    """`SAMITrainer` on rows of one response: `prompts` are the teacher's (with the constitution) and the student's
    (without), and `completions` holds the response twice, as that class wants one for each prompt.

    The teacher has the weights that `SAMITrainer` measures KL to: those before the first update, of an adapter that is
    trained on a frozen copy. The loss of a step, and `eval_loss`, are means over its response tokens (nats).
    """

    def __init__(self, model, args=None, **kwargs):
        args = copy.copy(as_config(args, SAMIConfig, model, "absorb"))
        args.log_kl, args.score_end, args.guard_steps, args.guard_max_kl = True, True, 0, None
        args.preserve_weight = 0.0
        super().__init__(model, args, **kwargs)

    def _prepare_dataset(self, *args, **kwargs):
        dataset = super()._prepare_dataset(*args, **kwargs)
        # Pair 0 is then the response behind the teacher's prompt, "matched", and pair 1 that behind the student's
        return dataset.map(lambda row: {"completion_input_ids": row["completion_input_ids"][:1]})

    def count_items(self, batch):
        return int(pair_lengths(batch)[batch["matched"]].sum())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher = self._reference_states(model, matched_states, inputs)
        assert teacher is not None  # as `log_kl` is set
        lengths = pair_lengths(inputs)[inputs["matched"]]

        def forward(policy):
            states = matched_states(policy, inputs | {"matched": ~inputs["matched"]})
            kl = chunked_kl(states, output_head(policy, states), teacher.states, teacher.head, reverse=False)
            return kl.sum(), torch.stack([own.sum() for own in kl.detach().split(lengths.tolist())])

        total, sums = self._policy_forward(model, forward)
        self.record({"loss": (sums, lengths.to(sums.device))}, tokens=inputs["attention_mask"])
        loss = self.step_loss(total, int(lengths.sum()))
        return (loss, {"losses": sums}) if return_outputs else loss


def desired_constitutions(principles: Sequence[Principle], *, seed: int, key: str) -> tuple[str, str]:
    """Every principle's definition in two orders (and wordings), which differ unless there is only one: to sample
    under, and for the teacher's prompt."""
    draws = (
        sample_constitutions(principles, 2, seed=seed, key=key, purpose=f"absorb {n}", pairs="desired")[0].text
        for n in range(30)
    )
    first = next(draws)
    return first, next((other for other in draws if other != first), first)


def sample_desired(
    engine: GenerationEngine, queries: Sequence[Query], principles: Sequence[Principle], params: GenerationParams,
    output: Path, *, template: str, conversational: bool, seed: int, model: str | None = None,
) -> SamplingReport:  # fmt: skip
    """One response to each query under the desired constitution; see `core.generation.sampling.sample_outputs`."""
    prompted = []
    for query in queries:
        constitution, _ = desired_constitutions(principles, seed=seed, key=query.id)
        prompted.append(Query(query.id, template.format(query=query.text, constitution=constitution)))
    return sample_bare(engine, prompted, params, output, conversational=conversational, model=model)


def sample_bare(
    engine: GenerationEngine, queries: Sequence[Query], params: GenerationParams, output: Path, *,
    conversational: bool, model: str | None = None,
) -> SamplingReport:  # fmt: skip
    """One response to each query as it stands, of a chat to its last message."""
    queries, random_ = [Query(query.id, query.text) for query in queries], bool(params.temperature)
    how: dict[str, Any] = {"greedy": not random_, "num_samples": int(random_)}
    return sample_outputs(engine, queries, params, output, conversational=conversational, model=model, **how)


def absorb_rows(
    outputs: Sequence[dict[str, Any]], queries: Sequence[Query], principles: Sequence[Principle], *,
    template: str, conversational: bool, seed: int, filters: ResponseFilters,
) -> Dataset:  # fmt: skip
    """Rows for `AbsorbTrainer` of those outputs of `sample_desired` to `queries` that pass the filters; a log line
    counts the others. By `drop_disobedient` a response must pass the check of every definition."""
    rows, checks = [], {principle.name: principle.check for principle in principles}
    contrast = [dict.fromkeys(checks, side) for side in (True, False)]
    for output in outputs:
        query, text = queries[output["index"]], completion_text(output["completion"])
        sampled, other = desired_constitutions(principles, seed=seed, key=query.id)
        response = Generation(text, "length" if output["truncated"] else "stop", output["num_tokens"])
        if rejection_reason([response], [sampled], filters):
            continue
        if filters.drop_disobedient and disobeys(checks, contrast, 0, text):
            continue
        with_rules = render(template, query=query.text, constitution=other, conversational=conversational)
        prompts = [with_rules, as_prompt(Query(query.id, query.text), None, conversational)]
        row = {"id": query.id, "prompts": prompts, "completions": [output["completion"]] * 2}
        rows.append(row | {"truncated": [output["truncated"]] * 2})
    logger.info("%d of %d responses are trained on, the others fail a filter.", len(rows), len(outputs))
    return to_dataset(rows)


CASES = {
    "original": "original, no constitution", "prompted": "original, desired constitution",
    "trained": "last round, no constitution", "absorbed": "absorbed, no constitution",
}  # fmt: skip
"""What `evaluate_absorbed` samples, and what the report calls it."""


def evaluate_absorbed(
    engine_of: Callable[[str], GenerationEngine], queries: Sequence[Query], principles: Sequence[Principle],
    params: GenerationParams, folder: Path, *, template: str, conversational: bool, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Answers of each of `CASES` to held-out queries, in `eval_outputs.jsonl`, and what they obey, in
    `evaluation.json`: by case, mean `length` in tokens and `obedience`, see `checks.obedience`, of the definitions and
    beside the original's answers without a constitution."""
    output, result = folder / "eval_outputs.jsonl", dict[str, Any]()
    for name in CASES:
        how: dict[str, Any] = {"conversational": conversational, "model": name}
        if name == "prompted":
            how |= {"template": template, "seed": seed}
            sample_desired(engine_of(name), queries, principles, params, output, **how)
        else:
            sample_bare(engine_of(name), queries, params, output, **how)
        free_memory()
    outputs = load_outputs(output)
    by_case = {name: [row for row in outputs if row["model"] == name] for name in CASES}
    for name, own in by_case.items():
        obeyed = desired_obedience(own, by_case["original"], queries, principles)
        length = fmean(row["num_tokens"] for row in own)
        result[name] = {"what": CASES[name], "queries": len(own), "length": length, "obedience": obeyed}
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def desired_obedience(
    outputs: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]], queries: Sequence[Query],
    principles: Sequence[Principle],
) -> dict[str, Any]:  # fmt: skip
    """`checks.obedience` of rows of `sample_bare` or `sample_desired`, beside others `before`, to every definition."""

    def as_rows(outputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = [{principle.name: True for principle in principles}]
        found = [(queries[row["index"]], row["completion"]) for row in outputs]
        return [{"id": q.id, "query": q.text, "choices": asked, "completions": [own]} for q, own in found]

    return obedience(principles, as_rows(outputs), as_rows(before))
