"""Absorbing a constitution: the loss and its gradient against full logits, one unpadded sequence at a time."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.conftest import make_tiny_model
from tests.sami import test_run
from tests.sami.test_trainer import LORA, steps, weights
from trl_extensions.cli.sami import METHOD
from trl_extensions.core.generation.sampling import completion_text, load_outputs
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.sami.absorb import CASES, AbsorbTrainer, absorb_rows, desired_constitutions, sample_desired
from trl_extensions.sami.checks import PrincipleCheck
from trl_extensions.sami.config import SAMIConfig
from trl_extensions.sami.principles import Principle
from trl_extensions.sami.sampling import ResponseFilters


arguments, files = test_run.arguments, test_run.files  # fixtures

QUERIES = ["Tell me of eggs.", "空はなぜ青いのですか。", "Why?", "Tell me of the rain, at once.", "茶"]
ANSWERS = ["Eggs: yes.", "光が散乱するからです。", "No.", "Rain falls, then it stops and the sun is there.", "はい"]
RULES = "1. Be brief.\n2. 丁寧に答えてください。"


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def rows():
    return Dataset.from_list(
        [
            {"prompts": [user(f"{q}\n{RULES}"), user(q)], "completions": [a, a], "truncated": [i == 2] * 2}
            for i, (q, a) in enumerate(zip(QUERIES, ANSWERS, strict=True))
        ]
    )


@pytest.fixture
def make(tmp_path, tiny_tokenizer, rows):
    def build(*, model=None, peft_config=None, eval_dataset=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
            "per_device_train_batch_size": 5, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.1,
            "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
            "gradient_checkpointing": False, "max_grad_norm": 0.0, "log_kl": False,
        }  # fmt: skip
        return AbsorbTrainer(
            make_tiny_model(384) if model is None else model,
            SAMIConfig(**(defaults | settings)),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return build


def plain_kls(teacher, student, dataset):
    """KL(teacher || student), nats, at every response token of every row, by the definition."""
    kls = []
    for row in dataset:
        ([with_rules, bare], [response]) = row["prompt_input_ids"], row["completion_input_ids"]
        with torch.no_grad():
            own = teacher(torch.tensor([with_rules + response])).logits[0, len(with_rules) - 1 : -1].log_softmax(-1)
        theirs = student(torch.tensor([bare + response])).logits[0, len(bare) - 1 : -1].log_softmax(-1)
        kls.append((own.exp() * (own - theirs)).sum(-1))
    return kls


@pytest.mark.parametrize("share_prefix", [False, True])
def test_the_first_update_is_the_dense_gradient(make, share_prefix):
    trainer = make(share_prefix=share_prefix)
    plain = copy.deepcopy(trainer.model)
    plain.__dict__.pop("forward")
    kls = plain_kls(make_tiny_model(384), plain, trainer.train_dataset)
    expected = torch.cat(kls).mean()  # every response token weighs the same, however long its row
    assert expected > 0.05
    expected.backward()
    trainer.train()
    assert float(steps(trainer)[0]["loss"]) == pytest.approx(expected.item(), abs=1e-5)
    for (name, after), before in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_response_that_was_cut_off_has_no_end(make, tiny_tokenizer):
    responses = {tuple(row["completion_input_ids"][0]) for row in make().train_dataset}
    end = tiny_tokenizer.eos_token_id
    assert sorted(ids[-1] == end for ids in responses) == [False, True, True, True, True]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
def test_gradient_accumulation_is_one_large_batch(make, peft_config):
    found = []
    for batch, accumulation in ((4, 1), (1, 4), (3, 2)):  # the last: micro-batches of 3 and 1 rows
        trainer = make(
            peft_config=peft_config, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            dataloader_drop_last=False, max_steps=1, learning_rate=1.0,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train_dataset = trainer.train_dataset.select(range(4))
        trainer.train()
        found.append((float(steps(trainer)[0]["loss"]), weights(trainer.model)))
    for loss, own in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        for name, value in found[0][1].items():
            torch.testing.assert_close(own[name], value, atol=1e-5, rtol=1e-4, msg=name)


class TestTeacher:
    """It is the model as it was given, whatever trains."""

    def test_of_an_adapter_that_goes_on_being_trained(self, make, rows):
        torch.manual_seed(0)
        model = get_peft_model(make_tiny_model(384), LoraConfig(**LORA, init_lora_weights=False))  # random: it matters
        before = copy.deepcopy(model)
        trainer = make(model=model, eval_dataset=rows, max_steps=8, learning_rate=0.3)
        frozen = {name: value for name, value in weights(model).items() if ".default." not in name}
        trainer.train()
        assert float(steps(trainer)[-1]["loss"]) < 0.8 * float(steps(trainer)[0]["loss"])
        assert all(torch.equal(weights(model)[name], value) for name, value in frozen.items())
        plain = torch.cat(plain_kls(before, model, trainer.eval_dataset)).mean()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.item(), abs=1e-4)

    @pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
    def test_of_full_weights_and_of_a_fresh_adapter(self, make, rows, peft_config):
        trainer = make(peft_config=peft_config, eval_dataset=rows, max_steps=8, per_device_eval_batch_size=2)
        trainer.train()
        plain = torch.cat(plain_kls(make_tiny_model(384), trainer.model, trainer.eval_dataset)).mean()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.item(), abs=1e-4)
        assert plain < float(steps(trainer)[0]["loss"])

    @pytest.mark.parametrize("adapter", [False, True])
    def test_after_resuming(self, make, tmp_path, adapter):
        def fresh():
            torch.manual_seed(0)
            model = make_tiny_model(384)
            return get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False)) if adapter else model

        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 0.01}
        whole = make(model=fresh(), save_strategy="steps", save_steps=2, **settings)
        whole.train()
        resumed = make(model=fresh(), output_dir=str(tmp_path / "b"), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        expected, got = ([float(entry["loss"]) for entry in steps(own)[-2:]] for own in (whole, resumed))
        assert got == pytest.approx(expected, abs=1e-5)


PRINCIPLES = [Principle(name, name.upper(), f"not {name}") for name in "abc"]


def test_the_teachers_order_is_never_the_one_sampled_under():
    orders = set()
    for key in map(str, range(30)):
        sampled, teacher = desired_constitutions(PRINCIPLES, seed=0, key=key)
        assert teacher != sampled and (sampled, teacher) == desired_constitutions(PRINCIPLES, seed=0, key=key)
        assert sorted(line[3:] for line in teacher.splitlines()) == ["A", "B", "C"]
        orders |= {sampled, teacher}
    assert len(orders) == 6
    assert desired_constitutions(PRINCIPLES[:1], seed=0, key="x") == ("1. A", "1. A")


class Engine:
    """Answers with the length of what it is asked; keeps it."""

    name = "fake"

    def __init__(self):
        self.asked = []

    def generate(self, prompts, params):
        self.asked += prompts
        for place, prompt in enumerate(prompts):
            yield place, Generation("" if "茶" in str(prompt) else f"{len(str(prompt))} 文字です。", "stop", 5)


@pytest.mark.parametrize("conversational", [False, True])
def test_rows_have_the_teachers_prompt_and_the_bare_query(tmp_path, conversational):
    engine, queries = Engine(), [Query.from_text(text) for text in QUERIES]
    how = {"template": "{constitution}\n{query}", "conversational": conversational, "seed": 0}
    sample_desired(engine, queries, PRINCIPLES, GenerationParams(8), tmp_path / "samples.jsonl", **how)
    outputs = load_outputs(tmp_path / "samples.jsonl")
    found = absorb_rows(outputs, queries, PRINCIPLES, filters=ResponseFilters(), **how)
    assert found["id"] == [query.id for query in queries[:4]]  # the last response is empty

    # Of every definition the check must hold: of one for all, of the other for those as long as the first
    first = completion_text(outputs[0]["completion"])
    checked = [
        replace(own, check=PrincipleCheck(regex=regex))
        for own, regex in zip(PRINCIPLES[:2], ("文字", f"^{first}$"), strict=True)
    ]
    strict = absorb_rows(outputs, queries, checked, filters=ResponseFilters(drop_disobedient=True), **how)
    alike = [queries[own["index"]].id for own in outputs if completion_text(own["completion"]) == first]
    assert strict["id"] == alike and len(alike) < 4

    def text(prompt):
        return prompt[0]["content"] if conversational else prompt

    for asked, row, query in zip(engine.asked, found, queries, strict=False):
        *rules, last = text(row["prompts"][0]).splitlines()
        assert last == query.text == text(row["prompts"][1])
        assert rules != text(asked).splitlines()[:3] and {rule[3:] for rule in rules} == {"A", "B", "C"}


class TestRun:
    @pytest.mark.parametrize("use_peft", [True, False])
    def test_a_stage_after_the_last_round(self, arguments, files, use_peft):
        settings = {
            "absorb": True,
            "absorb_epochs": 1,
            "absorb_learning_rate": 0.05,
            "use_peft": use_peft,
            "rounds": 1,
        }
        checked = test_run.PRINCIPLES.replace("Be brief.,", "Be brief., check: {regex: e},")
        (files / "principles.yaml").write_text(checked)
        METHOD.parse("run", arguments(**settings)).execute()
        folder = files / "run" / "absorbed"
        log = json.loads((folder / "train" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) >= 4 and all(float(loss) > 0 for loss in losses)
        before, after = (
            load_file(next(own.glob("*.safetensors"))) for own in (files / "run/round_1/model", folder / "model")
        )
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
        outputs = load_outputs(folder / "eval_outputs.jsonl")
        assert sorted({row["model"] for row in outputs}) == ["absorbed", "original", "prompted", "trained"]
        texts = {name: [row["prompt"][0]["content"] for row in outputs if row["model"] == name] for name in CASES}
        assert texts["absorbed"] == texts["original"] == texts["trained"]
        assert all("Be friendly and warm." in text and "Be brief." in text for text in texts["prompted"])
        data = json.loads((files / "run" / "report.json").read_text())["absorbed"]
        for case in CASES:
            texts = {row["index"]: completion_text(row["completion"]) for row in outputs if row["model"] == case}
            was = {row["index"]: completion_text(row["completion"]) for row in outputs if row["model"] == "original"}
            obeyed = data[case]["obedience"]["brief"]["definition"]
            share = sum("e" in text for text in texts.values()) / 4
            assert obeyed["obeyed"]["value"] == share and data[case]["queries"] == 4
            assert obeyed["difference"]["value"] == share - sum("e" in text for text in was.values()) / 4
        assert "warm" not in data["absorbed"]["obedience"]  # it has no check
        assert (files / "run" / "report.md").read_text().count("| absorbed, no constitution |") == 1

    def test_resumes_and_is_bound_to_its_round(self, arguments, files):
        settings = {"absorb": True, "absorb_learning_rate": 0.05, "rounds": 1}
        METHOD.parse("run", arguments("whole", **settings)).execute()
        test_run.execute_in_pieces(lambda: METHOD.parse("run", arguments("pieces", **settings)))
        whole, pieces = (files / own / "absorbed" / "evaluation.json" for own in ("whole", "pieces"))
        assert pieces.read_text() == whole.read_text()
        with pytest.raises(ValueError, match="rounds was 1, now 2"):
            METHOD.parse("run", arguments("whole", **settings | {"rounds": 2})).execute()
