"""Stop a run that has begun to trade sense for mutual information."""

import logging
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from .._compat import unwrap_model_for_generation
from ..core.generation import TransformersEngine
from ..core.generation.types import Generation, GenerationParams
from ..core.runs.jsonl import JsonlWriter, read_jsonl
from ..core.text import distinct_2, exact_match
from ..core.training.encoding import encode_completion, end_token_id
from .evaluation import load_references, score_completions


logger = logging.getLogger(__name__)


class OverOptimizationGuard(TrainerCallback):
    """Samples fresh greedy responses to a few held-out queries during training and stops at a configured limit.

    Limits come from the config of the `SAMITrainer` it watches, prompts from its `eval_dataset`. Each check is a line
    of `guard.jsonl` in the output folder: step, `kl` (nats per token to the original), `length` (mean tokens),
    `distinct_2`, `texts`, and `stopped` with the reason once a limit is passed; and in the log as `guard/...`. With
    `guard_references` also what else moved: `plain_texts`, answers to their prompts without a constitution, the share
    of them `unchanged` since before the first step, `reference_nats` (per token) and their relative
    `reference_change`. Under FSDP, where the sharded policy cannot generate here, and without held-out prompts it
    raises a `ValueError`.
    """

    def __init__(self, trainer):
        held_out = trainer.eval_dataset
        dataset = next(iter(held_out.values())) if isinstance(held_out, dict) else held_out
        if dataset is None or "prompts" not in dataset.column_names:
            raise ValueError("`guard_steps` needs held-out prompts: pass an `eval_dataset` of texts, or set it to 0.")
        if trainer.is_fsdp_enabled:
            raise ValueError("`guard_steps` does not work with FSDP yet: set it to 0 and evaluate between rounds.")
        self.trainer = trainer
        self.rows = [dataset[i] for i in range(min(trainer.args.guard_num_queries, len(dataset)))]
        self.first: dict = {}
        self.references, args = [], trainer.args
        if args.guard_references:
            conversational = trainer._tokenizer.chat_template is not None
            self.references = load_references(args.guard_references, conversational)[: 4 * args.guard_num_queries]
        elif args.guard_min_unchanged is not None or args.guard_max_reference_change is not None:
            raise ValueError(
                "`guard_min_unchanged` and `guard_max_reference_change` need `guard_references`: name it."
            )
        self.path = Path(trainer.args.output_dir) / "guard.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        first = broadcast_object_list([self._first_record(state.global_step)])[0]
        self.first = first or self._check(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.guard_steps:
            return
        if reason := self._check(state.global_step).get("stopped"):
            logger.warning("Training stopped at step %d: %s", state.global_step, reason)
            control.should_training_stop = True

    def _first_record(self, step: int) -> dict | None:
        """The check before the first step, if this run resumes one that made it; asked of the main process only."""
        if not self.trainer.is_world_process_zero() or not self.path.exists():
            return None
        if step:
            first = next((record for record in read_jsonl(self.path) if record["step"] == 0), {})
            if [len(first.get(name, ())) for name in ("texts", "plain_texts")] == list(map(len, self._prompts())):
                return first
            logger.warning("%s begins with other prompts: from here on limits compare with step %d.", self.path, step)
            return None
        # An attempt that left no checkpoint to go on from
        number = len(list(self.path.parent.glob("guard.abandoned-*.jsonl"))) + 1
        self.path.replace(self.path.with_name(f"guard.abandoned-{number}.jsonl"))
        return None

    def _check(self, step: int) -> dict:
        record = self._measure(step)
        if step and (reason := self._limit_passed(record)):
            record["stopped"] = reason
        record = broadcast_object_list([record])[0]  # all processes must agree on whether to stop
        watched = ("kl", "length", "distinct_2", "unchanged", "reference_change")
        for name in (name for name in watched if record.get(name) is not None):
            self.trainer._metrics["train"][f"guard/{name}"] = [record[name]]
        if self.trainer.is_world_process_zero():
            with JsonlWriter(self.path) as writer:
                writer.append(record)
        return record

    def _prompts(self) -> tuple[list, list]:
        """Those with constitutions, and those without."""
        plain = [row["prompt"] for row in self.references[: self.trainer.args.guard_num_queries]]
        return [prompt for row in self.rows for prompt in row["prompts"]], plain

    def _measure(self, step: int) -> dict:
        trainer, args, (prompts, plain) = self.trainer, self.trainer.args, self._prompts()
        params = GenerationParams(max_new_tokens=args.guard_max_new_tokens, stop=tuple(args.guard_stop or ()))
        checkpointing = {"gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs}
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **checkpointing) as model:
            generated = dict(TransformersEngine(model, trainer._tokenizer).generate([*prompts, *plain], params))
            # Scored while the parameters of a sharded model are gathered
            scores = score_completions(model, trainer._tokenizer, self.references, measure_kl=False) if plain else []
        answers = [generated[i] for i in range(len(prompts))]
        texts = [answer.text for answer in answers]
        length = fmean(answer.num_tokens for answer in answers)
        record = {"step": step, "length": length, "distinct_2": distinct_2(texts), "texts": texts}
        if plain:
            record |= self._second_axis([generated[len(prompts) + i].text for i in range(len(plain))], scores)
        if trainer.reference is not None:
            kl = self._kl(iter(answers))
            record["kl"] = kl if math.isfinite(kl) else None
        return record

    def _kl(self, answers: Iterator[Generation]) -> float:
        """Mean over queries of KL to the original on fresh samples, nats per response token."""
        trainer, tokenizer, values = self.trainer, self.trainer._tokenizer, []
        for row in self.rows:
            end_id = end_token_id(tokenizer, not isinstance(row["prompts"][0], str))
            completions = [
                encode_completion(tokenizer, answer.text, end_id, truncated=answer.finish_reason == "length")
                for answer in islice(answers, len(row["prompts"]))
            ]
            inputs = trainer._prepare_inputs(trainer.data_collator([row | {"completion_input_ids": completions}]))
            values.append(trainer.row_statistics(trainer.model_wrapped, inputs)["kl"].item())
        return fmean(values)

    def _second_axis(self, texts: list[str], scores: list[dict[str, float]]) -> dict:
        nats = -sum(score["logp"] for score in scores) / sum(score["tokens"] for score in scores)
        before = self.first.get("plain_texts", texts), self.first.get("reference_nats") or nats
        moved = {"unchanged": exact_match(before[0], texts), "reference_change": nats / before[1] - 1}
        known = {name: value if math.isfinite(value) else None for name, value in moved.items()}
        return {"plain_texts": texts, "reference_nats": nats if math.isfinite(nats) else None} | known

    def _limit_passed(self, record: dict) -> str | None:
        if not any(text.strip() for text in record["texts"]):
            return "every fresh sample is empty."
        ratio = record["length"] / self.first["length"] if self.first.get("length") else math.nan
        longer = "fresh samples are {:.2f} times as long as before training"
        measured = {
            "guard_max_kl": (record.get("kl"), "KL of fresh samples is {:.3f} nats per token"),
            "guard_min_distinct_2": (record["distinct_2"], "distinct-2 of fresh samples is {:.2f}"),
            "guard_min_unchanged": (record.get("unchanged"), "{:.0%} of answers without a constitution are unchanged"),
            "guard_max_reference_change": (record.get("reference_change"), "nats of the references changed {:+.1%}"),
            "guard_max_length_ratio": (ratio, longer),
            "guard_min_length_ratio": (ratio, longer),
        }
        for name, (value, words) in measured.items():
            limit, most = getattr(self.trainer.args, name), "_max_" in name
            # None: not finite, which JSON does not have
            if limit is not None and (value is None or (value > limit if most else value < limit)):
                shown = words.format(math.nan if value is None else value)
                return f"{shown}, {'above' if most else 'below'} {name}={limit}."
        return None
