"""The toxicity task of arXiv 2410.12621 on SmolLM2-135M, over seeds: who writes clean text, and does it teach?

    python benchmarks/w2s_toxicity.py --prompts prompts.jsonl --clean clean.jsonl --scorer_rows labelled.jsonl \
        --output runs/w2s-toxicity --seeds 0 1 2 --jobs 3 -- --use_cpu false --dtype bfloat16

A classifier is trained on labelled texts first ({"text", "label": "toxic" or "clean"}): the second scorer, which
shares nothing with the first, a bag of words. Then, for each seed, the run of benchmarks/w2s_toxicity.yaml; what
stands behind `--` goes to it. Everything resumes. The table has means over seeds, with every seed's number behind.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trl_extensions.cli.w2s import METHOD


CONFIG = str(Path(__file__).with_suffix(".yaml"))
QUIET = ["--bf16", "false", "--report_to", "none", "--save_strategy", "no", "--gradient_checkpointing", "false"]
# A command gives each stage a process of its own on a GPU, which costs more than the stage at this size
ONE = "import sys; from trl_extensions.cli.w2s import METHOD; METHOD.parse('run', sys.argv[1:]).execute()"


def main() -> None:
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    argv, more = sys.argv[1:place], sys.argv[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prompts", "clean", "scorer_rows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once")
    args = parser.parse_args(argv)
    output = Path(args.output)
    scorer = output / "scorer" / "model"
    if not scorer.exists():
        own = ["--task", "classification", "--model_name_or_path", "embedded:smollm2-135m-instruct", "--dataset_name",
               args.scorer_rows, "--class_names", "clean", "toxic", "--num_train_epochs", "2",
               "--learning_rate", "3e-5", "--per_device_train_batch_size", "32", "--max_length", "64", *QUIET,
               "--output_dir", str(output / "scorer")]  # fmt: skip
        cpu = [word for place, word in enumerate(more) if "--use_cpu" in more[max(0, place - 1) : place + 1]]
        if METHOD.main(["train", *own, *cpu]):
            sys.exit(1)

    def run(seed: int) -> int:
        folder = output / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        own = ["--config", CONFIG, "--prompts", args.prompts, "--writer_dataset_name", args.clean,
               "--ceiling_dataset_name", args.clean, "--seed", str(seed), "--output_dir", str(folder),
               "--confirm_scorer", f"{{kind: classifier, model: {scorer}, label: toxic}}", *more]  # fmt: skip
        with (folder / "log.txt").open("w") as log:
            return subprocess.run([sys.executable, "-c", ONE, *own], stdout=log, stderr=log).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(run, args.seeds))
    for seed, code in zip(args.seeds, codes, strict=True):
        if code:
            print(f"seed {seed} failed, see {output}/seed_{seed}/log.txt")
    show([output / f"seed_{seed}" for seed, code in zip(args.seeds, codes, strict=True) if not code])


def show(folders: list[Path]) -> None:
    if not folders:
        sys.exit(1)
    found = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in folders]
    columns = {}
    kinds = {"scorer": lambda e: e, "second scorer": lambda e: e["confirmed"]}
    for title, of in kinds.items():
        for measure in ("expected_maximum", "probability"):
            columns[f"{measure.replace('_', ' ')}, {title}"] = lambda e, n, of=of, measure=measure: of(e)["kinds"][
                "sampled"
            ]["models"][n][measure]["value"]
    columns["perplexity"] = lambda e, n: e["fluency"]["sampled"][n]["value"]
    print(f"| model | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name in found[0]["models"]:
        cells = []
        for value in columns.values():
            own = [value(evaluation, name) for evaluation in found]
            cells.append(f"{sum(own) / len(own):.3f} ({', '.join(f'{number:.3f}' for number in own)})")
        print(f"| {name} | {' | '.join(cells)} |")
    for base in ("original", "weak"):
        for title, of in kinds.items():
            for evaluation, folder in zip(found, folders, strict=True):
                own = of(evaluation)["kinds"]["sampled"]["differences"]["expected_maximum"][base]["w2s"]
                interval = f"{own['low']:+.3f} to {own['high']:+.3f}"
                print(f"{folder.name}: w2s - {base}, {title}: {own['value']:+.3f} ({interval})")


if __name__ == "__main__":
    main()
