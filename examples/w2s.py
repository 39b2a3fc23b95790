"""A TRL reward-model script's neighbour: a classifier that learns from a weaker model's soft labels.

    python examples/w2s.py --model_name_or_path Qwen/Qwen2.5-7B --dataset_name weak_labels.jsonl --output_dir out \
        --use_peft --loss_type confidence

`weak_labels.jsonl` has `text` and `soft_labels`, as `trl-ext w2s label` writes them. For preferences swap in
`WeakToStrongRewardTrainer` and its config (`chosen`, `rejected`, `preference`), for text `WeakToStrongSFTTrainer`.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_extensions import WeakToStrongConfig, WeakToStrongTrainer


def main(script_args: ScriptArguments, training_args: WeakToStrongConfig, model_args: ModelConfig) -> None:
    dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
    trainer = WeakToStrongTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset.select_columns(["text", "soft_labels"]),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, WeakToStrongConfig, ModelConfig)).parse_args_and_config())
