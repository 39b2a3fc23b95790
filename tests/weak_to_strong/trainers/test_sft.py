"""`WeakToStrongSFTTrainer`: text and token distributions of a weak model, against `SFTTrainer` and the definitions."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.conftest import make_tiny_model
from trl_extensions import WeakToStrongSFTConfig, WeakToStrongSFTTrainer


VOCABULARY = 384
PAIRS = [
    ("How long does an egg boil?", " Seven minutes."),
    ("Why is the sky blue?", " The air scatters blue light more than red light, in every direction."),
    ("Be brief.", " Yes."),
    ("Name an animal.", " A quick brown fox, which jumps over lazy dogs."),
    ("Count to three.", " 1, 2, 3."),
    ("What is tea?", " Leaves in boiling water."),
    ("And coffee?", " Beans, ground and put into boiling water, and then filtered with much care."),
    ("Say nothing.", " No."),
]
WEIGHTS = [1.0, 0.25, 3.0, 0.0, 1.5, 2.0, 0.5, 1.0]
DEFAULTS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8, "max_steps": 1,
    "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
    "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "max_grad_norm": 0.0,
}  # fmt: skip


def rows_of(number=8, weighted=False):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS[:number]]
    return Dataset.from_list([row | {"weight": w} if weighted else row for row, w in zip(rows, WEIGHTS, strict=False)])


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    """Builds a trainer on the tiny model: float32, one SGD step over the whole data, so gradients can be read off."""

    def build(dataset, *, trainer=WeakToStrongSFTTrainer, model=None, weak_model=None, settings=None, **arguments):
        config = SFTConfig if trainer is SFTTrainer else WeakToStrongSFTConfig
        if weak_model is not None:
            arguments = {"weak_model": weak_model, "weak_processing_class": tiny_tokenizer} | arguments
        return trainer(
            model if model is not None else make_tiny_model(VOCABULARY),
            config(str(tmp_path / "out"), **(DEFAULTS | (settings or {}))),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            **arguments,
        )

    return build


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(one, other, **tolerance):
    for name, value in weights_of(one).items():
        torch.testing.assert_close(other.get_parameter(name), value, msg=name, **(tolerance or {"atol": 0, "rtol": 0}))


def dense_rows(strong, weak, dataset, loss, common=VOCABULARY):
    """Per row: divergences `(N,)` of its scored tokens by their definition, from full logits."""
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_q = weak(ids).logits[0, :-1, :common].log_softmax(-1)
        log_p = strong(ids).logits[0, :-1, :common].log_softmax(-1)
        if loss == "forward_kl":
            divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        else:
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        yield divergence[labels[1:] != -100]


def assert_first_update(trainer, plain, loss):
    """Train one step, and compare with a plain gradient step of `loss` on `plain`, a copy of the model before."""
    loss.backward()
    trainer.train()
    assert float(steps(trainer)[0]["loss"]) == pytest.approx(loss.item(), rel=1e-3)
    for (name, after), before in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        gradient = before.grad if before.grad is not None else torch.zeros_like(before)
        torch.testing.assert_close(after, before - 0.1 * gradient, atol=1e-5, rtol=1e-4, msg=name)


def untouched_copy(trainer):
    plain = copy.deepcopy(trainer.model)
    plain.__dict__.pop("forward")  # TRL's, which is bound to the model that trains
    return plain


class TestHardText:
    @pytest.mark.parametrize("texts", [False, True])
    def test_without_weights_it_is_sft(self, make, texts):
        dataset = rows_of()
        if texts:
            dataset = Dataset.from_list([{"text": prompt + completion} for prompt, completion in PAIRS])
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        ours = make(dataset, settings=settings, eval_dataset=dataset)
        theirs = make(dataset, trainer=SFTTrainer, settings=settings, eval_dataset=dataset)
        ours.train()
        theirs.train()
        assert_same_weights(ours.model, theirs.model)
        names = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"}
        for mine, its in zip(steps(ours), steps(theirs), strict=True):
            assert {name: mine[name] for name in names} == {name: its[name] for name in names}
        assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-6)  # of one batch

    def test_a_weight_multiplies_its_rows_tokens(self, make):
        trainer = make(rows_of(weighted=True), settings={"shuffle_dataset": True})
        plain, total, tokens = untouched_copy(trainer), 0, 0
        for row in trainer.train_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            logps = plain(ids).logits[0, :-1].log_softmax(-1)
            scored = labels != -100
            total = total - row["weight"] * logps[scored].gather(-1, labels[scored][:, None]).sum()
            tokens += scored.sum()
        assert_first_update(trainer, plain, total / tokens)

    def test_weights_do_not_depend_on_micro_batches(self, make):
        one = make(rows_of(weighted=True))
        many = make(
            rows_of(weighted=True), settings={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        )
        one.train()
        many.train()
        assert_same_weights(many.model, one.model, atol=1e-6, rtol=1e-5)

    def test_weights_of_one_are_no_weights(self, make):
        weighted = make(rows_of().add_column("weight", [1] * 8))
        plain = make(rows_of())
        weighted.train()
        plain.train()
        assert_same_weights(weighted.model, plain.model)

    def test_weights_stay_with_their_rows(self, make, tiny_tokenizer):
        # The prompt of the second row fills the length, so TRL drops the row
        rows = [{"prompt": "short", "completion": " yes", "weight": 0.5}]
        rows += [{"prompt": "a long prompt without end " * 5, "completion": " no", "weight": 7.0}]
        rows += [{"prompt": "brief", "completion": " indeed", "weight": 2.0}]
        trainer = make(Dataset.from_list(rows), settings={"max_length": 16})
        texts = [tiny_tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]
        assert ["short" in texts[0], "brief" in texts[1], len(texts)] == [True, True, 2]
        assert list(trainer.train_dataset["weight"]) == [0.5, 2.0]
        batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        assert batch["weight"].tolist() == [0.5, 2.0]

    def test_evaluate_takes_raw_rows_with_and_without_weights(self, make):
        trainer = make(rows_of())
        plain = trainer.evaluate(rows_of(4))["eval_loss"]
        doubled = trainer.evaluate(rows_of(4).add_column("weight", [2.0] * 4))["eval_loss"]
        assert doubled == pytest.approx(2 * plain, rel=1e-5)
        assert trainer.predict(trainer.train_dataset).predictions.shape[-1] == VOCABULARY


class TestTokenDistributions:
    @pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
    @pytest.mark.parametrize(
        ("strong_rows", "weak_rows"), [(384, 384), (384, 400), (400, 390)], ids=["equal", "weak padded", "both padded"]
    )
    def test_first_update_is_the_dense_gradient(self, make, loss, strong_rows, weak_rows):
        weak = make_tiny_model(weak_rows, seed=1, hidden_size=16, intermediate_size=32, attention_dropout=0.5).train()
        trainer = make(
            rows_of(), model=make_tiny_model(strong_rows, tie_word_embeddings=False), weak_model=weak,
            settings={"token_loss": loss},
        )  # fmt: skip
        plain, fixed = untouched_copy(trainer), copy.deepcopy(weak).eval()
        divergences = torch.cat(
            list(dense_rows(plain, fixed, trainer.train_dataset, loss, common=min(strong_rows, weak_rows)))
        )
        before = weights_of(weak)
        assert_first_update(trainer, plain, divergences.mean())
        assert steps(trainer)[0]["kl/weak"] == pytest.approx(divergences.mean().item(), rel=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(weak).items())
        assert not weak.training and all(parameter.grad is None for parameter in weak.parameters())

    def test_a_weight_multiplies_its_rows_tokens(self, make):
        weak = make_tiny_model(VOCABULARY, seed=1)
        trainer = make(rows_of(weighted=True), weak_model=weak)
        plain = untouched_copy(trainer)
        rows = list(dense_rows(plain, weak, trainer.train_dataset, "forward_kl"))
        total = sum(weight * row.sum() for weight, row in zip(trainer.train_dataset["weight"], rows, strict=True))
        assert_first_update(trainer, plain, total / sum(map(len, rows)))
        unweighted = torch.cat(rows).mean().item()
        assert steps(trainer)[0]["kl/weak"] == pytest.approx(unweighted, rel=1e-4)

    def test_accumulation_is_one_large_batch(self, make):
        results = []
        for batch, accumulation in ((8, 1), (4, 2), (1, 8)):  # the rows differ in their number of tokens
            trainer = make(
                rows_of(), weak_model=make_tiny_model(VOCABULARY, seed=1),
                settings={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
                          "max_steps": 2},
            )  # fmt: skip
            trainer.train()
            results.append(trainer)
        for other in results[1:]:
            assert_same_weights(other.model, results[0].model, atol=1e-5, rtol=1e-4)
            for ours, theirs in zip(steps(other), steps(results[0]), strict=True):
                for name in ("loss", "grad_norm", "kl/weak", "num_tokens"):
                    assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3), name

    def test_sure_weak_model_is_sft(self, make):
        # Every token has one successor in these rows, and the weak model puts all its probability there
        rows = [list(range(10 * k + 3, 10 * k + 3 + length)) for k, length in enumerate((10, 7, 4, 9, 5))]
        dataset = Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows])
        settings = {"max_steps": 3, "per_device_train_batch_size": 5}
        ours = make(dataset, weak_model=successor_model(), settings=settings, eval_dataset=dataset)
        theirs = make(dataset, trainer=SFTTrainer, settings=settings, eval_dataset=dataset)
        assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-6)
        ours.train()
        theirs.train()
        assert_same_weights(ours.model, theirs.model, atol=1e-5, rtol=1e-4)
        for mine, its in zip(steps(ours), steps(theirs), strict=True):
            for name in ("loss", "grad_norm", "num_tokens"):
                assert float(mine[name]) == pytest.approx(float(its[name]), rel=1e-3), name

    def test_training_comes_near_the_weak_model(self, make):
        weak = make_tiny_model(VOCABULARY, seed=1, initializer_range=0.1)
        settings = {"max_steps": 40, "optim": "adamw_torch", "learning_rate": 5e-3, "max_grad_norm": 1.0}
        trainer = make(rows_of(), weak_model=weak, eval_dataset=rows_of(), settings=settings)
        before = trainer.evaluate()["eval_kl/weak"]
        trainer.train()
        assert trainer.evaluate()["eval_kl/weak"] < 0.5 * before

    def test_evaluate_is_the_mean_over_tokens(self, make):
        weak = make_tiny_model(VOCABULARY, seed=1)
        trainer = make(rows_of(), weak_model=weak, eval_dataset=rows_of(7), settings={"per_device_eval_batch_size": 3})
        report = trainer.evaluate()
        rows = list(dense_rows(untouched_copy(trainer), weak, trainer.eval_dataset, "forward_kl"))
        assert report["eval_kl/weak"] == pytest.approx(torch.cat(rows).mean().item(), rel=1e-5)
        assert report["eval_loss"] == pytest.approx(report["eval_kl/weak"], rel=1e-6)
        assert trainer.predict(trainer.train_dataset).predictions.shape[-1] == VOCABULARY
        assert trainer.evaluate()["eval_kl/weak"] == report["eval_kl/weak"]

    def test_a_batch_without_scored_tokens_counts_nothing(self, make):
        blank = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
        rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, blank]
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_length": None}
        both = make(Dataset.from_list(rows), weak_model=make_tiny_model(VOCABULARY, seed=1), settings=settings)
        alone = make(Dataset.from_list(rows[:1]), weak_model=make_tiny_model(VOCABULARY, seed=1))
        both.train()
        alone.train()
        assert_same_weights(both.model, alone.model, atol=1e-6, rtol=1e-5)

    def test_lora_changes_the_adapter_only(self, make):
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
        trainer = make(
            rows_of(), weak_model=make_tiny_model(VOCABULARY, seed=1), peft_config=lora,
            settings={"max_steps": 2, "gradient_checkpointing": True},
        )  # fmt: skip
        before = weights_of(trainer.model)
        trainer.train()
        changed = {name for name, value in weights_of(trainer.model).items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name for name in changed)
        assert math.isfinite(steps(trainer)[-1]["kl/weak"])

    def test_a_weak_model_by_name_brings_its_tokenizer(self, make, tiny_model_dir):
        named = make(rows_of(), model=make_tiny_model(384, seed=2), weak_model=str(tiny_model_dir),
                     weak_processing_class=None)  # fmt: skip
        given = make(rows_of(), model=make_tiny_model(384, seed=2), weak_model=make_tiny_model(384))
        assert named.evaluate(rows_of(2))["eval_loss"] == given.evaluate(rows_of(2))["eval_loss"]


def successor_model():
    """Says that after token i comes token i + 1, for sure: what a token is passes through, scaled up, unchanged."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=VOCABULARY, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.lm_head.weight.copy_(100 * torch.eye(VOCABULARY).roll(1, dims=0))
    return model


