"""Training to a target: the split, the choice on a frontier made by hand, scaled adapters, and runs that search."""

import copy
import json
import random
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from transformers import get_scheduler

from trl_extensions.cli.tnt import METHOD
from trl_extensions.core.runs.jsonl import read_jsonl, write_jsonl
from trl_extensions.core.stats import wilson
from trl_extensions.tnt.config import TNTConfig
from trl_extensions.tnt.data import load_training_rows
from trl_extensions.tnt.report import draw_frontier
from trl_extensions.tnt.search import (
    Target,
    as_json,
    can_scale,
    choose,
    measure,
    next_alpha,
    place_of,
    scale_adapter,
    stopped_by,
)
from trl_extensions.tnt.trainer import TNTTrainer


def point(reduction, preserved, kl=None, number=1, scale=1.0, alpha=8.0):
    whole = {"low": 0.0, "high": 1.0}
    return {
        "round": number, "steps": 10 * number, "alpha": alpha, "scale": scale, "kl": kl,
        "reduction": {"value": reduction} | whole, "preserved": {"value": preserved} | whole,
    }  # fmt: skip


class TestChoice:
    weak, middle, strong = point(0.6, 0.9, scale=0.5), point(0.9, 0.7, scale=0.85), point(0.97, 0.62)

    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            (Target(reduction=0.85, preserved=0.6), "middle"),  # room 0.05 against 0.02
            (Target(reduction=0.93, preserved=0.6), "strong"),  # the only one that meets it
            (Target(reduction=0.85), "middle"),  # keeps more than the strong one
            (Target(preserved=0.65), "middle"),  # takes more off than the weak one
            (Target(reduction=0.95, preserved=0.8), "middle"),  # none: short by 0.35, 0.10, 0.18
        ],
    )
    def test_by_hand(self, target, expected):
        points = [self.weak, self.middle, self.strong]
        assert choose(points, target) is getattr(self, expected)

    def test_a_budget_of_kl(self):
        low, high = point(0.8, 0.1, kl=0.001), point(0.9, 0.1, kl=0.003)
        assert choose([low, high], Target(kl=0.002)) is low
        assert choose([low, high], Target(kl=0.004)) is high
        # Room of `high`: 0.9 - 0.85 = 0.05 and 1 - 3 / 4 = 0.25; `low` does not reach 0.85
        assert choose([low, high], Target(reduction=0.85, kl=0.004)) is high
        assert Target(reduction=0.85, kl=0.004).room(high) == pytest.approx({"reduction": 0.05, "kl": 0.25})

    @pytest.mark.parametrize(
        ("target", "limit"),
        [
            (Target(reduction=0.85, preserved=0.6), "target"),
            (Target(reduction=0.99, preserved=0.6), "rounds"),
            (Target(reduction=0.85, preserved=0.95), "preservation"),
            (Target(reduction=0.95, preserved=0.8), "trade-off"),
        ],
    )
    def test_what_stopped_it(self, target, limit):
        found = as_json([self.weak, self.middle, self.strong], target)
        assert found["stopped_by"] == stopped_by([self.weak, self.middle, self.strong], target)[0] == limit
        assert json.loads(json.dumps(found))["target"]["reduction"] == target.reduction

    def test_alpha_follows_what_is_short(self):
        target = Target(reduction=0.85, preserved=0.6)
        assert [next_alpha(point(*axes), target) for axes in ((0.5, 0.9), (0.9, 0.5), (0.5, 0.5))] == [16.0, 4.0, 8.0]
        assert next_alpha(point(0.5, 0.1), Target(reduction=0.85)) == 16.0

    def test_the_figure(self, tmp_path):
        points = [self.weak, self.middle, self.strong, point(0.8, 0.8, number=2, alpha=16.0)]
        (axes,) = draw_frontier(as_json(points, Target(reduction=0.85, preserved=0.6)), tmp_path / "f.png").axes
        drawn = [line.get_xydata().tolist() for line in axes.lines]
        assert [[60.0, 90.0], [90.0, 70.0], [97.0, 62.0]] in drawn
        assert [[90.0, 70.0]] in drawn  # chosen
        assert (tmp_path / "f.png").stat().st_size > 1000


