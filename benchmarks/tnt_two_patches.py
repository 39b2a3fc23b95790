"""A second patch on a patched model: is the first one still there?

    python benchmarks/tnt_two_patches.py --first runs/benchmark-tnt --second_phrases however --output runs/two_patches

Takes the folder of a finished `trl-ext tnt run`, samples its patched model on its training prompts, marks the second
list of phrases only, and trains the same adapter further, relative to the patched model. Then the rates of both lists
on the same held-out prompts: the original, after the first patch, after the second.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_extensions import TNTConfig, TNTTrainer
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.sampling import completion_text, load_outputs, sample_outputs
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.tnt.annotate import annotate_rows
from trl_extensions.tnt.annotate.phrases import PhraseAnnotator
from trl_extensions.tnt.data import TEXT_COLUMNS, select_rows
from trl_extensions.tnt.evaluation import preservation, unwanted


def main() -> None:
    args = parse()
    adapter = args.first / "model"
    settings, unwanted_by = (
        json.loads((args.first / name).read_text()) for name in ("settings.json", "annotation_settings.json")
    )
    base = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    params = GenerationParams(settings["max_new_tokens"], 1.0)
    lists = {
        "first": PhraseAnnotator(unwanted_by["phrases"], unwanted_by["patterns"]),
        "second": PhraseAnnotator(args.second_phrases),
    }
    training = prompts_of(args.first / "original" / "outputs.jsonl")[: args.num_prompts]
    held_out = prompts_of(args.first / "original" / "eval_outputs.jsonl")[: args.num_eval_prompts]

    outputs = args.output / "outputs.jsonl"
    print(sample_outputs(engine(model, tokenizer), training, params, outputs, num_samples=1).summary)
    annotated = args.output / "annotated.jsonl"
    print(annotate_rows(load_outputs(outputs), [lists["second"]], annotated).summary)
    train(model, tokenizer, select_rows(read_jsonl(annotated), args.clean_ratio, 0), args)
    after = args.output / "eval_outputs.jsonl"
    print(sample_outputs(engine(model, tokenizer), held_out, params, after, num_samples=0).summary)

    ids = {f"{query.id}-0" for query in held_out}
    stages = {
        "original": args.first / "original" / "eval_outputs.jsonl",
        "after the first patch": args.first / "patched" / "eval_outputs.jsonl",
        "after the second patch": after,
    }
    answers = {name: [row for row in load_outputs(path) if row["id"] in ids] for name, path in stages.items()}
    report(answers, lists)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=Path, required=True)
    parser.add_argument("--second_phrases", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_prompts", type=int, default=300)
    parser.add_argument("--num_eval_prompts", type=int, default=150)
    parser.add_argument("--clean_ratio", type=float, default=3.0)
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    return parser.parse_args()


def prompts_of(path: Path) -> list[Query]:
    rows = [row for row in load_outputs(path) if row["sample"] == 0]
    return [Query(row["id"].rpartition("-")[0], row["prompt"][-1]["content"], row["prompt"]) for row in rows]


def engine(model, tokenizer) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, batch_tokens=8192)


def train(model, tokenizer, rows: list[dict], args) -> None:
    config = TNTConfig(
        str(args.output / "train"), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8,
        num_train_epochs=args.epochs, learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=3,
        save_strategy="no", logging_steps=5, gradient_checkpointing=False, alpha=args.alpha, seed=0,
    )  # fmt: skip
    dataset = Dataset.from_list([{name: row.get(name) for name in TEXT_COLUMNS} for row in rows])
    trainer = TNTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(args.output / "model"))


def report(answers: dict[str, list[dict]], lists: dict[str, PhraseAnnotator]) -> None:
    marked = {}
    for name, rows in answers.items():
        texts = [completion_text(row["completion"]) for row in rows]
        for which, annotator in lists.items():
            spans = annotator.annotate(texts, [row["prompt"] for row in rows])
            marked[name, which] = [
                row | {"negative_spans": [list(span[:2]) for span in own]}
                for row, own in zip(rows, spans, strict=True)
            ]
    print("| model | first phrases | second phrases | unchanged from the model before, where that was clean |")
    print("| --- | --- | --- | --- |")
    names = list(answers)
    for place, name in enumerate(names):
        rates = [unwanted(marked[name, which])["share"] for which in lists]
        cells = [f"{100 * r['value']:.1f}% ({100 * r['low']:.0f} to {100 * r['high']:.0f})" for r in rates]
        kept = ""
        if place:
            which = ("first", "second")[place - 1]
            clean = preservation(marked[names[place - 1], which], marked[name, which])["clean"]
            kept = f"{100 * clean['exact_match']['value']:.0f}% of {clean['n']}"
        print(f"| {name} | {cells[0]} | {cells[1]} | {kept} |")


if __name__ == "__main__":
    main()
