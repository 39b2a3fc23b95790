"""A patch from end to end: sample the original, annotate, train, and evaluate on both axes.

A stage leaves a file when it is done, and is skipped when that is there: the same command resumes a killed run.

    output_dir/settings.json, report.md, report.json, evaluation.json, two_axes.png
    output_dir/original/   outputs.jsonl, annotated.jsonl (training prompts); eval_outputs.jsonl, eval_annotated.jsonl
    output_dir/train/      checkpoints and log;  output_dir/model/  the patched model or adapter
    output_dir/patched/    eval_outputs.jsonl, eval_annotated.jsonl

With `min_marked`: original/more_outputs.jsonl, more_annotated.jsonl, more.json. With a target (see `search`), training
is in rounds, each of which is validated: validation/original, validation/round_1_scale_0.7, ... (outputs.jsonl,
annotated.jsonl), search/round_1/model and round.json, search.json.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from datasets import Dataset
from transformers.trainer_utils import SaveStrategy, SchedulerType
from trl import ModelConfig

from ..core.generation import EngineArguments, ModelSource
from ..core.generation.sampling import load_outputs, sample_outputs
from ..core.generation.types import Prompt, adapter_base, is_adapter_directory
from ..core.inputs import PromptArguments, Query
from ..core.modeling.batches import free_memory
from ..core.runs.jsonl import read_jsonl
from ..core.runs.plan import Work, mean_tokens, steps_of
from ..core.runs.report import write_atomically
from ..core.runs.run import MUTABLE_ON_RESUME, Run, Stage, check_resume, mark_done, training_settings
from ..core.training.load import fit, last_checkpoint
from ..core.training.preflight import Training
from .annotate import Annotator, annotate_rows
from .config import AnnotatorArguments, TNTArguments, TNTConfig
from .data import load_training_rows, read_annotated
from .evaluation import evaluate_patch
from .report import write_report
from .scores import score_rows
from .search import MoreReport, as_json, can_scale, measure, next_alpha, place_of, scale_adapter
from .trainer import TNTTrainer


_SAMPLING = {f.name for f in fields(PromptArguments)}
_MORE = {"min_marked", "max_more_samples", "validation_share", "num_validation_prompts"}
_MUTABLE_ON_RESUME = MUTABLE_ON_RESUME | {
    "eval_batch_tokens", "eval_dataset_name", "dataset_test_split", "original_model", "logs", "max_rounds",
}  # fmt: skip

_MADE = "model train search* patched evaluation.json training_settings.json"


@dataclass
class TNTRun(Run):
    """One run: its settings, its folder (the `output_dir` of the configuration), and a method for each stage."""

    remade: ClassVar = {
        "annotation_settings.json": f"original/annot* original/more* original/eval_[as]* validation {_MADE}",
        "training_settings.json": f"validation/round_* {_MADE}",
    }

    args: TNTArguments
    annotator_args: AnnotatorArguments
    engine_args: EngineArguments
    config: TNTConfig
    model_args: ModelConfig

    def __post_init__(self):
        self.folder = Path(self.config.output_dir or "")
        self.patched = str(self.folder / "model")
        self.models = ModelSource(self.model_args, self.engine_args, self.config.trust_remote_code)

    @property
    def original(self) -> str:
        return self.model_args.model_name_or_path or ""

    def check(self) -> None:
        if not self.args.prompts:
            raise ValueError("`prompts` is missing: name a file or data set.")
        if not self.original:
            raise ValueError("`model_name_or_path` is missing: give a hub id, a directory or the embedded model.")
        if self.engine_args.engine != "endpoint" and self.engine_args.engine_model:
            raise ValueError("`engine_model` would sample from another model than is trained: leave it out.")
        if self.config.chat_template_path:
            raise ValueError("`chat_template_path` would apply to training only: put the template into the model.")
        if not self.args.greedy:
            raise ValueError("`greedy: false` leaves nothing to compare word for word: only `sample` takes it.")
        if self.args.least_marked() and not self.args.temperature:
            raise ValueError("`min_marked` samples prompts again, which needs a temperature above 0.")
        self.annotator_args.check()
        self.prompts()
        if self.args.dataset_name:
            read_annotated(self.args.dataset_name, self.args.dataset_train_split)
        self._held_out()
        for name in ("phrases_file", "candidates"):
            if (file := getattr(self.annotator_args, name)) and not Path(file).is_file():
                raise ValueError(f"`{name}`: there is no file {file}; check the path.")

    def settings(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """What only annotation depends on binds once there is one, and what only training does once there is a
        checkpoint or a model."""
        args, model = asdict(self.args), asdict(self.model_args)
        sampling = {name: args[name] for name in sorted(_SAMPLING)} | {"seed": self.config.seed}
        sampling |= {name: model[name] for name in ("model_name_or_path", "model_revision")}
        sampling |= {"engine": self.engine_args.engine}
        if self.args.least_marked() or self.args.target():
            sampling |= {name: args[name] for name in sorted(_MORE)}
        training = training_settings(self.config, _MUTABLE_ON_RESUME) | model
        training["learning_rate"] = self.config.rate(model["use_peft"] or is_adapter_directory(self.original))
        training |= {name: args[name] for name in sorted(args.keys() - _SAMPLING - _MORE - _MUTABLE_ON_RESUME)}
        trained = Path(self.patched).exists() or last_checkpoint(str(self.folder / "train")) is not None
        sampled = (self.folder / "original").exists()
        annotated = any(self.folder.glob("original/*annot*"))
        return {
            "settings.json": (sampling, sampled),
            "annotation_settings.json": (self.annotator_args.settings(), annotated),
            "training_settings.json": (training, trained),
        }

    def claim_training(self) -> None:
        values, trained = self.settings()["training_settings.json"]
        check_resume(self.folder / "training_settings.json", values, made=self.patched, started=trained)

    def stages(self) -> Iterator[Stage]:
        training: list[tuple[str, Any, str, str]] = [("train", "patched", "model", "training")]
        if self.args.target():
            training = [("validate", 0, "validation/original.json", "original: answering the validation prompts")]
            for number in range(1, self.args.max_rounds + 1):
                own = f"search/round_{number}"
                training.append(("train", number, f"{own}/model", f"training, round {number}"))
                training.append(("validate", number, f"{own}/round.json", f"validating round {number}"))
            training.append(("choose", "patched", "model", "choosing the strength"))
        for name, side, done, label in (
            ("sample", "original", "original/sampling.json", "sampling the original's outputs to train on"),
            ("annotate", "original", "original/annotation.json", "marking what is unwanted in them"),
            ("sample_more", "original", "original/more.json", "sampling what showed it again, if too few did"),
            ("sample_held_out", "original", "original/eval_sampling.json", "sampling answers to the held-out prompts"),
            *training,
            ("sample_held_out", "patched", "patched/eval_sampling.json", "sampling answers to the held-out prompts"),
            ("evaluate", "patched", "evaluation.json", "comparing the two"),
        ):
            skipped = {"sample", "annotate"} if self.args.dataset_name else set()
            if name not in skipped | (set() if self.args.least_marked() else {"sample_more"}):
                yield Stage(name, side, self.folder / done, f"{side}: {label}" if isinstance(side, str) else label)

    def trainings(self) -> Iterator[Training]:
        row = {"prompt": "Hello", "completion": "Sure! Hello.", "negative_spans": [[0, 4]]}
        yield Training(TNTTrainer, self.model_args, self.config, [row, row])

    def works(self) -> Iterator[Work]:
        args, model, (train, held) = self.args, self.original, self.prompts()
        asked, new = mean_tokens(self.models.tokenizer(), [query.text for query in train + held]), args.max_new_tokens
        rows, rounds, least = len(train) * (1 + args.num_samples), args.max_rounds, args.least_marked()
        if args.dataset_name:
            rows = len(read_annotated(args.dataset_name, args.dataset_train_split))
        else:
            yield Work("sample", "" if self.engine_args.engine == "endpoint" else model, rows, asked, new)
        tests = 2 * len(held) * (1 + args.num_eval_samples)
        if args.target():
            tests += args.num_validation_prompts * (1 + rounds * len(args.scales))
        if least:
            yield Work("sample more", model, args.max_more_samples, asked, new)
        steps, seen = (
            n * (rounds if args.target() else 1) for n in steps_of(self.config, rows, self.processes, least or 1)
        )
        yield Work("train", model, seen, asked + new, trained=asked + new, steps=steps)
        yield Work("evaluate", model, tests, 2 * asked + new, new)

    def execute(self, perform: Callable[[str, str], Any] | None = None) -> Path:
        if perform is None:  # else every stage has a process of its own, and this one has no use for models
            _ = self.annotators  # loaded now: what they lack is said before anything is sampled

        def needed(name: str, of: Any) -> None:
            if isinstance(of, int) and (met := self._round_that_met()):
                print(f"not needed: round {met} met the target")
            else:
                (perform or self.perform)(name, of)

        return super().execute(needed)

    def write_report(self) -> Path:
        return write_report(self.folder)

    # The stages

    def sample(self, side: str = "original") -> None:
        output = self.folder / side / "outputs.jsonl"
        report = self.sample_to(self.original, self.prompts()[0], output, self.args.num_samples, True)
        mark_done(self.folder / side / "sampling.json", report)

    def annotate(self, side: str = "original") -> None:
        folder = self.folder / side
        report = annotate_rows(load_outputs(folder / "outputs.jsonl"), self.annotators, folder / "annotated.jsonl")
        if not report.with_span:
            remedy = "use prompts that bring it out, more samples, or describe it otherwise"
            raise ValueError(f"none of the {report.rows} outputs is marked, so there is nothing to remove: {remedy}.")
        mark_done(folder / "annotation.json", report)

    def sample_held_out(self, side: str) -> None:
        report = self._answer_held_out(self.patched if side == "patched" else self.original, side)
        mark_done(self.folder / side / "eval_sampling.json", report)

    def sample_more(self, side: str = "original") -> None:
        """Sample the prompts that showed something unwanted again, as often as it takes."""
        folder, least = self.folder / side, self.args.least_marked()
        marked = [row["prompt"] for row in self._annotated() if row.get("negative_spans")]
        shown = [prompt for prompt in marked if not self._is_apart(prompt)]
        if not shown:
            raise ValueError("no prompt to train on showed anything unwanted: give more prompts, or more samples.")
        queries = _queries(shown)
        outputs, more = folder / "more_outputs.jsonl", folder / "more_annotated.jsonl"
        report, copies, calls = MoreReport(outputs, len(queries), 0, len(shown), len(shown), least), 0, 0
        while (missing := least - report.marked) > 0 and (left := self.args.max_more_samples // len(queries) - copies):
            found = report.marked - report.marked_before
            new = range(copies, copies + min(left, math.ceil(missing * copies / found) if found else max(1, copies)))
            calls, copies = calls + 1, new.stop
            # A prompt so often in one call, which fills batches; a resumed run makes the same calls again
            again = [replace(query, id=f"{query.id}-{copy}") for copy in new for query in queries]
            self._sample_and_mark(self.original, again, outputs, more, part=f"more{calls}")
            # A killed run may have left rows of later calls
            made = [row for row in read_jsonl(more) if int(row["model"].removeprefix("more")) <= calls]
            marks = [bool(row["negative_spans"]) for row in made]
            report = replace(report, sampled=len(marks), marked=len(shown) + sum(marks))
        mark_done(folder / "more.json", report)

    def train(self, side: str | int = "patched") -> None:
        """Train on the annotated outputs and leave the model at `output_dir/model`, or, of a round, in its folder."""
        config = copy.copy(self.config)
        config.output_dir = str(self.folder / "train")
        more = self.folder / "original" / "more_annotated.jsonl"
        rows = load_training_rows(
            self._source(), self.args.dataset_train_split, clean_ratio=self.args.clean_ratio, seed=config.seed,
            more=read_jsonl(more) if more.exists() else (), held_off=self._is_apart,
        )  # fmt: skip
        target = Path(self.patched)
        if isinstance(side, int):
            target = self.folder / "search" / f"round_{side}" / "model"
            self._set_round(config, side, rows)
            for chosen_before in (self.patched, self.folder / "patched"):  # with a lower `max_rounds`
                shutil.rmtree(chosen_before, ignore_errors=True)
            (self.folder / "evaluation.json").unlink(missing_ok=True)
        held_out = self._held_out()
        target.parent.mkdir(parents=True, exist_ok=True)
        fit(TNTTrainer, self.model_args, config, rows, held_out, target)

    def validate(self, number: int) -> None:
        """Answer the validation prompts with the original (0), or with every scale of a round's adapter."""
        folder, queries = self.folder / "validation", self._validation_queries()
        before = folder / "original" / "annotated.jsonl"
        if not number:
            report = self._sample_and_mark(self.original, queries, before.with_name("outputs.jsonl"), before)
            marks = [bool(row["negative_spans"]) for row in read_jsonl(before)]
            if not any(marks) or all(marks):
                what = f"{sum(marks)} of the original's {len(marks)} greedy answers to validation prompts have"
                raise ValueError(f"{what} something unwanted, so nothing can be compared: give more prompts.")
            mark_done(folder / "original.json", report)
            return
        own = self.folder / "search" / f"round_{number}"
        model, alpha, points = own / "model", self._alpha_of(number), []
        steps = json.loads((self.folder / "train" / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        fresh = not is_adapter_directory(self.original)
        scales = sorted({*self.args.scales, 1.0}) if fresh and can_scale(model) else [1.0]
        for scale in scales:
            place = folder / f"round_{number}_scale_{scale:g}"
            scaled = model if scale == 1.0 else own / "scaled"
            if scale != 1.0:
                scale_adapter(model, scaled, scale)
            after = place / "annotated.jsonl"
            self._sample_and_mark(str(scaled), queries, place / "outputs.jsonl", after)
            point = {"round": number, "steps": steps, "alpha": alpha, "scale": scale, "kl": None}
            point |= measure(read_jsonl(before), read_jsonl(after))
            if self.args.max_kl is not None:
                point["kl"] = self._kl(str(scaled), [row for row in read_jsonl(before) if not row["negative_spans"]])
            points.append(point)
            free_memory()
        shutil.rmtree(own / "scaled", ignore_errors=True)
        write_atomically(own / "round.json", json.dumps({"points": points}, indent=2) + "\n")

    def choose(self, side: str = "patched") -> None:
        """Leave the chosen point's model at `output_dir/model`, and all points in `search.json`."""
        target = self.args.target()
        assert target is not None
        found = as_json(self._points(), target)
        chosen = found["chosen"]
        write_atomically(self.folder / "search.json", json.dumps(found, indent=2) + "\n")
        print(found["words"])
        partial = self.folder / "model.partial"
        scale_adapter(self.folder / "search" / f"round_{chosen['round']}" / "model", partial, chosen["scale"])
        os.replace(partial, self.patched)

    def evaluate(self, side: str = "patched") -> dict[str, Any]:
        return self._compare(self.original, self.patched)

    def evaluate_alone(self) -> dict[str, Any]:
        """Sample and compare `model_name_or_path` with `original_model`, outside of a run."""
        patched = self.original
        original = self.args.original_model or _base_of(patched)
        for side, model in (("original", original), ("patched", patched)):
            print(self._answer_held_out(model, side).summary)
        return self._compare(original, patched)

    # What the stages share

    @cached_property
    def annotators(self) -> list[Annotator]:
        return self.annotator_args.build()

    def prompts(self) -> tuple[list[Query], list[Query]]:
        return self.args.load_prompts(self.config.seed)

    def _held_out(self) -> Dataset | None:
        if self.args.eval_dataset_name:
            return load_training_rows(self.args.eval_dataset_name, self.args.dataset_test_split)
        if self.config.eval_strategy != "no":
            raise ValueError("`eval_strategy` needs `eval_dataset_name`: annotated outputs, not the final test's.")
        return None

    def _source(self) -> str:
        return self.args.dataset_name or str(self.folder / "original" / "annotated.jsonl")

    def _annotated(self) -> list[dict[str, Any]]:
        rows = read_annotated(self._source(), self.args.dataset_train_split)
        if "input_ids" in rows[0]:
            raise ValueError(f"{self._source()} holds tokenised rows: a target and `min_marked` need rows of text.")
        return list(rows)

    def _is_held_off(self, prompt: Prompt) -> bool:
        return self.args.target() is not None and place_of(prompt) < self.args.validation_share

    @cached_property
    def _tested(self) -> set[str]:
        return {query.text for query in self.prompts()[1]} if self.args.prompts else set()

    def _is_apart(self, prompt: Prompt) -> bool:
        """Whether a prompt is held off training: for validation, or for the test, as rows of other origin may be."""
        return self._is_held_off(prompt) or _queries([prompt])[0].text in self._tested

    def _validation_queries(self) -> list[Query]:
        own = [prompt for row in self._annotated() if self._is_held_off(prompt := row["prompt"])]
        queries = [query for query in _queries(sorted(own, key=place_of)) if query.text not in self._tested]
        if len(queries) < 2:
            raise ValueError("fewer than 2 prompts are held off for validation: give more, or `validation_share`.")
        return queries[: self.args.num_validation_prompts]

    def _points(self) -> list[dict[str, Any]]:
        """All points that were measured, round by round."""
        paths = [self.folder / "search" / f"round_{i}" / "round.json" for i in range(1, self.args.max_rounds + 1)]
        return [p for path in paths if path.exists() for p in json.loads(path.read_text(encoding="utf-8"))["points"]]

    def _round_that_met(self) -> int | None:
        target = self.args.target()
        return next((point["round"] for point in self._points() if target and target.is_met(point)), None)

    def _alpha_of(self, number: int) -> float:
        before = [point for point in self._points() if point["round"] == number - 1 and point["scale"] == 1.0]
        target = self.args.target()
        return next_alpha(before[0], target) if before and target else self.config.alpha

    def _set_round(self, config: TNTConfig, number: int, rows: Dataset) -> None:
        """Turn a configuration into a round's: as many steps again, annealed anew, from the last one's checkpoint."""
        marked = sum(bool(spans) for spans in rows["negative_spans"])
        processes = PartialState().num_processes
        batch = config.train_batch_size * config.gradient_accumulation_steps * processes
        shown, _, most = config.shown
        epochs = config.num_train_epochs or min(most, shown / max(1, marked))
        steps = config.max_steps if config.max_steps > 0 else max(1, math.ceil(epochs * len(rows) / batch))
        # A share is one of the first round; later ones go on with its moments, and restart where cycles begin
        config.warmup_steps = config.get_warmup_steps(steps) if number == 1 else 0
        config.alpha, config.max_steps = self._alpha_of(number), number * steps
        if config.lr_scheduler_type in ("linear", "cosine"):
            config.lr_scheduler_type = SchedulerType("cosine_with_restarts")
            config.lr_scheduler_kwargs = {"num_cycles": number}
        if config.save_strategy != "steps":
            config.save_strategy, config.save_steps = SaveStrategy("steps"), steps
        config.save_total_limit = config.save_total_limit or 1

    def _kl(self, model: str, clean: list[dict[str, Any]]) -> float:
        """KL from the original, nats per token, on its clean outputs."""
        engine, original = self.models.in_process(model), self._apart_from(model, self.original)
        batch_tokens = self.args.eval_batch_tokens
        scores = score_rows(engine.model, engine.tokenizer, clean, original=original, batch_tokens=batch_tokens)
        return sum(score["kl_kept"] for score in scores) / sum(score["kept_tokens"] for score in scores)

    def _apart_from(self, patched: str, original: str) -> Any:
        """The original, unless it is what a patched model's adapter lies on."""
        behind_adapter = is_adapter_directory(patched) and _base_of(patched) == original
        return None if behind_adapter else self.models.in_process(original).model

    def _sample_and_mark(self, model: str, queries: list[Query], outputs: Path, marked: Path, part: str | None = None):
        """One answer of a model to each prompt, which is complete, with marks: greedy, or in a `part` random."""
        report = sample_outputs(
            self.models.sampler(model, is_original=model == self.original), queries,
            self.args.params(self.config.seed), outputs, greedy=part is None, num_samples=int(part is not None),
            conversational=queries[0].messages is not None, model=part,
        )  # fmt: skip
        annotate_rows(load_outputs(outputs), self.annotators, marked)
        return report

    def sample_to(self, model: str, prompts: list[Query], output: Path, num_samples: int, is_original: bool):
        sampler, args = self.models.sampler(model, is_original=is_original), self.args
        return sample_outputs(
            sampler, prompts, args.params(self.config.seed), output, greedy=args.greedy, num_samples=num_samples,
            system_prompt=args.system_prompt,
            conversational=not args.plain_prompts and self.models.is_conversational(),
        )  # fmt: skip

    def _answer_held_out(self, model: str, side: str):
        """Sample and mark answers to the held-out prompts; both sides with the same engine, so that they compare."""
        outputs = self.folder / side / "eval_outputs.jsonl"
        same = self.engine_args.engine != "endpoint"
        report = self.sample_to(model, self.prompts()[1], outputs, self.args.num_eval_samples, same)
        rows = load_outputs(outputs)
        print(annotate_rows(rows, self.annotators, self.folder / side / "eval_annotated.jsonl").summary)
        return report

    def _compare(self, original: str, patched: str) -> dict[str, Any]:
        engine = self.models.in_process(patched)
        before, after = (read_jsonl(self.folder / side / "eval_annotated.jsonl") for side in ("original", "patched"))
        return evaluate_patch(
            engine.model, engine.tokenizer, before, after, self.folder / "evaluation.json",
            original=self._apart_from(patched, original), batch_tokens=self.args.eval_batch_tokens,
        )  # fmt: skip


def _queries(prompts: Iterable[Prompt]) -> list[Query]:
    """Distinct prompts of rows as queries, in their order."""
    made = (Query.from_text(p) if isinstance(p, str) else Query.from_messages(p) for p in prompts)
    return list({query.id: query for query in made}.values())


def _base_of(model: str) -> str:
    if not is_adapter_directory(model):
        raise ValueError("`original_model` is missing: name the model before the patch.")
    return adapter_base(model)
