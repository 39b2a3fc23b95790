"""A TRL fine-tuning script with one class swapped: SFTTrainer -> TNTTrainer.

    python examples/tnt.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name rows.jsonl \
        --output_dir out --use_peft --learning_rate 1e-4 --alpha 5

`rows.jsonl` has `prompt`, `completion` and `negative_spans`, as `trl-ext tnt annotate` writes them.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_extensions import TNTConfig, TNTTrainer


def main(script_args: ScriptArguments, training_args: TNTConfig, model_args: ModelConfig) -> None:
    dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
    trainer = TNTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, TNTConfig, ModelConfig)).parse_args_and_config())
