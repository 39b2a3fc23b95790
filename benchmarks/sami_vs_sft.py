"""Is it the objective, or just training on constitution-conditioned text? SAMI against plain SFT on the same text.

Takes a finished `trl-ext sami run` and trains, for one of its rounds, TRL's `SFTTrainer` on the same sampled rows:
every response under the constitution it was written for, as many pairs a step, as many steps, the same optimiser
settings. Both models then answer the same held-out queries and are scored alike.

    python benchmarks/sami_vs_sft.py --config benchmarks/sami_smollm2.yaml [--round 2] [options of the run]
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from trl_extensions.cli.sami import METHOD
from trl_extensions.core.runs.report import RunReport
from trl_extensions.sami.data import load_rows, prepare_rows, to_dataset
from trl_extensions.sami.run import SAMIRun


def sft_pairs(rows: list[dict], tokenizer) -> Dataset:
    """The matching pairs in the order of the rows, with the very tokens SAMI trains on."""
    prepared = prepare_rows(to_dataset(rows), tokenizer, max_length=None, overlong_policy="error")
    return Dataset.from_list([
        {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        for row in prepared
        for prompt, completion in zip(row["prompt_input_ids"], row["completion_input_ids"], strict=True)
    ])  # fmt: skip


def train_sft(run: SAMIRun, round_: int, folder: Path) -> None:
    """Train the original with SFT on a round's rows; skipped when the model is there."""
    if (folder / "model").exists():
        return
    state = json.loads((run.round_folder(round_) / "train" / "trainer_state.json").read_text())
    steps, config, model = state["global_step"], run.config, run.model_args
    rows = load_rows(run.round_folder(round_) / "samples.jsonl")[: steps * run.args.effective_batch_size]
    shared = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "max_grad_norm", "weight_decay", "seed",
              "use_cpu", "bf16", "max_length", "gradient_checkpointing", "report_to")  # fmt: skip
    trainer = SFTTrainer(
        model.model_name_or_path,
        SFTConfig(
            str(folder / "train"),
            max_steps=steps,
            per_device_train_batch_size=config.per_device_train_batch_size * run.args.num_constitutions,
            gradient_accumulation_steps=run.args.effective_batch_size // config.per_device_train_batch_size,
            save_strategy="no",
            logging_steps=1,
            model_init_kwargs={"dtype": model.dtype, "revision": model.model_revision},
            **{name: getattr(config, name) for name in shared},
        ),
        train_dataset=sft_pairs(rows, AutoTokenizer.from_pretrained(model.model_name_or_path)),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.state.save_to_json(str(folder / "train" / "trainer_state.json"))
    trainer.save_model(str(folder / "model"))


def main(argv: list[str]) -> None:
    round_ = None
    if "--round" in argv:
        at = argv.index("--round")
        round_ = int(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    run = METHOD.parse("run", argv)
    round_ = round_ or run.args.rounds
    folder = run.folder / f"sft_round_{round_}"
    train_sft(run, round_, folder)
    sft = run.evaluate_model(str(folder / "model"), folder)
    results = {
        "original": json.loads((run.round_folder(0) / "evaluation.json").read_text()),
        "plain SFT": sft,
        "SAMI": json.loads((run.round_folder(round_) / "evaluation.json").read_text()),
    }
    report = RunReport(f"SAMI and plain SFT on the responses of round {round_}")
    report.table(
        ["", "tight bound", "same order", "which constitution?", "same order", "same responses", "obeyed", "unchanged",
         "people's answers", "KL", "tokens", "distinct-2"],
        [[name, *_row(result)] for name, result in results.items()],
    )  # fmt: skip
    report.data = results
    path = report.write(folder)
    print(path.read_text())


def _row(result: dict) -> list:
    def pm(value):
        return f"{value['mean']:.3f} ± {value['se']:.3f}"

    same, moved = result["same_order"], result["side_effects"]
    obeyed = ", ".join(f"{name} {own['all']['obeyed']['value']:.0%}" for name, own in result["obedience"].items())
    unchanged = moved["plain_answers"].get("unchanged")
    people = moved.get("references", {}).get("relative_change")
    columns = [pm(result["mi_bound"]), pm(same["mi_bound"])]
    columns += [f"{own['accuracy_columns']['mean']:.0%}" for own in (result, same)]
    columns += [pm(result.get("fixed_responses", result)["mi_bound"]), obeyed]
    columns += [f"{unchanged['value']:.0%}" if unchanged else "", f"{people['value']:+.1%}" if people else ""]
    return [*columns, result["kl"]["mean"], f"{result['length']:.0f}", result["distinct_2"]]


if __name__ == "__main__":
    main(sys.argv[1:])
