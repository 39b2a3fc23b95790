"""The house's rules: imports run one way, methods know nothing of each other, losses need torch only."""

import ast
import copy
import importlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import trl_extensions


ROOT = Path(trl_extensions.__file__).parent
METHODS = ("sami", "tnt", "weak_to_strong", "codeclm")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, typing: bool = False) -> set[str]:
    """Modules that a file imports, anywhere in it; those for type checkers only if `typing`."""
    package = list(path.relative_to(ROOT.parent).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not typing:
        guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        skipped = {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}
    else:
        skipped = set()
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
GRAPH = {name: (imports_of(path) & FILES.keys()) - {name} for name, path in FILES.items()}


def test_no_circle_lazy_imports_included():
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                # A package's own file is no circle for what lies in it, as long as it does not import that back
                if not (name.startswith(other + ".") and not any(n.startswith(other + ".") for n in GRAPH[other])):
                    visit(other, (*way, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_core_knows_no_method_and_methods_not_each_other():
    for name, imported in GRAPH.items():
        place = name.split(".")[1:2]
        rooms = {other.split(".")[1] for other in imported if "." in other}
        if place == ["core"]:
            assert rooms <= {"core", "_compat", "embedded"}, name
        elif place and place[0] in METHODS:
            assert not rooms & ({*METHODS, "cli"} - set(place)), name


@pytest.mark.parametrize("method", ["sami", "tnt", "weak_to_strong"])
def test_losses_import_torch_only(method):
    imported = {name.split(".")[0] for name in imports_of(FILES[f"trl_extensions.{method}.loss"])}
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_importing_the_package_loads_no_torch():
    code = "import trl_extensions, sys; print(sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_api_page_names_what_there_is():
    page = ROOT.parent / "docs" / "api.md"
    for name in [line.removeprefix("::: ") for line in page.read_text().splitlines() if line.startswith("::: ")]:
        module, _, attribute = name.rpartition(".")
        if name not in FILES:
            assert hasattr(importlib.import_module(module), attribute), name


def files_of(walk) -> set[str]:
    """Files of the package in which `walk` calls something, but for those that only hold names: TRL's, and old ones.

    Walked once before it is watched, so that what modules do when they are imported does not count.
    """
    walk()
    files = set()

    def watch(frame, event, _):
        name = frame.f_code.co_filename  # that of a template is its own
        if event == "call" and name.startswith(f"{ROOT}/") and name.endswith(".py"):
            files.add(name.removeprefix(f"{ROOT}/"))

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        walk()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return files - {"__init__.py", "_compat.py", "core/options.py", "core/extras.py"}


ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none"}


def train_one_step(trainer_class, config_class, rows, model, tokenizer, folder, **settings):
    from datasets import Dataset
    from peft import LoraConfig

    trainer_class(
        copy.deepcopy(model),
        config_class(str(folder), **ONE_STEP, **settings),
        train_dataset=Dataset.from_list(rows * 2),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    ).train()


def test_a_sami_row_reaches_its_loss_through_few_files(tiny_model, tiny_tokenizer, tmp_path):
    from trl_extensions import SAMIConfig, SAMITrainer

    row = {"prompts": ["Be brief. Eggs?", "Be long. Eggs?"], "completions": ["Boil.", "Put the egg into water."]}
    files = files_of(
        lambda: train_one_step(SAMITrainer, SAMIConfig, [row], tiny_model, tiny_tokenizer, tmp_path, beta=0.1)
    )
    assert {"sami/data.py", "sami/collator.py", "sami/trainer.py", "sami/loss.py"} < files
    assert len(files) <= 14, "\n".join(sorted(files))


def test_a_span_reaches_its_gradient_through_few_files(tiny_model, tiny_tokenizer, tmp_path):
    from trl_extensions import TNTConfig, TNTTrainer

    row = {"prompt": "Eggs?", "completion": "Sure! Put the egg into water.", "negative_spans": [[0, 5]]}
    files = files_of(lambda: train_one_step(TNTTrainer, TNTConfig, [row], tiny_model, tiny_tokenizer, tmp_path))
    assert {"tnt/data.py", "tnt/collator.py", "tnt/trainer.py", "tnt/fused_loss.py"} < files
    assert len(files) <= 14, "\n".join(sorted(files))


def test_a_seed_reaches_its_batch_through_few_files(tiny_tokenizer, tmp_path, monkeypatch):
    from tests.codeclm.fake import FakeEngine, Rules
    from trl_extensions import CodecLM, CodecLMConfig, DataCollatorForCodecLM
    from trl_extensions.codeclm.training import load_pairs

    monkeypatch.setattr("trl_extensions.codeclm.pipeline.codec.write_codeclm_report", lambda folder, **_: folder)
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("".join(f"Please help me with the {word} of my old box\n" for word in "abcdefghijkl"))
    folders = iter([tmp_path / "first", tmp_path / "second"])

    def walk():
        folder = next(folders)
        config = CodecLMConfig(prompts=str(seeds), num_instructions=12)
        CodecLM(config, folder, strong=FakeEngine(Rules(), "strong"), target=FakeEngine(Rules(), "target")).run()
        pairs = load_pairs(folder / "data.jsonl")
        assert DataCollatorForCodecLM(tiny_tokenizer)([pairs[0], pairs[1]])["labels"].shape[0] == 2

    files = files_of(walk)
    assert {"codeclm/pipeline/seeds.py", "codeclm/export.py", "codeclm/collator.py"} < files
    assert len(files) <= 18, "\n".join(sorted(files))
