"""A TRL fine-tuning script with one class swapped: SFTTrainer -> SAMITrainer.

    python examples/sami.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name rows.jsonl \
        --output_dir out --use_peft --learning_rate 1e-4

`rows.jsonl` has `prompts` and `completions`, as `trl-ext sami sample` writes them.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_extensions import SAMIConfig, SAMITrainer


def main(script_args: ScriptArguments, training_args: SAMIConfig, model_args: ModelConfig) -> None:
    dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
    trainer = SAMITrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SAMIConfig, ModelConfig)).parse_args_and_config())
