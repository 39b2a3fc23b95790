"""The over-optimisation guard: what it measures, when it stops, what it leaves on disk."""

import pytest

from trl_extensions.core.generation.types import Generation
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.core.text import corpus_distinct_2, distinct_2
from trl_extensions.sami.guard import OverOptimizationGuard


GUARD = {"guard_steps": 1, "guard_num_queries": 2, "guard_max_new_tokens": 6}


def records(tmp_path):
    return read_jsonl(tmp_path / "out" / "guard.jsonl")


class TestGuard:
    def test_every_check_is_written_and_logged(self, rows, make_trainer, tmp_path):
        trainer = make_trainer(rows, eval_dataset=rows, max_steps=3, **GUARD)
        trainer.train()
        checks = records(tmp_path)
        assert [check["step"] for check in checks] == [0, 1, 2, 3]
        assert all(len(check["texts"]) == 4 for check in checks)  # 2 queries x 2 constitutions
        assert checks[0]["kl"] == pytest.approx(0.0, abs=1e-6) and checks[-1]["kl"] > 0
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["guard/kl"] for entry in logged] == [check["kl"] for check in checks[1:]]

    def test_kl_limit_stops_and_says_why(self, rows, make_trainer, tmp_path, caplog):
        trainer = make_trainer(rows, eval_dataset=rows, max_steps=50, learning_rate=1.0, guard_max_kl=0.05, **GUARD)
        trainer.train()
        assert trainer.state.global_step < 50
        last = records(tmp_path)[-1]
        assert last["kl"] > 0.05 and "above guard_max_kl=0.05" in last["stopped"]
        assert f"Training stopped at step {trainer.state.global_step}" in caplog.text
        assert all(check["kl"] <= 0.05 for check in records(tmp_path)[:-1])

    def test_length_is_compared_with_the_untrained_model(self, rows, make_trainer, tmp_path):
        # Greedy samples of the random model never end, so every length ratio is 1
        trainer = make_trainer(rows, eval_dataset=rows, max_steps=5, guard_min_length_ratio=1.01, **GUARD)
        trainer.train()
        assert trainer.state.global_step == 1
        assert (
            "1.00 times as long as before training, below guard_min_length_ratio=1.01"
            in records(tmp_path)[-1]["stopped"]
        )

    def test_samples_without_text_stop_the_run(self, rows, make_trainer, tmp_path, monkeypatch):
        def silent(self, prompts, params):
            for index in range(len(prompts)):
                yield index, Generation("", "length", params.max_new_tokens)

        trainer = make_trainer(rows, eval_dataset=rows, max_steps=5, **GUARD)
        monkeypatch.setattr("trl_extensions.sami.guard.TransformersEngine.generate", silent)
        trainer.train()
        assert trainer.state.global_step == 1
        assert records(tmp_path)[-1]["stopped"] == "every fresh sample is empty."

    def test_nothing_stops_before_the_first_step(self, rows, make_trainer, tmp_path):
        trainer = make_trainer(rows, eval_dataset=rows, max_steps=2, guard_min_distinct_2=1.1, **GUARD)
        trainer.train()
        assert ["stopped" in check for check in records(tmp_path)] == [False, True]

    def test_an_abandoned_attempt_is_put_aside(self, rows, make_trainer, tmp_path):
        for _ in range(3):
            make_trainer(rows, eval_dataset=rows, max_steps=1, **GUARD).train()
        assert [check["step"] for check in records(tmp_path)] == [0, 1]
        assert len(list((tmp_path / "out").glob("guard.abandoned-*.jsonl"))) == 2

    def test_training_is_the_same_with_and_without_checks(self, rows, make_trainer):
        from tests.conftest import make_tiny_model

        losses = []
        for settings in ({}, GUARD):
            trainer = make_trainer(rows, model=make_tiny_model(384), eval_dataset=rows, max_steps=3, **settings)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert losses[0] == losses[1]

    def test_resuming_keeps_the_first_baseline(self, rows, make_trainer, tmp_path):
        settings = GUARD | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        make_trainer(rows, eval_dataset=rows, **settings).train()
        again = make_trainer(rows, eval_dataset=rows, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert [check["step"] for check in records(tmp_path)] == [0, 1, 2, 2]

    def test_resuming_with_other_prompts_says_so(self, rows, make_trainer, tmp_path, caplog):
        settings = GUARD | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        make_trainer(rows, eval_dataset=rows, **settings).train()
        again = make_trainer(rows, eval_dataset=rows, **settings | {"guard_num_queries": 1})
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert [check["step"] for check in records(tmp_path)] == [0, 1, 2, 1, 2]
        assert "limits compare with step 1" in caplog.text

    def test_held_out_prompts_are_needed(self, rows, make_trainer):
        with pytest.raises(ValueError, match="needs held-out prompts"):
            make_trainer(rows, **GUARD)


class TestSecondAxis:
    @pytest.fixture
    def people(self, tmp_path):
        path = tmp_path / "people.jsonl"
        path.write_text(
            '{"prompt": "Eggs?", "completion": "Boil them."}\n{"prompt": "卵は？", "completion": "ゆで卵。"}\n'
        )
        return str(path)

    def test_both_measures_start_from_the_untrained_model(self, rows, make_trainer, tmp_path, people):
        trainer = make_trainer(rows, eval_dataset=rows, learning_rate=1.0, guard_references=people, **GUARD)
        trainer.train()
        first, *_, last = records(tmp_path)
        assert (first["unchanged"], first["reference_change"]) == (1, 0) and len(first["plain_texts"]) == 2
        same = [a.split() == b.split() for a, b in zip(first["plain_texts"], last["plain_texts"], strict=True)]
        assert last["unchanged"] == sum(same) / 2
        assert last["reference_change"] == pytest.approx(last["reference_nats"] / first["reference_nats"] - 1)

    def test_limits_stop(self, rows, make_trainer, tmp_path, people):
        settings = GUARD | {"guard_references": people, "guard_min_unchanged": 0.6, "guard_max_reference_change": 0.02}
        guard = OverOptimizationGuard(make_trainer(rows, eval_dataset=rows, **settings))
        fine = {"distinct_2": 1.0, "length": 6.0, "texts": ["a"], "unchanged": 0.7, "reference_change": 0.01}
        assert guard._limit_passed(fine) is None
        assert "guard_min_unchanged=0.6" in guard._limit_passed(fine | {"unchanged": 0.5})
        for change in (0.03, None):  # None is what is not finite
            assert "guard_max_reference_change=0.02" in guard._limit_passed(fine | {"reference_change": change})

    def test_a_limit_needs_references(self, rows, make_trainer):
        with pytest.raises(ValueError, match="guard_references"):
            make_trainer(rows, eval_dataset=rows, guard_min_unchanged=0.5, **GUARD)


class TestTextMetrics:
    def test_distinct_2_by_hand(self):
        # "a b a b": pairs ab, ba, ab -> 2 of 3; "c d": 1 of 1; "e" has none
        assert distinct_2(["a b a b", "c d", "e"]) == pytest.approx((2 / 3 + 1) / 2)
        # over all texts: ab, ba, ab, cd, AB -> {ab, ba, cd} of 5
        assert corpus_distinct_2(["a b a b", "c d", "A B"]) == pytest.approx(3 / 5)
        assert distinct_2(["one", ""]) == corpus_distinct_2([]) == 1.0
