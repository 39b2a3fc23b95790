"""TRL's reward script with the lines changed that let weak models label, and a strong one learn it: weak-to-strong.

    python examples/reward.py --model_name_or_path embedded:smollm2-135m-instruct --dataset_name labels_train.csv \
        --unlabelled labels_test.csv --weak_models sklearn:tfidf-logreg sklearn:naive-bayes --output_dir out --use_peft

The files have `text` and `label`, names or numbers; labels of the second are not looked at. For pairs (`chosen`,
`rejected`) give `label` `task="reward"` and take `WeakToStrongRewardConfig` and `WeakToStrongRewardTrainer`.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_extensions import WeakToStrongConfig, WeakToStrongTrainer, weak_to_strong
from trl_extensions.embedded import resolve_model_name


@dataclass
class Arguments(ScriptArguments):
    unlabelled: str = "unlabelled.csv"
    weak_models: list[str] = field(default_factory=lambda: ["sklearn:tfidf-logreg", "sklearn:naive-bayes"])


def main(script_args: Arguments, training_args: WeakToStrongConfig, model_args: ModelConfig) -> None:
    rows = weak_to_strong.label(script_args.dataset_name, script_args.unlabelled, script_args.weak_models)
    model_args.lora_task_type = "SEQ_CLS"
    trainer = WeakToStrongTrainer(  # was: RewardTrainer
        model=resolve_model_name(model_args.model_name_or_path),
        args=training_args,  # was: a RewardConfig
        train_dataset=rows,  # was: pairs that people labelled
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((Arguments, WeakToStrongConfig, ModelConfig)).parse_args_and_config())
