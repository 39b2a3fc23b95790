"""`WeakToStrongRewardTrainer`: uncertain preferences, against `RewardTrainer` and numbers worked out by hand."""

import copy
import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from torch.nn.functional import logsigmoid
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForSequenceClassification, TrainingArguments
from trl import RewardConfig, RewardTrainer

from trl_extensions import WeakToStrongRewardConfig, WeakToStrongRewardTrainer


ANSWERS = [
    (" Seven minutes.", " No idea."),
    (" The air scatters blue light more than red light.", " It was painted."),
    (" Yes.", " Yes, and a little more than that, for good measure."),
    (" A fox.", " An animal, which jumps."),
    (" 1, 2, 3.", " 3."),
    (" Leaves in boiling water.", " Tea."),
    (" Beans.", " Coffee, with much care."),
    (" No.", " Nothing at all."),
]
PREFERENCES = [1.0, 0.9, 0.3, 0.6, 0.0, 0.75, 0.5, 0.45]
WEIGHTS = [1.0, 0.25, 3.0, 0.0, 1.5, 2.0, 0.5, 1.0]
MARGINS = [0.5, 0.0, 1.0, 0.2, 0.0, 0.3, 2.0, 0.1]
DEFAULTS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8, "max_steps": 1,
    "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
    "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "max_grad_norm": 0.0,
}  # fmt: skip


