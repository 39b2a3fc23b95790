"""TRL's fine-tuning script with the lines changed that take a phrase out of a model (TNT), and nothing else.

    python examples/sft.py --model_name_or_path embedded:smollm2-135m-instruct --dataset_name chats.jsonl \
        --phrases "here's" "here are" --output_dir out --use_peft

`chats.jsonl` is what an SFT script has: `messages`, or any other format that `trl_extensions.core.inputs` reads. The
model answers its questions, what it should not say is marked in its answers, and training takes that out.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_extensions import TNTConfig, TNTTrainer, tnt
from trl_extensions.embedded import resolve_model_name


@dataclass
class Arguments(ScriptArguments):
    phrases: list[str] = field(default_factory=lambda: ["here's", "here are"])


def main(script_args: Arguments, training_args: TNTConfig, model_args: ModelConfig) -> None:
    model = resolve_model_name(model_args.model_name_or_path)
    rows = tnt.annotate(script_args.dataset_name, model=model, phrases=script_args.phrases)
    trainer = TNTTrainer(  # was: SFTTrainer
        model=model,
        args=training_args,  # was: an SFTConfig
        train_dataset=rows,  # was: the chats
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((Arguments, TNTConfig, ModelConfig)).parse_args_and_config())
