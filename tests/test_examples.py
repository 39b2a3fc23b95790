"""The steps from a user's file to a trained model: the pages' blocks of Python, and the scripts in `examples/`."""

import json
import runpy
from pathlib import Path

import pytest

from tests.codeclm.fake import FakeEngine, Rules
from trl_extensions.core.generation.types import Generation


ROOT = Path(__file__).parents[1]
BLOCKS = [
    (page.name, number, block.partition("\n```")[0])
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(page.read_text(encoding="utf-8").split("```python\n")[1:], start=1)
]
TINY = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
QUESTIONS = ["How do I boil an egg?", "卵の茹で方を教えてください。", "Why is the sky blue?", "空はなぜ青いのですか？"]
PRINCIPLES = """\
principles:
  - {name: short, definition: Be short., antithesis: Be long.}
  - {name: polite, definition: 丁寧に答える。, antithesis: ぶっきらぼうに答える。}
"""


class Answers:
    """An engine that says the same in other words to each prompt."""

    name = "answers"

    def generate(self, prompts, params, seeds=None):
        for number, prompt in enumerate(prompts):
            words = "word " * (len(json.dumps(prompt)) % 7)
            yield number, Generation(f"Here's {words}and 卵 {number}.", "stop", 8)


@pytest.fixture(autouse=True)
def in_a_users_folder(tmp_path, monkeypatch):
    """What three users bring, and engines that need no model."""
    monkeypatch.chdir(tmp_path)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": f"答え {q}"}] for q in QUESTIONS]
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
    Path("chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("principles.yaml").write_text(PRINCIPLES, encoding="utf-8")
    for name, number in (("labels_train.csv", 60), ("labels_test.csv", 12)):
        rows = [("契約 contract", "contract"), ("cookie の件", "privacy"), ("給与 salary", "Employment")] * number
        text = "".join(f'"{text} {i}",{label}\n' for i, (text, label) in enumerate(rows[:number]))
        Path(name).write_text(f"text,label\n{text}", encoding="utf-8-sig")
    monkeypatch.setattr("trl_extensions.core.generation.engine_of", lambda model, name="model": Answers())
    monkeypatch.setattr("trl_extensions.codeclm.pipeline.codec.create_engine", fake_engine)
    monkeypatch.setattr("trl_extensions.codeclm.pipeline.codec.write_codeclm_report", lambda folder, **_: folder)


def fake_engine(arguments):
    return FakeEngine(Rules(), "strong" if arguments.engine == "endpoint" else "target")


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_a_block_of_a_page_runs(page, number, block, tiny_model_dir):
    assert block.count("\n") < 20
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"):
        block = block.replace(f'"{name}"', repr(str(tiny_model_dir)))
    assert 'Config("out")' in block
    block = block.replace("CodecLMConfig(\n", "CodecLMConfig(\n    num_instructions=6,\n")
    found: dict = {}
    exec(block.replace('Config("out")', f'Config("out", **{TINY})'), found)
    assert len(found["rows"]) and list(Path("out").glob("checkpoint-1/*.safetensors"))


def test_every_method_has_its_block():
    assert {"sami.md", "tnt.md", "w2s.md", "codeclm.md"} <= {page for page, _, _ in BLOCKS}


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("sft.py", ["--dataset_name", "chats.jsonl", "--phrases", "here's"]),
        ("dpo.py", ["--dataset_name", "chats.jsonl", "--max_new_tokens", "9"]),
        ("reward.py", ["--dataset_name", "labels_train.csv", "--unlabelled", "labels_test.csv"]),
        ("codeclm.py", ["--dataset_name", "data.jsonl"]),
    ],
)
def test_a_script_runs_on_a_file_as_it_is(script, options, tiny_model_dir, monkeypatch):
    row = {"prompt": [{"role": "user", "content": "卵?"}], "completion": [{"role": "assistant", "content": "茹でる"}]}
    scores = {"strong": 8.0, "target": 3.0, "gap": 5.0}
    Path("data.jsonl").write_text((json.dumps(row | {"metadata": {}, "scores": scores}) + "\n") * 4)
    settings = {"model_name_or_path": tiny_model_dir, "output_dir": "out", "use_peft": True, **TINY}
    argv = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", [script, *argv, "--lora_target_modules", "q_proj", "v_proj", *options])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert Path("out/adapter_model.safetensors").exists()
