"""What `preserve_weight` keeps and what it costs, on one CPU core: SAMI on the last third of a model's layers.

Takes a folder that `sami_sweep.py` has sampled into (`OUTPUT/original-NAME`) and trains for each point

    python benchmarks/sami_preserve.py --samples runs/sami_sweep/original-principles --principles principles.yaml \
        --points 2e-4:8:8:30 6e-4:10:8:100 5e-4:32:4:10 --output runs/sami_preserve

(learning rate : steps : queries a step : preserve weight) a LoRA adapter with the loss of `SAMITrainer`. What lies
below the adapted layers never changes, so its states are computed once, in bfloat16; the layers above run in float32,
since in bfloat16 states that hardly moved are 3e-4 nats a token apart. "Unchanged" are the held-out answers without a
constitution of which every token is still the likeliest one. A line of `points.jsonl` a point.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sami_sweep import lora_targets, training_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.sampling import completion_text, load_outputs
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.modeling.chunked import chunked_kl, dense_kl, token_logps
from trl_extensions.core.modeling.head import output_head
from trl_extensions.core.modeling.shared_prefix import attention_mask, states_before
from trl_extensions.core.runs.jsonl import JsonlWriter
from trl_extensions.core.training.encoding import encode_completion, encode_prompt, end_token_id
from trl_extensions.embedded import resolve_model_name
from trl_extensions.sami.checks import obedience
from trl_extensions.sami.collator import DataCollatorForSAMI
from trl_extensions.sami.data import load_rows, prepare_rows, to_dataset
from trl_extensions.sami.principles import load_principles
from trl_extensions.sami.scores import pair_lengths, plain_inputs, rows_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--principles", required=True)
    parser.add_argument("--points", nargs="+", required=True)
    parser.add_argument("--num_prompts", type=int, default=64, help="training queries, whose rows pass their checks")
    parser.add_argument("--num_eval_prompts", type=int, default=48)
    parser.add_argument("--num_plain", type=int, default=64)
    parser.add_argument("--samples_per_query", dest="samples_", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


class Halves:
    """A model cut below its last third: `below` gives states that no adapter changes, `above` what comes of them."""

    def __init__(self, model, first: int):
        self.model, self.first = model, first

    def _run(self, layers, states, mask, positions):
        rotary = self.model.model.rotary_emb(states, positions)
        for layer in layers:
            states = layer(states, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return states

    def below(self, ids, mask, positions):
        layers = self.model.model.layers[: self.first]
        return self._run(layers, self.model.model.embed_tokens(ids), mask, positions)

    def above(self, states, mask, positions):
        return self.model.model.norm(self._run(self.model.model.layers[self.first :], states, mask, positions))

    def scored(self, batch: dict) -> torch.Tensor:
        """States before the response tokens of a batch of `cached`."""
        hidden = self.above(batch["below"], batch["mask"], batch["position_ids"])
        return states_before(hidden, batch["pair_ids"], batch["attention_mask"], batch["pair_ids"] >= 0)


@torch.no_grad()
def cached(batch: dict, lower: Halves) -> dict:
    mask = attention_mask(batch["pair_ids"], batch["attention_mask"], lower.model)
    below = lower.below(batch["input_ids"], mask, batch["position_ids"]).float()
    return batch | {"mask": mask, "below": below}


@torch.no_grad()
def plain_answers(upper: Halves, answers: list[tuple[list[int], list[int]]], kept: dict) -> tuple[list[bool], float]:
    """Of each answer whether greedy decoding would still write it, and mean KL to the first call's model."""
    same, kls = [], []
    for place, (prompt, answer) in enumerate(answers):
        ids = torch.tensor([prompt + answer])
        positions = torch.arange(ids.size(1))[None]
        mask = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()[None, None]
        below = kept.setdefault(("below", place), upper.below(ids, mask, positions))
        logits = upper.model.lm_head(upper.above(below, mask, positions)[0, len(prompt) - 1 : -1])
        kls.append(dense_kl(logits, kept.setdefault(("logits", place), logits), reverse=False))
        same.append(bool((logits.argmax(-1) == ids[0, len(prompt) :]).all()))
    return same, torch.cat(kls).mean().item()


def complementary(rows: list[dict], number: int) -> list[dict]:
    """Held-out queries under two constitutions each that differ in every principle."""
    picked = []
    for place, row in enumerate(rows[:number]):
        first = place % len(row["choices"])
        other = row["choices"].index({name: not own for name, own in row["choices"][first].items()})
        pair = {n: [row[n][first], row[n][other]] for n in ("choices", "prompts", "constitutions")}
        picked.append({"id": row["id"], "query": row["query"]} | pair)
    return picked


