"""One rank of a test: TNT with shared prompts on several processes, resumed in the middle of its second epoch."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_dir: str, output: str) -> None:
    from tests.distributed.launch import join, leave
    from tests.distributed.train import shared_rows
    from trl_extensions import TNTConfig, TNTTrainer

    join()

    def trainer_of() -> TNTTrainer:
        args = TNTConfig(
            output + "/run", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=1, max_steps=6,
            learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", save_strategy="steps", save_steps=4,
            gradient_checkpointing=False, share_prefix=True, seed=3,
        )  # fmt: skip
        return TNTTrainer(
            AutoModelForCausalLM.from_pretrained(model_dir),
            args,
            train_dataset=Dataset.from_list(shared_rows(6)),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
        )

    whole, resumed = trainer_of(), trainer_of()
    whole.train()
    resumed.train(resume_from_checkpoint=output + "/run/checkpoint-4")
    if whole.is_world_process_zero():
        pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
        result = {
            "processes": whole.accelerator.num_processes,
            "steps": resumed.state.global_step,
            "epoch": json.loads(Path(output, "run", "checkpoint-4", "trainer_state.json").read_text())["epoch"],
            "differ_by": max((one - other).abs().max().item() for one, other in pairs),
        }
        with open(output + "/result.json", "w") as file:
            json.dump(result, file)
    resumed.end()
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
