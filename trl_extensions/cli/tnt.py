"""`trl-ext tnt sample | candidates | annotate | train | evaluate | run`."""

from collections.abc import Sequence
from typing import Any

from trl_extensions.embedded import resolve_model_name

from .method import Method, Result, saved, summary_of


USAGE = """\
usage: trl-ext tnt {sample,candidates,annotate,train,evaluate,run} [--config FILE] [--option VALUE ...]

  sample      sample the model's own outputs to the training prompts into output_dir/outputs.jsonl
  candidates  from logs with flags or complaints (--logs) to output_dir/candidates.yaml, for a person to edit
  annotate    mark what is unwanted in outputs (--dataset_name outputs.jsonl, or --logs with --candidates) into
              output_dir/annotated.jsonl
  train       train on annotated outputs (--dataset_name); takes --accelerate_config and accelerate's own options
  evaluate    compare a patched model with its original on held-out prompts: what went, and what stayed
  run         sample, annotate, train, evaluate, and a report; the same command resumes after a kill

`trl-ext tnt COMMAND --help` lists every option. A recipe YAML serves all of them."""


def _options(argv: list[str]) -> Sequence[type]:
    from trl import ModelConfig

    from trl_extensions.core.generation import EngineArguments
    from trl_extensions.tnt.config import AnnotatorArguments, TNTArguments, TNTConfig

    return TNTArguments, AnnotatorArguments, EngineArguments, TNTConfig, ModelConfig


def _make(args: Any, annotator_args: Any, engine_args: Any, config: Any, model_args: Any) -> Any:
    from trl_extensions.tnt.run import TNTRun

    for owner, name in ((model_args, "model_name_or_path"), (args, "original_model")):
        if getattr(owner, name):
            setattr(owner, name, resolve_model_name(getattr(owner, name)))
    return TNTRun(args, annotator_args, engine_args, config, model_args)


def _sample(run: Any) -> Result:
    if not run.args.prompts or not run.original:
        raise ValueError("`sample` needs `prompts` and `model_name_or_path`.")
    output = run.folder / "outputs.jsonl"
    return summary_of(run.sample_to(run.original, run.prompts()[0], output, run.args.num_samples, True))


def _candidates(run: Any) -> Result:
    from trl_extensions.tnt.logs import find_candidates, read_logs, write_candidates

    if not run.args.logs:
        raise ValueError("`candidates` needs `logs`, a JSONL of deployed outputs with flags or complaints.")
    candidates, path = find_candidates(read_logs(run.args.logs)), run.folder / "candidates.yaml"
    write_candidates(path, candidates)
    what = f"{len(candidates)} candidates; edit it, then `trl-ext tnt annotate --logs ... --candidates {path}`"
    return Result(f"{path}: {what}")


def _annotate(run: Any) -> Result:
    from trl_extensions.tnt.annotate import annotate_rows
    from trl_extensions.tnt.data import read_annotated
    from trl_extensions.tnt.logs import load_candidates, read_logs, rows_from_logs

    if run.args.logs:
        if not run.annotator_args.candidates:
            raise ValueError("`logs` needs `candidates`: write the file with `trl-ext tnt candidates` and edit it.")
        logs = read_logs(run.args.logs)
        rows = rows_from_logs(logs, load_candidates(run.annotator_args.candidates))
        print(f"{len(logs) - len(rows)} of {len(logs)} outputs left out: flagged, and nothing in them is marked")
        # The candidates are marked already; further annotators mark what they find
        annotators = run.annotator_args.build(with_candidates=False)
    elif run.args.dataset_name:
        rows, annotators = read_annotated(run.args.dataset_name, run.args.dataset_train_split), run.annotators
    else:
        raise ValueError("`annotate` needs `dataset_name` (outputs to mark), or `logs` and `candidates`.")
    return summary_of(annotate_rows(rows, annotators, run.folder / "annotated.jsonl"))


def _train(run: Any) -> Result:
    if not run.args.dataset_name or not run.original:
        raise ValueError("`train` needs `dataset_name` (annotated outputs) and `model_name_or_path`.")
    if run.args.target():
        raise ValueError("`train` knows no target: give `target_reduction`, `min_preserved` and `max_kl` to `run`.")
    run.claim_training()
    run.train()
    return saved(run, run.patched)


def _evaluate(run: Any) -> Result:
    from trl_extensions.tnt.report import in_numbers, verdict

    run.check()
    found = run.evaluate_alone()
    return Result(f"{run.folder / 'evaluation.json'}: {verdict(found)[1]} {in_numbers(found)}", found)


METHOD = Method(
    "tnt",
    USAGE,
    _options,
    _make,
    {"sample": _sample, "candidates": _candidates, "annotate": _annotate, "train": _train, "evaluate": _evaluate},
    trains=lambda command, argv: command not in ("sample", "candidates", "annotate"),
)
main = METHOD.main