def rows(*texts, word="bad"):
    return [
        {
            "id": str(i), "index": i, "sample": 0, "prompt": f"p{i}", "completion": text, "truncated": False,
            "num_tokens": 3, "negative_spans": [[0, 1]] if word in text else [],
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["bad", "悪い"])
def test_a_point_by_hand(word):
    before = rows(f"a {word}", f"b {word}", f"c {word}", f"d {word}", "e", "f", "g", "h", word=word)
    after = rows("a", "b", "c", f"d {word}", "e", "f", "G", "h", word=word)
    found = measure(before, after)
    assert found["reduction"]["value"] == 1 - 1 / 4
    low, high = wilson(1, 8)  # of the rate after, over the rate before: 4 of 8
    assert (found["reduction"]["low"], found["reduction"]["high"]) == pytest.approx((1 - high * 2, 1 - low * 2))
    assert found["preserved"]["value"] == 3 / 4
    assert (found["outputs"], found["marked_before"], found["marked"]) == (8, 4, 1)


def test_a_share_that_is_just_reached():
    before, after = rows(*["a bad"] * 20, "fine"), rows(*["a bad"] * 11, *["a"] * 9, "fine")
    assert Target(reduction=0.45).is_met(measure(before, after))  # 9 of 20; 1 - 11 / 20 < 0.45
    none_left = measure(before, rows(*["a"] * 20, "fine"))
    assert Target(reduction=1.0).is_met(none_left) and choose([none_left], Target(reduction=1.0)) is none_left


class TestSplit:
    def test_it_depends_on_the_prompt_alone(self):
        prompts = [f"prompt {i}" for i in range(400)] + [f"質問 {i}" for i in range(400)]
        held_off = {prompt for prompt in prompts if place_of(prompt) < 0.25}
        assert 150 < len(held_off) < 250  # 200 expected, of standard deviation 12
        more = [f"another {i}" for i in range(100)] + prompts
        random.Random(0).shuffle(more)
        assert {prompt for prompt in more if place_of(prompt) < 0.25} & set(prompts) == held_off

    def test_a_chat_is_its_messages(self):
        message = {"role": "user", "content": "卵の茹で方は？"}
        assert place_of([message]) == place_of([message | {"name": None}]) != place_of([{**message, "role": "system"}])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_a_scaled_adapter_adds_its_change_so_often(tiny_model, tmp_path, options):
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | options))
    original = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    model = get_peft_model(tiny_model, config)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "whole")
    assert can_scale(tmp_path / "whole")
    scale_adapter(tmp_path / "whole", tmp_path / "half", 0.5)
    ids = torch.tensor([[5, 6, 7, 8]])
    with rescale_adapter_scale(model, 0.5), torch.no_grad():
        by_peft = model(ids).logits
    full = {n: w.clone() for n, w in model.merge_and_unload().state_dict().items()}

    def bare():
        from tests.conftest import make_tiny_model

        return make_tiny_model(384, tie_word_embeddings="embed_tokens" not in config.target_modules)

    halved = bare()
    halved.load_state_dict(original)
    halved = PeftModel.from_pretrained(halved, tmp_path / "half")
    with torch.no_grad():
        torch.testing.assert_close(halved(ids).logits, by_peft, atol=1e-5, rtol=1e-5)
    if "embed_tokens" not in config.target_modules:
        merged = halved.merge_and_unload().state_dict()  # W + (W' - W) / 2, by the weights
        for name, weight in merged.items():
            torch.testing.assert_close(weight, original[name] + (full[name] - original[name]) / 2, atol=1e-5, rtol=0)


def test_what_is_not_scaled(tiny_model, tmp_path):
    get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path)
    assert not can_scale(tmp_path) and not can_scale(tmp_path / "no such folder")


@pytest.mark.parametrize(("marked", "epochs"), [(0, 16.0), (24, 12.5), (50, 6.0), (250, 1.2), (5000, 1.0)])
def test_epochs_by_marked_rows(marked, epochs):
    assert TNTConfig("out").epochs(marked) == epochs


def test_a_script_without_epochs(make_trainer, rows):
    assert make_trainer(rows, max_steps=-1).args.num_train_epochs == 16.0
    assert make_trainer(rows, max_steps=-1, num_train_epochs=2).args.num_train_epochs == 2


SEARCH = {
    "max_steps": 6, "target_reduction": 0.99, "min_preserved": 0.99, "scales": "0.5", "max_rounds": 2,
    "validation_share": 0.5, "min_marked": 12, "max_more_samples": 40, "num_eval_prompts": 2,
}  # fmt: skip