def sample(engine: TransformersEngine, rows: list[dict], max_new_tokens: int) -> list[dict]:
    made = dict(engine.generate([own for row in rows for own in row["prompts"]], GenerationParams(max_new_tokens)))
    texts = iter(made[place].text for place in range(len(made)))
    return [row | {"completions": [next(texts) for _ in row["prompts"]]} for row in rows]


def train(upper: Halves, head, batches: list[tuple[dict, dict]], parameters, point: tuple) -> list[dict]:
    rate, steps, size, weight = point
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, 0, steps)
    number, log = 0, []
    for _ in range(steps):
        entry = {"loss": 0.0, "contrast_per_token": 0.0, "kl_plain": 0.0}
        for _ in range(size // 4):
            (main, plain), number = batches[number % len(batches)], number + 1
            scored, lengths = main["pair_ids"] >= 0, pair_lengths(main)
            tokens = token_logps(upper.scored(main), head, main["input_ids"][scored])
            logps = torch.zeros(len(lengths)).index_add(0, main["pair_ids"][scored], tokens) / lengths
            losses, found = rows_of(logps, None, main, 0.0, reduction="mean")
            kl = chunked_kl(upper.scored(plain), head, plain["reference"], head, reverse=False).mean()
            ((losses.mean() + weight * kl) / (size // 4)).backward()
            values = losses.mean(), found["mi/contrast_per_token"].mean(), kl
            for name, value in zip(entry, values, strict=True):
                entry[name] += value.item() / (size // 4)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append(entry)
    return log


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    principles, path = load_principles(args.principles), resolve_model_name(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    small, full = (AutoModelForCausalLM.from_pretrained(path, dtype=d).eval() for d in (torch.bfloat16, torch.float32))
    first = full.config.num_hidden_layers - full.config.num_hidden_layers // 3
    head, lower, upper = output_head(full, torch.zeros(1)), Halves(small, first), Halves(full, first)

    rows = training_rows(argparse.Namespace(samples=args.samples_), args.samples, principles, "check")
    random.Random(1).shuffle(rows)
    rows = prepare_rows(
        to_dataset(rows[: args.num_prompts]), tokenizer, max_length=None, overlong_policy="error", plain=True
    )
    collate, batches = DataCollatorForSAMI(tokenizer.pad_token_id, share_prefix=True), []
    for start in range(0, len(rows), 4):
        batch = collate([rows[i] for i in range(start, min(start + 4, len(rows)))])
        shared = {name: own for name, own in batch.items() if not name.startswith("plain_")}
        plain = cached(plain_inputs(batch), lower)
        with torch.no_grad():
            batches.append((cached(shared, lower), plain | {"reference": upper.scored(plain)}))
    end, answers, kept = end_token_id(tokenizer, True), [], {}
    for row in load_outputs(args.samples / "plain.jsonl")[: args.num_plain]:
        ids = encode_completion(tokenizer, completion_text(row["completion"]), end, truncated=row["truncated"])
        answers.append((encode_prompt(tokenizer, row["prompt"], "plain"), ids))
    before = plain_answers(upper, answers, kept)[0]
    asked = complementary(load_rows(args.samples / "eval_samples.jsonl", kept_only=False), args.num_eval_prompts)
    original = sample(TransformersEngine(small, tokenizer), asked, args.max_new_tokens)

    set_seed(42)
    lora = LoraConfig(r=16, lora_alpha=32, **lora_targets(full, "third"))
    sampler, adapted = get_peft_model(small, lora), get_peft_model(full, lora)
    fresh = {name: own.clone() for name, own in get_peft_model_state_dict(adapted).items()}
    parameters = [own for own in adapted.parameters() if own.requires_grad]
    with JsonlWriter(args.output / "points.jsonl") as writer:
        for text in args.points:
            rate, steps, size, weight = text.split(":")
            set_peft_model_state_dict(adapted, fresh)
            log = train(upper, head, batches, parameters, (float(rate), int(steps), int(size), float(weight)))
            same, kl = plain_answers(upper, answers, kept)
            set_peft_model_state_dict(sampler, get_peft_model_state_dict(adapted))
            with torch.autocast("cpu", torch.bfloat16):
                mine = sample(TransformersEngine(sampler, tokenizer), asked, args.max_new_tokens)
            unchanged = [now for now, was in zip(same, before, strict=True) if was]
            result = {
                "point": text, "unchanged": sum(unchanged) / len(unchanged), "n": len(unchanged), "kl": kl,
                "obedience": obedience(principles, mine, original), "log": log, "samples": mine[:6],
            }  # fmt: skip
            writer.append(result)
            shown = {name: own["all"]["difference"] for name, own in result["obedience"].items()}
            print(text, f"unchanged {result['unchanged']:.0%}, KL {kl:.2g}", json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
