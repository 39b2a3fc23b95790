"""Settings of CodecLM (arXiv 2404.05875): what is made, and what the commands do with it."""

from dataclasses import dataclass, field
from pathlib import Path

from ..core.inputs import SourceArguments
from ..core.judge.pairwise import JudgeArguments
from ..core.options import check_choices, check_least, option, renamed


@renamed(
    near_duplicates="dedup_threshold", benchmarks="decontaminate_against", screen="screens",
    safety_classifier="screens", seeds="prompts", seed_column="prompt_column", num_seeds="num_prompts",
)  # fmt: skip
@dataclass
class CodecLMConfig(SourceArguments):
    """What is made, from what, and what is kept. The defaults are the published ones where there are any.

    Engines are named by a model (an id or directory, which runs in this process), or by a dict with `engine`, `model`
    and what `EngineArguments` calls `engine_*`, without that prefix. Raises a `ValueError` that names the field for a
    value outside its range or choices, or two that exclude each other.
    """

    prompts: str | None = option(None, "Seed instructions: a .jsonl, .json, .csv, .txt, ... file, or a data set.")
    metadata: str | None = option(
        None, "Instead of them: a YAML or JSONL file of use cases and skills; `trl-ext codeclm metadata` writes one."
    )
    strong: str | None = option(None, "The model that writes: an engine, see the docs.")
    target: str | None = option(None, "The model the data is for: an engine. Default: the model to be trained.")
    scorer: str | None = option(None, "The model that scores answers: an engine. Default: the strong one.")
    prompt_folder: str | None = option(None, "Folder of Jinja files, in place of those of the same name.")
    language: str | None = option(
        None,
        "Language of instructions and answers (ISO 639-1 code, such as ja, or pt-BR): every prompt asks for it, and "
        "what comes in another one is turned back.",
    )
    audience: str | None = option(
        None, "Who gives the instructions and reads the answers, such as `pupils in Osaka`: every prompt says so."
    )
    num_instructions: int = option(100, "Basic instructions to start from.")
    allocation: str = option(
        "equal", "Instructions of each metadata: `equal`, or `proportional` to its seeds, or `weight` in the file.",
        "equal", "proportional",
    )  # fmt: skip
    pairing: str = option("encoded", "Skills as they came with the use case, or drawn from all.", "encoded", "sampled")
    max_skills: int = option(3, "Most skills of a use case.")
    instructions_per_call: int = option(5, "Basic instructions asked for at once.")
    rewrite: str = option(
        "rubrics", "What makes instructions harder: `rubrics` (Self-Rubrics), `evol` (fixed rewrites) or `none`.",
        "rubrics", "evol", "none",
    )  # fmt: skip
    num_rubrics: int = option(4, "Rubrics, and actions, for each metadata.")
    max_rounds: int = option(
        4, "Most rounds: an instruction is rewritten in each, by another action, and then looked at by `selection`."
    )
    selection: str = option(
        "gap",
        "`gap`: keep the first rewrite on which strong and target differ by more than `gap_threshold` (contrastive "
        "filtering); `random`: a rewrite drawn at random, `all`: the last one; both with the strong model's "
        "answer, unscored.",
        "gap", "random", "all",
    )  # fmt: skip
    gap_threshold: float = option(3.0, "Smallest difference of scores, not included.")
    scoring: str = option(
        "text", "`text`: the scorer writes two numbers from 1 to 10; `logprobs`: the expected score by probabilities.",
        "text", "logprobs",
    )  # fmt: skip
    temperature: float = option(0.7, "Of everything the strong model writes but answers.")
    answer_temperature: float = option(0.7, "Of both models' answers.")
    score_temperature: float = option(0.0, "Of the scorer.")
    top_p: float = option(1.0, "Nucleus of everything that is sampled.")
    max_new_tokens: int = option(512, "Longest metadata, list or instruction, in tokens.")
    max_answer_tokens: int = option(1024, "Longest answer, in tokens.")
    max_score_tokens: int = option(64, "Longest reply of the scorer, in tokens; one that thinks aloud needs more.")
    min_words: int = option(3, "Drop instructions of fewer words.")
    max_words: int = option(400, "Drop instructions of more words.")
    max_answer_words: int | None = option(None, "Drop answers of more words.")
    keep_truncated: bool = option(False, "Keep answers that were cut off by `max_answer_tokens`.")
    dedup_threshold: float = option(0.7, "Drop near-duplicates: Jaccard similarity of word 3-grams; 1: only copies.")
    decontaminate_against: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation prompts: drop what shares 13 words in a row with them."}
    )
    languages: list[str] = field(
        default_factory=list,
        metadata={"help": "Keep only instructions in these (ISO 639-1 codes, such as en). Default: `language`."},
    )
    screens: list[str] = field(
        default_factory=list,
        metadata={"help": "Drop pairs by these: `profanity`, `pii`, `bias`, or a classifier, `model[:label]`."},
    )
    screen_threshold: float = option(0.5, "Drop at this probability or more.")
    max_rows: int | None = option(None, "Export at most this many pairs, drawn at random.")
    max_calls: int | None = option(None, "Stop after this many calls of models; run again with more to go on.")
    max_tokens: int | None = option(None, "Stop after this many tokens, read and written; likewise.")

    def __post_init__(self):
        super().__post_init__()
        if self.prompts and self.metadata:
            raise ValueError("`prompts` and `metadata` exclude each other: instructions start from one of them.")
        check_choices(self, "allocation", "pairing", "rewrite", "selection", "scoring")
        check_least(
            self, num_instructions=1, max_skills=1, instructions_per_call=1, num_rubrics=1, max_rounds=1,
            max_new_tokens=1, max_answer_tokens=1, max_score_tokens=1, min_words=1, max_words=1,
        )  # fmt: skip
        optional = ("max_answer_words", "max_rows", "max_calls", "max_tokens")
        check_least(self, 10**15, **{name: 1 for name in optional if getattr(self, name) is not None})
        for name, low, high in (
            ("temperature", 0, 2), ("answer_temperature", 0, 2), ("score_temperature", 0, 2), ("top_p", 1e-6, 1),
            ("gap_threshold", 0, 9), ("dedup_threshold", 0.01, 1), ("screen_threshold", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"`{name}` must be between {low:g} and {high:g}, got {value!r}.")
        for name in ("decontaminate_against", "languages", "screens"):
            value = getattr(self, name) or []
            setattr(self, name, [value] if isinstance(value, str) else value)
        if self.language:
            self.languages = self.languages or [self.language]
            if base_language(self.language) not in map(base_language, self.languages):
                raise ValueError(f"`languages` {self.languages} lack the `language` {self.language!r}: add it.")
        if self.prompt_folder and not Path(self.prompt_folder).is_dir():
            raise ValueError(f"`prompt_folder`: {self.prompt_folder} is no folder.")


def base_language(code: str) -> str:
    """The language of a code that may have a region or a script: pt of pt-BR."""
    return code.replace("_", "-").partition("-")[0].lower()


# What may change between a kill and the restart: budgets, and what is looked at only when pairs are exported
MUTABLE_FIELDS = {
    "max_calls", "max_tokens", "max_rows", "max_answer_words", "keep_truncated", "screens", "screen_threshold",
}  # fmt: skip


@dataclass
class CodecLMArguments(JudgeArguments):
    """What the commands do with the pairs. One YAML serves all of them."""

    train: bool = option(
        False, "run: fine-tune the target and compare it, before and after; brings the options of trainer and model."
    )
    weight_by: str | None = option(
        None, "train: weigh rows by their `gap`, or so that each `metadata` counts alike. Default: alike.",
        "gap", "metadata",
    )  # fmt: skip
    validation_share: float = option(0.1, "train: share of the pairs held out, to see what their likelihood becomes.")
    benchmark: str | None = option(None, "train: prompts to compare models on: a file or data set. None: do not.")
    benchmark_column: str | None = option(None, "Its column; guessed if left out.")
    num_benchmark_prompts: int | None = option(None, "Use at most this many.")
    description: str | None = option(None, "metadata: what the instructions should be like, in a few sentences.")
    num_metadata: int = option(20, "metadata: how many to propose.")
    output: str | None = option(None, "metadata: the YAML file to write. Default: output_dir/metadata.yaml.")
    format: str = option("prompt_completion", "export: columns of data.jsonl.", "prompt_completion", "messages")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, num_metadata=1)
        if self.num_benchmark_prompts is not None:
            check_least(self, num_benchmark_prompts=2)
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"`validation_share` must be at least 0 and below 1, got {self.validation_share!r}.")
        check_choices(self, "format", *(["weight_by"] if self.weight_by is not None else []))
