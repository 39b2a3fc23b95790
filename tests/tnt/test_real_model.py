"""The embedded real model loses a word it would have written, and keeps what it writes elsewhere."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_extensions import TNTConfig, TNTTrainer
from trl_extensions.core.generation import TransformersEngine
from trl_extensions.core.generation.types import GenerationParams
from trl_extensions.embedded import ensure_embedded_model
from trl_extensions.tnt.scores import score_rows


pytestmark = pytest.mark.slow

QUESTIONS = ["Why is the sky blue?", "How do I boil an egg?", "What is compost?", "Why do cats purr?"]


def test_the_first_word_of_some_answers_goes(tmp_path):
    path = ensure_embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = dict(TransformersEngine(model, tokenizer).generate(prompts, GenerationParams(16)))
    rows = []
    for i, prompt in enumerate(prompts):
        text = answers[i].text
        # The first word of every second answer is unwanted; the other answers are to stay
        spans = [[0, len(text.split()[0])]] if i % 2 == 0 else []
        completion = [{"role": "assistant", "content": text}]
        rows.append({"prompt": prompt, "completion": completion, "negative_spans": spans, "truncated": True})
    args = TNTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4, max_steps=12,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", alpha=3.0,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = TNTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    scores = score_rows(trainer.model, tokenizer, rows)
    unwanted, clean = scores[0::2], scores[1::2]
    assert all(score["prob_negative_original"] > 0.2 for score in unwanted)
    before, after = (sum(score[name] for score in unwanted) for name in ("prob_negative_original", "prob_negative"))
    assert after < 0.3 * before
    assert sum(s["kl_kept"] for s in clean) / sum(s["kept_tokens"] for s in clean) < 0.2