class TestConstruction:
    @pytest.mark.parametrize("plain", [TrainingArguments, SFTConfig])
    def test_plain_arguments_are_converted(self, tiny_tokenizer, tmp_path, plain):
        args = plain(str(tmp_path), learning_rate=3e-4, use_cpu=True, bf16=False, report_to="none")
        trainer = WeakToStrongSFTTrainer(
            make_tiny_model(VOCABULARY), args, train_dataset=rows_of(), processing_class=tiny_tokenizer
        )
        assert isinstance(trainer.args, WeakToStrongSFTConfig) and trainer.args.learning_rate == 3e-4

    def test_unknown_token_loss(self, tmp_path):
        with pytest.raises(ValueError, match="`token_loss` must be one of forward_kl, reverse_kl, got 'jsd'"):
            WeakToStrongSFTConfig(str(tmp_path), use_cpu=True, bf16=False, token_loss="jsd")

    @pytest.mark.parametrize(
        ("strong", "weak", "message"),
        [
            ([], ["zzz"], r"\(384 tokens\).*\(385 tokens\).* id 384: no token for the strong model, 'zzz' for the"),
            (["yyy"], ["zzz"], r"first in id 384: 'yyy' for the strong model, 'zzz' for the weak one. .* leave `weak"),
        ],
    )
    def test_vocabularies_must_agree(self, make, tiny_tokenizer, strong, weak, message):
        other = copy.deepcopy(tiny_tokenizer)
        other.add_tokens(weak)
        tiny_tokenizer.add_tokens(strong)
        model = make_tiny_model(385)
        with pytest.raises(ValueError, match=message) as caught:
            make(rows_of(), model=model, weak_model=make_tiny_model(385), weak_processing_class=other)
        assert "\n" not in str(caught.value)

    def test_every_token_needs_a_row(self, make):
        with pytest.raises(ValueError, match="ids up to 383, but the strong model has 384 rows and the weak one 380"):
            make(rows_of(), weak_model=make_tiny_model(380))

    def test_an_unknown_tokenizer(self, make):
        with pytest.raises(ValueError, match="pass `weak_processing_class`"):
            make(rows_of(), weak_model=make_tiny_model(VOCABULARY), weak_processing_class=None)

    def test_the_weak_model_is_not_the_strong_one(self, make):
        model = make_tiny_model(VOCABULARY)
        with pytest.raises(ValueError, match="same object"):
            make(rows_of(), model=model, weak_model=model)

    def test_prompt_learning_is_refused(self, make):
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="virtual tokens"):
            make(rows_of(), weak_model=make_tiny_model(VOCABULARY), peft_config=prefix)

    @pytest.mark.parametrize("what", ["`weak_model`", "the column `weight` of the train dataset"])
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"packing": True}, "`packing` does not work with {}: leave it at False"),
            ({"eval_packing": True}, "`eval_packing` does not work with {}"),
            ({"padding_free": True}, "`padding_free` does not work with {}"),
            ({"assistant_only_loss": True}, "`assistant_only_loss` does not work with {}"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` does not work with {}"),
            ({"loss_type": "dft"}, "`loss_type` does not work with {}"),
            ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "`skip_prepare_dataset` does not work with {}"),
        ],
    )
    def test_settings_that_would_lose_something(self, make, what, settings, message):
        weak = make_tiny_model(VOCABULARY) if what == "`weak_model`" else None
        with pytest.raises(ValueError, match=message.format(what)) as caught:
            make(rows_of(weighted=weak is None), weak_model=weak, settings=settings)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_streams_and_images(self, make, weighted):
        weak = None if weighted else make_tiny_model(VOCABULARY)
        with pytest.raises(TypeError, match="The train dataset is a `IterableDataset`"):
            make(rows_of(weighted=weighted).to_iterable_dataset(), weak_model=weak)
        with pytest.raises(ValueError, match="train dataset has images"):
            make(rows_of(weighted=weighted).add_column("image", [[0]] * 8), weak_model=weak)

    def test_a_plain_stream_trains(self, make):
        trainer = make(rows_of().to_iterable_dataset())
        trainer.train()
        assert math.isfinite(float(steps(trainer)[0]["loss"]))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (-0.5, "train row 5: `weight` must be a finite number of at least 0, got -0.5"),
            (math.nan, "train row 5: `weight` must be a finite number of at least 0, got nan"),
            (None, "train row 5: `weight` must be a finite number of at least 0, got None"),
        ],
    )
    def test_faulty_weights_are_named(self, make, value, message):
        dataset = rows_of().add_column("weight", [1.0] * 5 + [value] + [1.0] * 2)
        with pytest.raises(ValueError, match=message):
            make(dataset)

    def test_weights_of_nothing(self, make):
        with pytest.raises(ValueError, match="Every `weight` of the eval dataset is 0"):
            make(rows_of(), eval_dataset=rows_of().add_column("weight", [0.0] * 8))
