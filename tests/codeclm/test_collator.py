"""`DataCollatorForCodecLM`: token for token what `SFTTrainer` makes of the same rows, and what it does beyond that."""

import json

import pytest
import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from tests.codeclm.exported import exported_rows
from trl_extensions import DataCollatorForCodecLM
from trl_extensions.codeclm.weighted_loss import RowWeighing, pair_of


def texts():
    return [
        {"prompt": row["prompt"][0]["content"], "completion": " " + row["completion"][0]["content"]}
        for row in exported_rows()
    ]


def messages():
    return [{"messages": row["prompt"] + row["completion"]} for row in exported_rows()]


def systems():
    system = [{"role": "system", "content": "Be kind."}]
    return [row | {"prompt": system + row["prompt"]} for row in exported_rows()]


@pytest.fixture
def trainer_of(tmp_path, tiny_model, tiny_tokenizer):
    def build(rows, **settings):
        options = {name: settings.pop(name) for name in ("data_collator", "callbacks") if name in settings}
        defaults = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
        config = SFTConfig(str(tmp_path / "out"), per_device_train_batch_size=4, **(defaults | settings))
        return SFTTrainer(
            tiny_model, config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer, **options
        )

    return build


def assert_same_batch(one, other):
    assert one.keys() == other.keys() == {"input_ids", "attention_mask", "labels"}
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype == torch.int64
        assert torch.equal(tensor, other[name]), name


def learned(batch, tokenizer):
    return [
        tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


@pytest.mark.parametrize("make", [exported_rows, texts, systems])
@pytest.mark.parametrize("settings", [{}, {"max_length": 50}, {"pad_to_multiple_of": 16}, {"max_length": None}])
def test_it_is_trls_collator(trainer_of, tiny_tokenizer, make, settings):
    trainer = trainer_of(make(), **settings)
    theirs = trainer.data_collator([
        {name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset
    ])  # fmt: skip
    collator = DataCollatorForCodecLM(tiny_tokenizer, **settings)
    kept = [row for row in make() if not _is_too_long(collator, row)]  # TRL leaves them out
    assert len(kept) == len(trainer.train_dataset) > 1
    assert_same_batch(collator(kept), theirs)
    assert_same_batch(collator(list(trainer.train_dataset)), theirs)  # rows that TRL prepared


def _is_too_long(collator, row):
    try:
        collator([row])
    except ValueError as error:
        assert "nothing is left to learn" in str(error)
        return True
    return False


@pytest.mark.parametrize("skip", [False, True])
def test_a_plain_trainer_learns_the_same_with_it(trainer_of, tiny_tokenizer, skip):
    settings = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
    state = None
    losses = []
    for collator in (None, DataCollatorForCodecLM(tiny_tokenizer)):
        own = dict(settings)
        if collator is not None and skip:
            own |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        trainer = trainer_of(exported_rows(), data_collator=collator, **own)
        if state is None:
            state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.model.load_state_dict(state)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_rows_as_they_come_from_the_file(tmp_path, tiny_tokenizer):
    path = tmp_path / "data.jsonl"
    rows = exported_rows()
    rows[0]["scores"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    collator = DataCollatorForCodecLM(tiny_tokenizer, weight_by="metadata").fit(dataset)
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collator))
    assert len(batches) == 2
    for start, batch in zip((0, 4), batches, strict=True):
        plain = DataCollatorForCodecLM(tiny_tokenizer)(rows[start : start + 4])
        assert batch["loss_weights"].mean().item() == pytest.approx(1.0)
        batch.pop("loss_weights")
        assert_same_batch(batch, plain)


def test_what_is_learned(tiny_tokenizer):
    collator = DataCollatorForCodecLM(tiny_tokenizer)
    expected = [row["completion"][0]["content"] + "<|im_end|>\n" for row in exported_rows()]
    assert learned(collator(exported_rows()), tiny_tokenizer) == expected
    assert_same_batch(collator(messages()), collator(exported_rows()))
    plain = learned(collator(texts()), tiny_tokenizer)
    assert plain == [f" {row['completion'][0]['content']}<|im_end|>" for row in exported_rows()]


def test_of_a_conversation_the_last_turn_is_learned(tiny_tokenizer):
    turns = ["Name an animal.", "A fox.", "Why?", "It jumps."]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    batch = DataCollatorForCodecLM(tiny_tokenizer)([{"messages": chat}])
    assert learned(batch, tiny_tokenizer) == ["It jumps.<|im_end|>\n"]
    twice = [*chat, {"role": "assistant", "content": "Over dogs."}]
    # Both turns at the end are one answer, what stands between them included
    ids = DataCollatorForCodecLM(tiny_tokenizer)([{"messages": twice}])
    assert learned(ids, tiny_tokenizer) == ["It jumps.<|im_end|>\n<|im_start|>assistant\nOver dogs.<|im_end|>\n"]


def test_text_that_is_templated_already(tiny_tokenizer):
    rows, collator = exported_rows(), DataCollatorForCodecLM(tiny_tokenizer)
    prompts = [
        tiny_tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows
    ]
    whole = [tiny_tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in rows]
    split = [{"prompt": p, "completion": w[len(p) :]} for p, w in zip(prompts, whole, strict=True)]
    reference = collator(rows)
    assert_same_batch(collator(split), reference)
    assert_same_batch(collator([{"text": text} for text in whole]), reference)


def test_a_beginning_that_is_there_is_not_added_again(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tiny_tokenizer.bos_token_id)]
    )
    collator = DataCollatorForCodecLM(tiny_tokenizer)
    bare = collator([{"prompt": "Hi", "completion": " Yes."}])
    assert bare["input_ids"][0, 0] == tiny_tokenizer.bos_token_id
    assert_same_batch(collator([{"prompt": "<|im_start|>Hi", "completion": " Yes."}]), bare)


