"""A TRL fine-tuning script with one thing swapped: the collator, which weighs each pair by the gap it showed.

    python examples/codeclm.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name data.jsonl \
        --output_dir out --use_peft --learning_rate 1e-4

`data.jsonl` has `prompt`, `completion`, `metadata` and `scores`, as `trl-ext codeclm run` writes them. Without weights
(`weight_by=None`) the callback and `remove_unused_columns` can go too, and this is plain fine-tuning.
"""

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_extensions import DataCollatorForCodecLM
from trl_extensions.codeclm.weighted_loss import WeightedLoss


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    training_args.remove_unused_columns = False  # the collator needs the scores
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForCodecLM(tokenizer, weight_by="gap", mean_over="data").fit(dataset),
        callbacks=[WeightedLoss()],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
