"""TRL's preference script with the lines changed that need no preferences (SAMI): principles in their place.

    python examples/dpo.py --model_name_or_path embedded:smollm2-135m-instruct --dataset_name chats.jsonl \
        --principles recipes/smollm2-135m/sami/principles.yaml --output_dir out --use_peft

Of each chat in `chats.jsonl` the first question counts. The model answers it under two constitutions made of the
principles, and training makes the two answers tell which one they were written under.
"""

from dataclasses import dataclass

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_extensions import SAMIConfig, SAMITrainer, sami
from trl_extensions.embedded import resolve_model_name


@dataclass
class Arguments(ScriptArguments):
    principles: str = "principles.yaml"
    max_new_tokens: int = 128


def main(script_args: Arguments, training_args: SAMIConfig, model_args: ModelConfig) -> None:
    model = resolve_model_name(model_args.model_name_or_path)
    questions, tokens = script_args.dataset_name, script_args.max_new_tokens
    rows = sami.sample(model, questions, script_args.principles, max_new_tokens=tokens)
    trainer = SAMITrainer(  # was: DPOTrainer
        model=model,
        args=training_args,  # was: a DPOConfig
        train_dataset=rows,  # was: pairs of a chosen and a rejected answer
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((Arguments, SAMIConfig, ModelConfig)).parse_args_and_config())