def test_another_template_and_its_tools(tiny_tokenizer):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}{% if tools %}T{% endif %}"
    collator = DataCollatorForCodecLM(tiny_tokenizer, chat_template=template)
    row = exported_rows(3)[2]
    assert learned(collator([row]), tiny_tokenizer) == ["[assistant]Yes.;"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with_tools = collator([row | {"tools": json.dumps([tool])}])
    assert tiny_tokenizer.decode(with_tools["input_ids"][0]) == "[user]Be brief.;[assistant]Yes.;T"


class TestWeights:
    def test_by_gap(self, tiny_tokenizer):
        # Gaps 4, -5, 8, 3.5, clipped at 6: 4 + 5 + 6 + 3.5 = 18.5 over four rows
        batch = DataCollatorForCodecLM(tiny_tokenizer, weight_by="gap")(exported_rows(4))
        assert batch["loss_weights"].dtype == torch.float32
        assert batch["loss_weights"].tolist() == pytest.approx([w * 4 / 18.5 for w in (4, 5, 6, 3.5)])
        batch = DataCollatorForCodecLM(tiny_tokenizer, weight_by="gap", gap_range=(4.5, 5))(exported_rows(4))
        assert batch["loss_weights"].tolist() == pytest.approx([w * 4 / 19 for w in (4.5, 5, 5, 4.5)])

    def test_by_metadata(self, tiny_tokenizer):
        # Rows of cooking/timing: 3, science/optics: 2, science/zoology: 1, cooking/drinks: 2
        collator = DataCollatorForCodecLM(tiny_tokenizer, weight_by="metadata").fit(exported_rows())
        assert collator.pair_counts[pair_of("cooking", ["timing"])] == 3
        weights = collator(exported_rows(4))["loss_weights"]  # raw 1/3, 1/2, 1/3, 1
        assert weights.tolist() == pytest.approx([w * 4 / (13 / 6) for w in (1 / 3, 1 / 2, 1 / 3, 1)])
        counts = {pair_of("cooking", ["timing"]): 3, pair_of("science", ["optics"]): 2}
        given = DataCollatorForCodecLM(tiny_tokenizer, weight_by="metadata", pair_counts=counts)
        assert torch.equal(given(exported_rows(4))["loss_weights"], weights)

    @pytest.mark.parametrize("by", ["gap", "metadata"])
    def test_a_mean_over_the_data_does_not_depend_on_batches(self, tiny_tokenizer, by):
        rows = exported_rows()
        collator = DataCollatorForCodecLM(tiny_tokenizer, weight_by=by, mean_over="data").fit(Dataset.from_list(rows))
        whole = collator(rows)["loss_weights"]
        assert whole.mean().item() == pytest.approx(1.0)
        assert torch.equal(torch.cat([collator([row])["loss_weights"] for row in rows]), whole)
        assert len(set(whole.tolist())) > 2

    def test_a_batch_of_one_is_warned_of(self, tiny_tokenizer, monkeypatch):
        monkeypatch.setattr(RowWeighing, "active", 0)
        collator = DataCollatorForCodecLM(tiny_tokenizer, weight_by="gap")
        with pytest.warns(UserWarning, match="a batch of one row weighs 1") as warned:
            assert collator(exported_rows(1))["loss_weights"].tolist() == [1.0]
        assert any("no trainer looks at by itself" in str(own.message) for own in warned)

    def test_columns_that_a_trainer_dropped(self, trainer_of, tiny_tokenizer):
        collator = DataCollatorForCodecLM(tiny_tokenizer, weight_by="gap")
        trainer = trainer_of(exported_rows(), data_collator=collator, max_steps=1, disable_tqdm=True)
        with pytest.raises(ValueError, match=r"row 0 of the batch: no column `scores`.*remove_unused_columns=False"):
            trainer.train()


USER, ANSWER = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Yes."}]


class TestBadInput:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({}, "neither `prompt` and `completion`, nor `messages`"),
            ({"question": "Hi", "text": None}, r"it has \['lineage', 'question'\]"),
            (
                {"prompt": "Hi", "completion": ANSWER},
                "`prompt` must be a list of messages, or both as texts, got 'Hi'",
            ),
            ({"prompt": USER, "completion": "Yes."}, "`completion` must be a list of messages, or both as texts"),
            ({"prompt": USER, "completion": None}, "`completion` must be a list of messages, got None"),
            ({"prompt": USER, "completion": []}, r"`completion` must be a list of messages, got \[\]"),
            ({"prompt": USER, "completion": USER}, "`completion` ends with the turn of 'user'"),
            ({"prompt": USER, "completion": [{"role": "assistant", "content": " "}]}, "ends `completion` is empty"),
            ({"prompt": [{"role": "user"}], "completion": ANSWER}, "a message of `prompt` needs the texts `role`"),
            ({"prompt": ["Hi"], "completion": ANSWER}, "a message of `prompt` needs the texts"),
            ({"prompt": "Hi", "completion": " "}, "`completion` is empty"),
            ({"messages": USER}, "`messages` ends with the turn of 'user'"),
            ({"messages": ANSWER}, "no turn before the answer"),
            ({"text": "Once upon a time."}, r"`text` has no answer: '<\|im_start\|>assistant"),
            ({"input_ids": [1, 2], "labels": [1]}, "2 `input_ids` but 1 labels"),
            ({"input_ids": [5, 6], "labels": [-100, -100]}, "nothing is left to learn"),
            ({"input_ids": [5, 6, 7], "seq_lengths": [1, 2]}, "leave `packing` off"),
            (
                {"prompt": [{"role": "user", "content": "Hi " * 400}], "completion": ANSWER},
                r"64 tokens \(max_length\)",
            ),
        ],
    )
    def test_the_row_is_named(self, tiny_tokenizer, row, message):
        good, bad = exported_rows(1)[0], row | {"lineage": {"id": "m001-i0007"}}
        with pytest.raises(ValueError, match=rf"^row 1 of the batch \(m001-i0007\): .*{message}") as error:
            DataCollatorForCodecLM(tiny_tokenizer, max_length=64)([good, bad])
        assert "\n" not in str(error.value)

    def test_what_is_no_row(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="row 0 of the batch: not an object with named columns, but str"):
            DataCollatorForCodecLM(tiny_tokenizer)(["Hi"])

    def test_a_tokenizer_without_template(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"row 0 of the batch.*the tokenizer has no chat template"):
            DataCollatorForCodecLM(tiny_tokenizer)(exported_rows(1))
        with pytest.raises(ValueError, match="does not tell where the answer begins"):
            DataCollatorForCodecLM(tiny_tokenizer)([{"text": "Hi. Yes."}])
        assert DataCollatorForCodecLM(tiny_tokenizer)(texts())["input_ids"].shape[0] == 8

    def test_rows_to_fit_are_named(self, tiny_tokenizer):
        rows = exported_rows(3)
        rows[2]["scores"] = None
        collator = DataCollatorForCodecLM(tiny_tokenizer, weight_by="gap")
        with pytest.raises(ValueError, match=r"^row 2 \(m002-i0002\): `scores.gap` is empty"):
            collator.fit(rows)
        with pytest.raises(ValueError, match="no rows"):
            collator.fit([])

    @pytest.mark.parametrize("settings", [{"weight_by": "metadata"}, {"weight_by": "gap", "mean_over": "data"}])
    def test_what_needs_fit(self, tiny_tokenizer, settings):
        with pytest.raises(ValueError, match=r"call `collator.fit\(train_dataset\)` first"):
            DataCollatorForCodecLM(tiny_tokenizer, **settings)(exported_rows(2))

    @pytest.mark.parametrize(
        "settings",
        [
            {"weight_by": "length"},
            {"mean_over": "epoch"},
            {"gap_range": (0, 3)},
            {"gap_range": (4, 3)},
            {"max_length": 1},
        ],
    )
    def test_arguments(self, tiny_tokenizer, settings):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
            DataCollatorForCodecLM(tiny_tokenizer, **settings)
