"""Stop a run that has begun to trade sense for mutual information."""

import logging
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from .._compat import unwrap_model_for_generation
from ..core.generation import GenerationParams, TransformersEngine
from ..core.jsonl import JsonlWriter, read_jsonl
from ..core.text_metrics import distinct_2
from .scores import pair_lengths


logger = logging.getLogger(__name__)

GUARD_FILE = "guard.jsonl"


class OverOptimizationGuard(TrainerCallback):
    """Samples fresh greedy responses to a few held-out queries during training and stops at a configured limit.

    Each check is one line of `guard.jsonl` in the output folder: step, `kl` (nats per token to the original),
    `length` (mean tokens), `distinct_2`, `texts`, and `stopped` with the reason once a limit is passed. The checks
    appear in the trainer's log as `guard/kl`, `guard/length` and `guard/distinct_2`.

    Args:
        trainer: The `SAMITrainer` it watches; limits come from its config, prompts from its `eval_dataset`.

    Raises:
        ValueError: No held-out prompts, or FSDP, under which the sharded policy cannot generate here.
    """

    def __init__(self, trainer):
        dataset = trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        if dataset is None or "prompts" not in dataset.column_names:
            raise ValueError("`guard_steps` needs held-out prompts: pass an `eval_dataset` of texts, or set it to 0.")
        if trainer.is_fsdp_enabled:
            raise ValueError("`guard_steps` does not work with FSDP yet: set it to 0 and evaluate between rounds.")
        self.trainer = trainer
        self.rows = [dataset[i] for i in range(min(trainer.args.guard_num_queries, len(dataset)))]
        self.baseline_length = None

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / GUARD_FILE
        earlier = read_jsonl(path) if state.global_step > 0 and path.exists() else []
        baseline = next((record for record in earlier if record["step"] == 0), None) or self._check(state.global_step)
        self.baseline_length = baseline["length"]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.guard_steps:
            return
        reason = self._check(state.global_step).get("stopped")
        if reason:
            logger.warning("Training stopped at step %d: %s", state.global_step, reason)
            control.should_training_stop = True

    def _check(self, step: int) -> dict:
        record = self._measure(step)
        reason = self._limit_passed(record)
        if reason:
            record["stopped"] = reason
        record = broadcast_object_list([record])[0]  # all processes must agree on whether to stop
        for name in ("kl", "length", "distinct_2"):
            if name in record:
                self.trainer._metrics["train"][f"guard/{name}"] = [record[name]]
        if self.trainer.is_world_process_zero():
            with JsonlWriter(Path(self.trainer.args.output_dir) / GUARD_FILE) as writer:
                writer.append(record)
        return record

    def _measure(self, step: int) -> dict:
        trainer, args = self.trainer, self.trainer.args
        prompts = [prompt for row in self.rows for prompt in row["prompts"]]
        params = GenerationParams(max_new_tokens=args.guard_max_new_tokens)
        wrapped = trainer.model_wrapped
        with unwrap_model_for_generation(
            wrapped, trainer.accelerator, gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs
        ) as model:
            engine = TransformersEngine(model, trainer._tokenizer)
            generations = dict(engine.generate(prompts, params))
        texts = [generations[i].text for i in range(len(prompts))]
        record = {
            "step": step,
            "length": sum(generations[i].num_tokens for i in range(len(prompts))) / len(prompts),
            "distinct_2": distinct_2(texts),
            "texts": texts,
        }
        if trainer.reference is not None:
            record["kl"] = self._kl(texts, [generations[i].finish_reason == "length" for i in range(len(prompts))])
        return record

    def _kl(self, texts: list[str], truncated: list[bool]) -> float:
        tokenizer, sums, tokens = self.trainer._tokenizer, 0.0, 0
        model = self.trainer.model_wrapped
        was_training = model.training
        model.eval()
        for row in self.rows:
            c = len(row["prompts"])
            mine, texts = texts[:c], texts[c:]
            cut, truncated = truncated[:c], truncated[c:]
            completions = [
                tokenizer(text, add_special_tokens=False)["input_ids"] + ([] if is_cut else [tokenizer.eos_token_id])
                for text, is_cut in zip(mine, cut, strict=True)
            ]
            batch = self.trainer.data_collator(
                [{"prompt_input_ids": row["prompt_input_ids"], "completion_input_ids": completions}]
            )
            inputs = self.trainer._prepare_inputs(batch)
            with torch.no_grad():
                _, kl = self.trainer._score(model, inputs)
            lengths = pair_lengths(inputs)[inputs["matched"]]
            sums += (kl * lengths).sum().item()
            tokens += lengths.sum().item()
        model.train(was_training)
        return sums / tokens

    def _limit_passed(self, record: dict) -> str | None:
        args = self.trainer.args
        if args.guard_max_kl is not None and record["kl"] > args.guard_max_kl:
            return f"KL of fresh samples is {record['kl']:.3f} nats per token, above guard_max_kl={args.guard_max_kl}."
        low = args.guard_min_distinct_2
        if low is not None and record["distinct_2"] < low:
            return f"distinct-2 of fresh samples is {record['distinct_2']:.2f}, below guard_min_distinct_2={low}."
        if self.baseline_length:
            ratio = record["length"] / self.baseline_length
            for bound, passed in (
                ("guard_max_length_ratio", lambda limit: ratio > limit),
                ("guard_min_length_ratio", lambda limit: ratio < limit),
            ):
                limit = getattr(args, bound)
                if limit is not None and passed(limit):
                    return f"fresh samples are {ratio:.2f} times as long as before training, past {bound}={limit}."
        return None