@pytest.mark.parametrize("warmup", [0, 2, 0.2])
def test_the_first_round_warms_up_and_every_round_anneals(arguments, tmp_path, warmup):
    changes = SEARCH | {"max_steps": -1, "warmup_steps": warmup, "lr_scheduler_type": "linear"}
    run = METHOD.parse("run", arguments(**changes))
    data = Dataset.from_list([{"negative_spans": [[0, 1]] if i < 30 else []} for i in range(40)])
    for number, total in ((1, 100), (2, 200)):  # 300 / 30 epochs of 40 rows, 4 a step
        config = copy.copy(run.config)
        run._set_round(config, number, data)
        assert (config.max_steps, config.alpha) == (total, run.config.alpha)
        assert config.warmup_steps == ({0: 0, 2: 2, 0.2: 20}[warmup] if number == 1 else 0)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_scheduler(
            config.lr_scheduler_type, optimizer, config.warmup_steps, total, config.lr_scheduler_kwargs
        )
        rates = [schedule.lr_lambdas[0](step) for step in range(total)]
        assert rates[-1] < 0.01 and sum(rate == 1.0 for rate in rates) == number
        assert number == 1 or rates[100] == 1.0 > 0.01 > rates[99]


def test_test_prompts_are_not_trained_on(arguments, tmp_path, caplog):
    tested = [query.text for query in METHOD.parse("run", arguments()).prompts()[1]]
    prompts = [*tested, "Tell me of nothing else.", "静かな夜の話をして。"]
    made = [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": "A damn."}],
         "negative_spans": [[2, 6]]} for p in prompts
    ]  # fmt: skip
    write_jsonl(tmp_path / "rows.jsonl", made)
    run = METHOD.parse("run", arguments(dataset_name=tmp_path / "rows.jsonl"))
    assert [run._is_apart(row["prompt"]) for row in made] == [True] * 3 + [False] * 2
    kept = load_training_rows(str(tmp_path / "rows.jsonl"), "train", held_off=run._is_apart)
    assert [row["prompt"][0]["content"] for row in kept] == prompts[3:]
    assert "3 of 5 outputs" in caplog.text
    write_jsonl(tmp_path / "rows.jsonl", [*made[:3], made[3] | {"negative_spans": []}])
    with pytest.raises(ValueError, match="3 of 4 outputs answer prompts held off"):
        run.train()