def reward_model(seed=0):
    """A random Llama of two layers with a scalar head; rewards are of the order of 1."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    ))  # fmt: skip
    return model.eval()


def pairs(number=8, **columns):
    rows = [{"prompt": f"Question {i}?", "chosen": a, "rejected": b} for i, (a, b) in enumerate(ANSWERS[:number])]
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values[:number])
    return dataset


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    """Builds a trainer on a tiny reward model: float32, one SGD step over all pairs."""

    def build(dataset, *, trainer=WeakToStrongRewardTrainer, model=None, eval_dataset=None, peft_config=None, **given):
        config = RewardConfig if trainer is RewardTrainer else WeakToStrongRewardConfig
        return trainer(
            model or reward_model(),
            config(str(tmp_path / "out"), **(DEFAULTS | given)),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return build


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(one, other):
    for name, value in weights_of(one).items():
        torch.testing.assert_close(other.get_parameter(name), value, atol=1e-6, rtol=1e-5, msg=name)


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def rewards_of(model, dataset):
    """Rewards of the chosen and of the rejected answers, `(N,)` each, one sequence at a time."""
    return [
        torch.cat([model(torch.tensor([ids])).logits[0] for ids in dataset[name]])
        for name in ("chosen_ids", "rejected_ids")
    ]


def margins_of(model, dataset):
    chosen, rejected = rewards_of(model, dataset)
    return chosen - rejected


def binary_losses(margins, preferences):
    """Cross-entropy of a coin, as it is written in textbooks."""
    p = torch.tensor(preferences)
    return -p * margins.sigmoid().log() - (1 - p) * (1 - margins.sigmoid()).log()


def assert_first_update(trainer, loss_of):
    """One SGD step of the trainer is a plain gradient step of `loss_of(model, its data)`."""
    plain = copy.deepcopy(trainer.model)
    loss = loss_of(plain, trainer.train_dataset)
    loss.backward()
    trainer.train()
    assert float(steps(trainer)[0]["loss"]) == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    for (name, after), before in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        gradient = before.grad if before.grad is not None else torch.zeros_like(before)
        torch.testing.assert_close(after, before - 0.1 * gradient, atol=1e-5, rtol=1e-4, msg=name)


class TestReductions:
    @pytest.mark.parametrize("columns", [{}, {"preference": [1.0] * 8}, {"weight": [1] * 8, "margin": MARGINS}])
    def test_certain_pairs_are_reward_training(self, make, columns):
        theirs_columns = {name: values for name, values in columns.items() if name == "margin"}
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3,
                    "center_rewards_coefficient": 0.05}  # fmt: skip
        ours = make(pairs(**columns), eval_dataset=pairs(**columns), **settings)
        theirs = make(pairs(**theirs_columns), trainer=RewardTrainer, eval_dataset=pairs(**theirs_columns), **settings)
        ours.train()
        theirs.train()
        assert_same_weights(ours.model, theirs.model)
        names = {"loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"}
        for mine, its in zip(steps(ours), steps(theirs), strict=True):
            for name in names:
                assert float(mine[name]) == pytest.approx(float(its[name]), rel=1e-3, abs=1e-6), name
        assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)

    def test_soft_preferences_add_a_share_of_the_margin(self, make):
        def loss(model, dataset):  # RewardTrainer's loss and (1 - p) times the margin
            margins = margins_of(model, dataset)
            return (-logsigmoid(margins) + (1 - torch.tensor(dataset["preference"])) * margins).mean()

        assert_first_update(make(pairs(preference=PREFERENCES)), loss)

    def test_swapped_pairs_with_swapped_preferences_are_the_same(self, make):
        straight = make(pairs(preference=PREFERENCES))
        swapped = pairs(preference=[1 - p for p in PREFERENCES])
        swapped = make(swapped.rename_columns({"chosen": "rejected", "rejected": "chosen"}))
        straight.train()
        swapped.train()
        assert_same_weights(straight.model, swapped.model)


class TestLosses:
    def test_weights_margins_and_centring(self, make):
        def loss(model, dataset):
            chosen, rejected = rewards_of(model, dataset)
            losses = binary_losses(chosen - rejected - torch.tensor(MARGINS), PREFERENCES)
            return (torch.tensor(WEIGHTS) * losses).mean() + 0.05 * ((chosen + rejected) ** 2).mean()

        dataset = pairs(preference=PREFERENCES, weight=WEIGHTS, margin=MARGINS)
        assert_first_update(make(dataset, center_rewards_coefficient=0.05), loss)

    def test_reverse_kl(self, make):
        def loss(model, dataset):
            p = margins_of(model, dataset).double().sigmoid()
            q = torch.tensor(PREFERENCES, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
            return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()

        assert_first_update(make(pairs(preference=PREFERENCES), loss_type="reverse_kl"), loss)

    def test_product(self, make):
        def loss(model, dataset):
            margins = margins_of(model, dataset)
            p, q = margins.sigmoid().detach(), torch.tensor(PREFERENCES)
            yes, no = p**0.5 * q**2, (1 - p) ** 0.5 * (1 - q) ** 2
            return binary_losses(margins, (yes / (yes + no)).tolist()).mean()

        settings = {"loss_type": "product", "product_alpha": 2.0, "product_beta": 0.5, "loss_warmup_ratio": 0.0}
        assert_first_update(make(pairs(preference=PREFERENCES), **settings), loss)

    def test_confidence_follows_the_threshold_of_its_step(self, make):
        # The threshold: the quantile of the step's P(chosen) at the mean of 1 - p
        trainer = make(
            pairs(preference=PREFERENCES, weight=WEIGHTS), loss_type="confidence", confidence_coef=0.75,
            loss_warmup_ratio=0.0, max_steps=2,
        )  # fmt: skip
        plain, data = copy.deepcopy(trainer.model), trainer.train_dataset
        weights, q = torch.tensor(WEIGHTS), torch.tensor(PREFERENCES)
        for _ in range(2):
            plain.zero_grad()
            margins = margins_of(plain, data)
            p = margins.detach().sigmoid()
            threshold = torch.quantile(p, (1 - q).mean())
            own = (p >= threshold).float()
            loss = (weights * binary_losses(margins, (0.25 * q + 0.75 * own).tolist())).mean()
            loss.backward()
            with torch.no_grad():
                for parameter in plain.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        trainer.train()
        for name, value in weights_of(plain).items():
            torch.testing.assert_close(trainer.model.get_parameter(name), value, atol=1e-5, rtol=1e-4, msg=name)

    def test_the_coefficient_warms_up(self, make):
        trainer = make(
            pairs(preference=PREFERENCES), loss_type="confidence", confidence_coef=0.6, loss_warmup_ratio=0.5,
            max_steps=8,
        )  # fmt: skip
        trainer.train()
        expected = [0.0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6, 0.6]
        assert [entry["loss_coef"] for entry in steps(trainer)] == pytest.approx(expected)

    def test_confident_pairs_count_more(self, make):
        # 2 |p - 1/2| is 1, 0, 0.5 and 0.5, which is 0.5 on average
        trainer = make(
            pairs(4, preference=[1.0, 0.5, 0.75, 0.25], weight=[1.0, 1.0, 1.0, 2.0]), weight_by_confidence=True
        )
        assert list(trainer.train_dataset["weight"]) == pytest.approx([2.0, 0.0, 1.0, 2.0])


class TestUpdates:
    @pytest.mark.parametrize("loss", ["soft_ce", "confidence"])
    def test_accumulation_is_one_large_batch(self, make, loss):
        trainers = []
        for batch, accumulation in ((8, 1), (1, 8), (4, 2)):
            trainer = make(
                pairs(preference=PREFERENCES, weight=WEIGHTS), loss_type=loss, max_steps=3, loss_warmup_ratio=0.0,
                per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            )  # fmt: skip
            trainer.train()
            trainers.append(trainer)
        for other in trainers[1:]:
            assert_same_weights(trainers[0].model, other.model)
            for mine, its in zip(steps(other), steps(trainers[0]), strict=True):
                for name in ("loss", "grad_norm", "agreement", "accuracy", "loss_coef"):
                    assert float(mine[name]) == pytest.approx(float(its[name]), rel=1e-3, abs=1e-5), name

    def test_lora_changes_the_adapter_and_the_head(self, make):
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        trainer = make(pairs(preference=PREFERENCES), peft_config=lora, max_steps=2)
        before = weights_of(trainer.model)
        trainer.train()
        changed = {name for name, value in weights_of(trainer.model).items() if not torch.equal(value, before[name])}
        assert any("lora_" in name for name in changed) and any("score.modules_to_save" in name for name in changed)
        assert all("lora_" in name or "score.modules_to_save" in name for name in changed)

    def test_4bit(self, make, tmp_path):
        reward_model().save_pretrained(tmp_path / "model")
        model = LlamaForSequenceClassification.from_pretrained(
            tmp_path / "model", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        )
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules="all-linear", lora_dropout=0.0)
        trainer = make(pairs(preference=PREFERENCES), model=model, peft_config=lora, max_steps=2, bf16=True)
        before = weights_of(trainer.model)
        trainer.train()
        changed = {name for name, value in weights_of(trainer.model).items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name or "score.modules_to_save" in name for name in changed)
        assert all(math.isfinite(float(entry["loss"])) for entry in steps(trainer))

    def test_resume_keeps_the_threshold(self, make, tmp_path):
        settings = {"loss_type": "confidence", "max_steps": 4, "loss_warmup_ratio": 0.0, "optim": "adamw_torch",
                    "learning_rate": 0.01, "per_device_train_batch_size": 3, "save_strategy": "steps",
                    "save_steps": 2}  # fmt: skip
        straight = make(pairs(preference=PREFERENCES), **settings)
        straight.train()
        resumed = make(pairs(preference=PREFERENCES), model=reward_model(seed=5), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert torch.equal(resumed.supervision.threshold, straight.supervision.threshold)
        assert_same_weights(straight.model, resumed.model)

    def test_training_learns_the_preferences(self, make):
        trainer = make(
            pairs(preference=PREFERENCES), max_steps=40, optim="adamw_torch", learning_rate=3e-3, max_grad_norm=1.0
        )
        trainer.train()
        learned = margins_of(trainer.model.eval(), trainer.train_dataset).sigmoid().tolist()
        assert learned == pytest.approx(PREFERENCES, abs=0.15)


class TestLogs:
    def test_evaluate(self, make):
        held_out = pairs(7, preference=PREFERENCES, weight=WEIGHTS)
        trainer = make(pairs(), eval_dataset=held_out, per_device_eval_batch_size=7)
        report = trainer.evaluate()
        margins = margins_of(trainer.model, trainer.eval_dataset)
        expected = (torch.tensor(WEIGHTS[:7]) * binary_losses(margins, PREFERENCES[:7])).mean().item()
        assert report["eval_loss"] == pytest.approx(expected, rel=1e-5)
        agrees = [(margin > 0) == (p >= 0.5) for margin, p in zip(margins.tolist(), PREFERENCES, strict=False)]
        assert 0 < sum(agrees) < 7
        assert report["eval_agreement"] == pytest.approx(sum(agrees) / 7)
        assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(expected, rel=1e-5)

    def test_agreement_is_the_mean_over_pairs(self, make):
        # 8 pairs in batches of 3, 3 and 2
        trainer = make(pairs(preference=PREFERENCES), per_device_eval_batch_size=3)
        margins = margins_of(trainer.model, trainer.train_dataset).tolist()
        agrees = [(margin > 0) == (p >= 0.5) for margin, p in zip(margins, PREFERENCES, strict=True)]
        report = trainer.evaluate(pairs(preference=PREFERENCES))
        assert report["eval_agreement"] == pytest.approx(sum(agrees) / 8)

    def test_evaluation_does_not_move_the_threshold(self, make):
        settings = {"loss_type": "confidence", "loss_warmup_ratio": 0.0, "max_steps": 3}
        plain = make(pairs(preference=PREFERENCES), **settings)
        watched = make(
            pairs(preference=PREFERENCES), eval_dataset=pairs(5), eval_strategy="steps", eval_steps=1, **settings
        )
        plain.train()
        watched.train()
        assert_same_weights(plain.model, watched.model)


class TestData:
    def test_overlong_pairs_are_counted_and_their_columns_go_with_them(self, make, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = make(pairs(preference=PREFERENCES, weight=WEIGHTS), max_length=24)
        lengths = [
            max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in make(pairs(preference=PREFERENCES)).train_dataset
        ]
        kept = [i for i, length in enumerate(lengths) if length <= 24]
        assert 0 < len(kept) < 8
        assert list(trainer.train_dataset["preference"]) == [PREFERENCES[i] for i in kept]
        assert list(trainer.train_dataset["weight"]) == [WEIGHTS[i] for i in kept]
        said = f"{8 - len(kept)} of 8 train pairs are longer than max_length=24 tokens and were dropped"
        assert said in caplog.text

    def test_no_pair_is_left(self, make):
        with pytest.raises(ValueError, match="8 of 8 train pairs are longer than max_length=3 tokens, so none is"):
            make(pairs(), max_length=3)

    def test_only_weights_of_nothing_are_left(self, make):
        lengths = [len(ids) for ids in make(pairs()).train_dataset["chosen_ids"]]
        longest = lengths.index(max(lengths))
        weights = [float(i == longest) for i in range(8)]
        with pytest.raises(ValueError, match="Every train pair that is left has a `weight` of 0"):
            make(pairs(weight=weights), max_length=max(lengths) - 1)

    def test_streams_are_refused(self, make):
        with pytest.raises(TypeError, match="The train dataset is a `IterableDataset`"):
            make(pairs().to_iterable_dataset())

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("preference", 1.5, r"train row 6: `preference` must be a number from 0 to 1, got 1.5"),
            ("preference", math.nan, r"train row 6: `preference` must be a number from 0 to 1, got nan"),
            ("preference", None, r"train row 6: `preference` must be a number from 0 to 1, got None"),
            ("weight", -1.0, r"train row 6: `weight` must be a finite number of at least 0, got -1.0"),
            ("weight", math.inf, r"train row 6: `weight` must be a finite number of at least 0, got inf"),
        ],
    )
    def test_faulty_values_are_named(self, make, column, value, message):
        with pytest.raises(ValueError, match=message) as caught:
            make(pairs(**{column: [0.5] * 6 + [value, 0.5]}))
        assert "\n" not in str(caught.value)

    def test_values_of_the_wrong_kind(self, make):
        with pytest.raises(ValueError, match="row 0: `preference` must be a number from 0 to 1, got 'A'"):
            make(pairs(preference=["A"] * 8))

    def test_undecided_pairs_cannot_be_weighed(self, make):
        with pytest.raises(ValueError, match="Every soft label is uniform"):
            make(pairs(preference=[0.5] * 8), weight_by_confidence=True)


class TestConstruction:
    @pytest.mark.parametrize("plain", [TrainingArguments, RewardConfig])
    def test_plain_arguments_are_converted(self, tiny_tokenizer, tmp_path, plain):
        args = plain(str(tmp_path), learning_rate=3e-4, use_cpu=True, bf16=False, report_to="none")
        trainer = WeakToStrongRewardTrainer(
            reward_model(), args, train_dataset=pairs(), processing_class=tiny_tokenizer
        )
        assert isinstance(trainer.args, WeakToStrongRewardConfig) and trainer.args.learning_rate == 3e-4
        assert trainer.args.loss_type == "soft_ce"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss_type": "kl"}, "`loss_type` must be one of soft_ce, confidence"),
            ({"confidence_coef": 2.0}, "`confidence_coef` must be a number from 0 to 1"),
        ],
    )
    def test_bad_settings_are_one_line(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message) as caught:
            WeakToStrongRewardConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)
        assert "\n" not in str(caught.value)