class TestRuns:
    def test_to_a_target_and_again_after_a_kill(self, arguments, tmp_path):
        report = METHOD.parse("run", arguments(**SEARCH)).execute()
        folder = tmp_path / "run"
        search = json.loads((folder / "search.json").read_text())
        trained = [point["round"] for point in search["points"]]
        assert {(p["round"], p["scale"]) for p in search["points"]} == {(n, s) for n in trained for s in (0.5, 1.0)}
        assert all(p["steps"] == 6 * p["round"] for p in search["points"])  # the same training goes on
        text = report.read_text()
        assert "frontier.png" in text and search["words"] in text and (folder / "frontier.png").exists()
        # What the choice was made on is said, and how the chosen point was made, not the last round
        chosen = search["chosen"]
        assert f"the best of {len(search['points'])} on these answers" in text and "optimistic" in text
        assert f"`alpha: {chosen['alpha']:g}`" in text and f" {chosen['steps']} steps." in text
        # No prompt on two sides
        more = read_jsonl(folder / "original" / "more_annotated.jsonl")
        sampled = read_jsonl(folder / "original" / "annotated.jsonl")
        asked = [
            {row["prompt"][0]["content"] for row in own}
            for own in (
                [row for row in more + sampled if place_of(row["prompt"]) >= 0.5],
                read_jsonl(folder / "validation" / "original" / "annotated.jsonl"),
                read_jsonl(folder / "original" / "eval_annotated.jsonl"),
            )
        ]
        assert all(asked) and not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
        assert {row["prompt"][0]["content"] for row in more} <= asked[0]
        # Killed while the last round was trained and validated
        before = json.loads((folder / "evaluation.json").read_text())
        last = folder / "search" / f"round_{trained[-1]}"
        for path in (folder / "model", folder / "search.json", folder / "patched", folder / "evaluation.json",
                     last / "round.json", folder / "validation" / f"round_{trained[-1]}_scale_1"):  # fmt: skip
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        METHOD.parse("run", arguments(**SEARCH)).execute()
        assert json.loads((folder / "search.json").read_text()) == search
        assert json.loads((folder / "evaluation.json").read_text()) == before

    def test_rounds_end_where_the_target_is_met(self, arguments, tmp_path, capsys):
        changes = SEARCH | {"target_reduction": None, "min_preserved": 0.01, "min_marked": 0, "max_kl": 100.0}
        METHOD.parse("run", arguments(**changes)).execute()
        search = json.loads((tmp_path / "run" / "search.json").read_text())
        assert search["stopped_by"] == "target" and {p["round"] for p in search["points"]} == {1}
        assert all(p["kl"] >= 0 for p in search["points"])
        assert "not needed" in capsys.readouterr().out and not (tmp_path / "run" / "search" / "round_2").exists()

    def test_a_finished_run_is_given_more_rounds(self, arguments, tmp_path, monkeypatch):
        rates, step = [], TNTTrainer.training_step
        monkeypatch.setattr(
            TNTTrainer, "training_step", lambda self, *args, **kwargs: (
                rates.append(self.optimizer.param_groups[0]["lr"]), step(self, *args, **kwargs))[1],
        )  # fmt: skip
        folder, changes = tmp_path / "run", SEARCH | {"min_marked": 0, "lr_scheduler_type": "cosine"}
        points = []
        for rounds in (1, 2, 2):
            METHOD.parse("run", arguments(**changes | {"max_rounds": rounds})).execute()
            points.append(json.loads((folder / "search.json").read_text())["points"])
        assert points[1][: len(points[0])] == points[0] and points[2] == points[1]
        assert [point["round"] for point in points[1]] == [1, 1, 2, 2]
        assert len(rates) == 12 and rates[6] == rates[0] == max(rates) > min(rates[:6])
        assert str(rounds) in (folder / "report.md").read_text() and (folder / "evaluation.json").exists()

    def test_full_fine_tuning_has_rounds_and_no_scales(self, arguments, tmp_path):
        changes = SEARCH | {"use_peft": False, "min_marked": 0, "max_steps": 1, "learning_rate": 1e-4}
        METHOD.parse("run", arguments(**changes)).execute()
        points = json.loads((tmp_path / "run" / "search.json").read_text())["points"]
        assert [point["scale"] for point in points] == [1.0] * len(points)

    @pytest.mark.parametrize(("wanted", "limit"), [(6, 1000), (500, 12)])
    def test_more_is_sampled_until_it_is_enough(self, arguments, tmp_path, wanted, limit):
        changes = {"min_marked": wanted, "max_more_samples": limit, "num_samples": 0}
        run = METHOD.parse("run", arguments(**changes))
        run.sample()
        run.annotate()
        run.sample_more()
        folder = tmp_path / "run" / "original"
        report = json.loads((folder / "more.json").read_text())
        first, more = (read_jsonl(folder / f"{name}annotated.jsonl") for name in ("", "more_"))
        marked = [row for row in first if row["negative_spans"]]
        assert {row["prompt"][0]["content"] for row in more} == {row["prompt"][0]["content"] for row in marked}
        assert report["marked_before"] == len(marked) and report["sampled"] == len(more) <= limit
        assert report["marked"] == len(marked) + sum(bool(row["negative_spans"]) for row in more)
        assert report["marked"] >= wanted or len(more) > limit - report["prompts"]
        assert len({row["completion"][0]["content"] for row in more}) > 1  # other seeds, other texts
        # Killed in the middle of the last samples: what is there stays, what is missing comes
        lines = (folder / "more_outputs.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "more_outputs.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
        for name in ("more.json", "more_annotated.jsonl"):
            (folder / name).unlink()
        METHOD.parse("run", arguments(**changes)).sample_more()
        again = read_jsonl(folder / "more_annotated.jsonl")
        kept = [json.loads(line) for line in lines[:-2]]
        assert {r["id"]: r["completion"] for r in kept}.items() <= {r["id"]: r["completion"] for r in again}.items()
        assert {row["id"] for row in again} >= {row["id"] for row in more}
        assert json.loads((folder / "more.json").read_text())["sampled"] == len(again)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"target_reduction": 1.5}, "`target_reduction` must be above 0"),
            ({"max_kl": 0}, "`max_kl` must be above 0"),
            ({"scales": "3"}, "`scales` must be numbers above 0"),
            ({"min_marked": -1}, "`min_marked` must be a whole number"),
            ({"min_marked": 5, "temperature": 0, "num_samples": 0, "num_eval_samples": 0}, "a temperature above 0"),
        ],
    )
    def test_settings_that_mean_nothing(self, arguments, changes, message):
        with pytest.raises(ValueError, match=message):
            METHOD.parse("run", arguments(**changes)).check()
