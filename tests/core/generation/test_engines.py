import gc
import json
import logging
import math
import subprocess
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import TrlParser

import trl_extensions.core.generation.vllm as vllm_module
from trl_extensions.core.generation import EngineArguments, TransformersEngine, VLLMEngine, create_engine
from trl_extensions.core.generation.types import Generation, GenerationParams, cut_at_stop, request_seed, sum_by_option
from trl_extensions.core.modeling.batches import Padding


PROMPTS = [
    "The quick brown fox",
    [{"role": "user", "content": "Tell me how to boil an egg."}],
    "Sky",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}],
    "Explain at length why the sky is blue, with every detail you know, and be friendly and warm.",
]


@pytest.fixture
def tiny_model(tiny_model):
    """With a head of its own: under tied weights a random model repeats itself, and the tests need varied text."""
    torch.manual_seed(1)
    tiny_model.lm_head.weight = torch.nn.Parameter(torch.randn_like(tiny_model.lm_head.weight) / 2)
    return tiny_model


def encode(tokenizer, prompt):
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def greedy_by_hand(model, tokenizer, prompt, length):
    """Generated ids: argmax of a full forward for every token; no cache, no padding, no batch, no end token."""
    ids = encode(tokenizer, prompt)
    start = len(ids)
    for _ in range(length):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids[start:]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip()


def run(engine, prompts, **params):
    results = list(engine.generate(prompts, GenerationParams(**params)))
    assert sorted(index for index, _ in results) == list(range(len(prompts))), "every index exactly once"
    return [generation for _, generation in sorted(results, key=lambda result: result[0])]


# Parameters and arguments


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": "\n"}, "stop must be a tuple"),
        ({"stop": ("",)}, "non-empty"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"schema": "{"}, "schema must be a JSON schema as text"),
        ({"schema": "[]"}, "schema must be a JSON schema as text .it is no object"),
        ({"schema": {"type": "object"}}, "schema must be a JSON schema as text"),
    ],
)
def test_bad_params(params, message):
    with pytest.raises(ValueError, match=message):
        GenerationParams(**params)


def test_stop_from_yaml_is_a_list():
    assert GenerationParams(stop=["a", "b"]) == GenerationParams(stop=("a", "b"))


def test_cut_at_stop():
    assert cut_at_stop("one two three", ("three", "two")) == "one"
    assert cut_at_stop("one \n", ()) == "one"
    assert cut_at_stop("one", ("x",)) == "one"
    assert cut_at_stop("xone", ("x",)) == ""


def test_sum_by_option():
    """By hand: 0.5 + 0.25 for 7, with every mark of a space in front; 8 is one token of three; 9 is not there."""
    listed = [
        ("7", 0.5),
        (" 7", 0.125),
        ("\u01207", 0.0625),
        ("\u25817\n", 0.0625),
        ("8", 0.1),
        ("88", 0.1),
        ("", 0.05),
    ]
    got = sum_by_option([(token, math.log(share)) for token, share in listed], ["7", "8", "9"])
    assert got == pytest.approx([math.log(0.75), math.log(0.1), -math.inf])
    assert sum_by_option([("7", -math.inf)], ["7"]) == [-math.inf] == sum_by_option([], ["7"])


def test_request_seeds_do_not_collide():
    seeds = [request_seed(seed, index) for seed in range(20) for index in range(50)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**31 for seed in seeds)


def test_arguments_from_command_line_and_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("engine: endpoint\nengine_base_url: http://localhost:1/v1\nengine_timeout: 60\n")
    (args,) = TrlParser(EngineArguments).parse_args_and_config(["--config", str(config), "--engine_concurrency", "3"])
    assert (args.engine, args.engine_base_url) == ("endpoint", "http://localhost:1/v1")
    assert (args.engine_timeout, args.engine_concurrency) == (60.0, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"engine": "tgi"}, "engine must be one of transformers, vllm, endpoint, got 'tgi'"),
        ({"engine": "endpoint"}, "needs engine_base_url"),
        ({"engine_base_url": "http://localhost"}, "engine_base_url needs engine: endpoint"),
        ({"engine_extra_body": "{top_k: 5}"}, "engine_extra_body needs engine: endpoint"),
        ({"engine": "vllm", "engine_omit": ["seed"]}, "engine_omit needs engine: endpoint"),
        ({"engine_batch_tokens": 0}, "engine_batch_tokens"),
        ({"engine_max_retries": -1}, "engine_max_retries"),
        ({"engine_gpu_memory_utilization": 1.5}, "engine_gpu_memory_utilization"),
        ({"engine_timeout": 0}, "engine_timeout"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        EngineArguments(**args)


def test_create_engine(tiny_model_dir, monkeypatch):
    engine = create_engine(EngineArguments(engine_batch_tokens=100), str(tiny_model_dir))
    assert isinstance(engine, TransformersEngine) and engine.batch_tokens == 100
    assert str(tiny_model_dir) in engine.name
    monkeypatch.setenv("MY_KEY", "secret")
    args = EngineArguments(
        engine="endpoint", engine_base_url="http://localhost:1", engine_model="m", engine_api_key_env="MY_KEY"
    )
    engine = create_engine(args, "ignored")
    assert (engine.name, engine.model, engine.base_url) == ("endpoint:m", "m", "http://localhost:1")
    with pytest.raises(ValueError, match="set engine_model"):
        create_engine(EngineArguments())


def test_importing_the_module_imports_no_torch():
    program = "import sys, trl_extensions.core.generation as g\ng.EngineArguments()\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# Batches


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_greedy_equals_argmax_of_full_forwards(tiny_model, tiny_tokenizer, batch_tokens):
    tiny_model.generation_config.eos_token_id = None
    tiny_tokenizer.eos_token = None
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_tokens=batch_tokens)
    expected = [greedy_by_hand(tiny_model, tiny_tokenizer, prompt, 24) for prompt in PROMPTS]
    got = run(engine, PROMPTS, max_new_tokens=24)
    assert got == [Generation(decode(tiny_tokenizer, ids), "length", 24) for ids in expected]
    assert len({generation.text for generation in got}) > 1


def test_places_by_hand(tiny_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    padding = Padding(engine)
    assert padding.share is None
    prompts = ["the fox", "the fox and the lazy dog"]
    short, long = (len(tiny_tokenizer(prompt)["input_ids"]) for prompt in prompts)
    lengths = [own.num_tokens for _, own in engine.generate(prompts, GenerationParams(4))]
    assert lengths == [4, 4] and short < long  # no row ended early
    assert padding.share == pytest.approx((long - short) / (2 * (long + 4)))
    alone = Padding(engine)
    assert len(list(engine.generate(prompts[:1], GenerationParams(4)))) == 1
    assert alone.share == 0.0
    assert padding.share == pytest.approx((long - short) / (2 * (long + 4) + short + 4))


def test_end_tokens_of_model_and_tokenizer_both_count(tiny_model, tiny_tokenizer):
    """Row 0 ends on the generation config's token, row 2 on the tokenizer's."""
    ids = [greedy_by_hand(tiny_model, tiny_tokenizer, prompt, 12) for prompt in PROMPTS]
    model_end, tokenizer_end = ids[0][5], ids[2][3]
    assert model_end != tokenizer_end
    tiny_model.generation_config.eos_token_id = [model_end]
    tiny_tokenizer.eos_token = tiny_tokenizer.convert_ids_to_tokens(tokenizer_end)
    got = run(TransformersEngine(tiny_model, tiny_tokenizer), PROMPTS, max_new_tokens=12)
    reasons = set()
    for row, generation in zip(ids, got, strict=True):
        ends = [place for place, token in enumerate(row) if token in (model_end, tokenizer_end)]
        length = ends[0] + 1 if ends else 12
        assert generation.num_tokens == length
        assert generation.finish_reason == ("stop" if ends else "length")
        assert generation.text == decode(tiny_tokenizer, row[: length - bool(ends)]), "an end token is no text"
        reasons.add(generation.finish_reason)
    assert got[0].num_tokens <= 6 and got[2].num_tokens <= 4 and "stop" in reasons


def test_end_token_in_the_last_place_is_a_stop(tiny_model, tiny_tokenizer):
    ids = greedy_by_hand(tiny_model, tiny_tokenizer, "Sky", 12)
    place = next(place for place in range(3, 12) if ids[place] not in ids[:place])
    tiny_model.generation_config.eos_token_id = ids[place]
    (got,) = run(TransformersEngine(tiny_model, tiny_tokenizer), ["Sky"], max_new_tokens=place + 1)
    assert (got.finish_reason, got.num_tokens) == ("stop", place + 1)


# Stop strings


def test_stop_string_cuts_and_ends_its_row_only(tiny_model, tiny_tokenizer):
    ids = [greedy_by_hand(tiny_model, tiny_tokenizer, prompt, 24) for prompt in PROMPTS]
    texts = [tiny_tokenizer.decode(row) for row in ids]
    stop = texts[0][6:9]
    got = run(TransformersEngine(tiny_model, tiny_tokenizer), PROMPTS, max_new_tokens=24, stop=("@never@", stop))
    for row, text, generation in zip(ids, texts, got, strict=True):
        if stop not in text:
            assert generation.finish_reason == "length" and generation.num_tokens == 24
            continue
        needed = next(count for count in range(25) if stop in tiny_tokenizer.decode(row[:count]))
        assert generation == Generation(text[: text.index(stop)].rstrip(), "stop", needed)
    assert got[0].finish_reason == "stop" and got[0].num_tokens < 24
    assert {generation.finish_reason for generation in got} == {"stop", "length"}


def test_stop_string_is_not_looked_for_in_the_prompt(tiny_model, tiny_tokenizer):
    """The prompt's last character and the first generated one make up the stop string: that is no stop."""
    for prompt in PROMPTS[0], PROMPTS[2], PROMPTS[4]:
        text = tiny_tokenizer.decode(greedy_by_hand(tiny_model, tiny_tokenizer, prompt, 12))
        stop = prompt[-1] + text[0]
        assert stop not in text
        (got,) = run(TransformersEngine(tiny_model, tiny_tokenizer), [prompt], max_new_tokens=12, stop=(stop,))
        assert got == Generation(text.rstrip(), "length", 12)


def test_special_token_as_stop_string(tiny_model, tiny_tokenizer):
    ids = greedy_by_hand(tiny_model, tiny_tokenizer, "Sky", 12)
    token = tiny_tokenizer.convert_ids_to_tokens(ids[4])
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    (got,) = run(TransformersEngine(tiny_model, tiny_tokenizer), ["Sky"], max_new_tokens=12, stop=(token,))
    first = ids.index(ids[4])
    assert got == Generation(decode(tiny_tokenizer, ids[:first]), "stop", first + 1)


# Sampling


def test_sampling_is_seeded_and_leaves_the_random_state(tiny_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_tokens=150)
    state = torch.random.get_rng_state()
    first = run(engine, PROMPTS, max_new_tokens=16, temperature=1.0, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12345)
    assert run(engine, PROMPTS, max_new_tokens=16, temperature=1.0, seed=1) == first
    assert run(engine, PROMPTS, max_new_tokens=16, temperature=1.0, seed=2) != first
    twins = run(engine, ["Sky"] * 4, max_new_tokens=16, temperature=1.0)
    assert len({twin.text for twin in twins}) > 1, "equal prompts are sampled independently"


def seeded(engine, prompts, seeds, **params):
    results = list(engine.generate(prompts, GenerationParams(**params), seeds=seeds))
    assert sorted(index for index, _ in results) == list(range(len(prompts))), "every index exactly once"
    return [generation for _, generation in sorted(results, key=lambda result: result[0])]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_seed_of_its_own_gives_the_same_text_in_any_batch(tiny_model, tiny_tokenizer, top_p):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    params = {"max_new_tokens": 12, "temperature": 1.0, "top_p": top_p}
    seeds = [3, 14, 15, 92, 65]
    alone = [seeded(engine, [prompt], [seed], **params)[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert seeded(engine, PROMPTS, seeds, **params) == alone
    assert seeded(engine, PROMPTS[::-1], seeds[::-1], **params, seed=7) == alone[::-1]
    small = TransformersEngine(tiny_model, tiny_tokenizer, batch_tokens=150)
    assert seeded(small, [*PROMPTS, "Sky"], [*seeds, 1], **params)[:5] == alone
    state = torch.random.get_rng_state()
    twins = seeded(engine, ["Sky"] * 6, [1, 2, 3, 1, 2, 3], **params)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({twin.text for twin in twins}) == 3 and twins[:3] == twins[3:]


def test_seeds_are_unused_when_greedy(tiny_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    assert seeded(engine, PROMPTS, [5, 6, 7, 8, 9], max_new_tokens=8) == run(engine, PROMPTS, max_new_tokens=8)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 0.6)])
def test_a_seed_of_its_own_samples_the_right_distribution(tiny_model, tiny_tokenizer, temperature, top_p):
    """First tokens under 4,000 seeds against the probabilities of a plain forward, by chi-square over the likely ones.

    The statistic is about `cells` with a standard deviation of sqrt(2 cells): eight of them is a wide margin, and
    leaving out the temperature or the nucleus misses it by far.
    """
    number = 4000
    with torch.no_grad():
        logits = tiny_model(torch.tensor([encode(tiny_tokenizer, "Sky")])).logits[0, -1].double()
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    nucleus = set(order[before < top_p].tolist())
    probabilities[[token for token in range(len(probabilities)) if token not in nucleus]] = 0
    probabilities /= probabilities.sum()
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_tokens=100_000)
    drawn = []
    run_model = engine._run_model

    def noting(*args, **options):
        output = run_model(*args, **options)
        drawn.extend(output.sequences[:, -1].tolist())
        return output

    engine._run_model = noting
    seeded(engine, ["Sky"] * number, list(range(number)), max_new_tokens=1, temperature=temperature, top_p=top_p)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    assert len(drawn) == number and set(drawn) <= nucleus
    likely = probabilities * number >= 5
    cells = [*zip(counts[likely].tolist(), (probabilities[likely] * number).tolist(), strict=True)]
    rest = number - sum(count for count, _ in cells), number - sum(expected for _, expected in cells)
    cells += [rest] if rest[1] >= 5 else []
    chi_square = sum((count - expected) ** 2 / expected for count, expected in cells)
    assert len(cells) >= 5 and chi_square < len(cells) + 8 * math.sqrt(2 * len(cells))


# Log-probabilities of options


def by_hand(model, tokenizer, prompt, option):
    """The options of the test's tokenizer are one token each, with or without a space."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (option, " " + option)]
    with torch.no_grad():
        logprobs = model(torch.tensor([encode(tokenizer, prompt)])).logits[0, -1].log_softmax(-1)
    first = {own[0] for own in ids if tokenizer.decode([own[0]]).strip()}
    return math.log(sum(math.exp(logprobs[token].item()) for token in first))


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_option_logprobs_equal_a_plain_forward(tiny_model, tiny_tokenizer, batch_tokens):
    options = [*map(str, range(10))]
    tiny_model.train()
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_tokens=batch_tokens)
    results = sorted(engine.option_logprobs(PROMPTS, options), key=lambda result: result[0])
    assert tiny_model.training and [index for index, _, _ in results] == list(range(len(PROMPTS)))
    tiny_model.eval()
    for (_, cost, values), prompt in zip(results, PROMPTS, strict=True):
        expected = [by_hand(tiny_model, tiny_tokenizer, prompt, option) for option in options]
        assert values == pytest.approx(expected, abs=1e-4) and len({round(value, 3) for value in values}) > 5
        assert (cost, cost.num_prompt_tokens) == (Generation("", "length", 1), len(encode(tiny_tokenizer, prompt)))


def test_options_that_begin_alike_are_refused(tiny_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    with pytest.raises(ValueError, match="begin with the same token"):
        list(engine.option_logprobs(["Sky"], ["1", "10"]))
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens"):
        list(engine.option_logprobs(["x " * 400], ["1", "2"]))


def test_options_behind_a_token_of_space(tiny_model, tiny_tokenizer):
    """A tokenizer that puts a space token in front of everything: the prompt goes on with it, then comes the digit."""
    plain = tiny_tokenizer.encode

    class Spaced:
        def __getattr__(self, name):
            return getattr(tiny_tokenizer, name)

        def __call__(self, *args, **kwargs):
            return tiny_tokenizer(*args, **kwargs)

        def encode(self, text, **kwargs):
            return plain(" ", **kwargs) + plain(text.strip(), **kwargs)

    engine = TransformersEngine(tiny_model, Spaced())
    ((_, _, values),) = engine.option_logprobs(["Sky"], ["3", "4"])
    space = plain(" ", add_special_tokens=False)
    with torch.no_grad():
        ids = torch.tensor([encode(tiny_tokenizer, "Sky") + space])
        logprobs = tiny_model(ids).logits[0, -1].log_softmax(-1)
    digits = [plain(digit, add_special_tokens=False)[0] for digit in "34"]
    assert values == pytest.approx(logprobs[digits].tolist(), abs=1e-4)


def test_tiny_top_p_is_greedy(tiny_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    assert run(engine, PROMPTS, max_new_tokens=16, temperature=5.0, top_p=1e-6) == run(
        engine, PROMPTS, max_new_tokens=16
    )


def test_no_hidden_top_k(tiny_model, tiny_tokenizer):
    """At a huge temperature all tokens are equally likely; transformers' default would leave 50 of them."""
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    firsts = run(engine, ["Sky"] * 400, max_new_tokens=1, temperature=1e6)
    assert len({generation.text for generation in firsts}) > 60


def test_generation_defaults_of_the_model_do_not_leak(tiny_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    greedy = run(engine, PROMPTS, max_new_tokens=16)
    sampled = run(engine, PROMPTS, max_new_tokens=16, temperature=1.0)
    config = tiny_model.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 0.01, 1, 0.1
    config.repetition_penalty, config.no_repeat_ngram_size, config.num_beams = 5.0, 1, 3
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = warned.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert run(engine, PROMPTS, max_new_tokens=16) == greedy
        assert run(engine, PROMPTS, max_new_tokens=16, temperature=1.0) == sampled
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not warned
    assert tiny_model.generation_config is config and config.repetition_penalty == 5.0


# Structured replies


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "score": {"type": "integer", "minimum": 1, "maximum": 10},
        "kind": {"enum": ["first", "second", "tie"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "score", "kind", "tags"],
    "additionalProperties": False,
}


def follows_the_schema(text):
    """By hand, without a validator: the very keys in order, and what each may hold."""
    value = json.loads(text)
    assert list(value) == list(SCHEMA["properties"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 6
    assert isinstance(value["score"], int) and 1 <= value["score"] <= 10
    assert value["kind"] in ("first", "second", "tie")
    assert len(value["tags"]) <= 2 and all(isinstance(own, str) and len(own) <= 4 for own in value["tags"])
    return value


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}], ids=str)
def test_every_reply_of_a_random_model_follows_the_schema(tiny_model, tiny_tokenizer, params):
    pytest.importorskip("llguidance")
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    params = {"max_new_tokens": 100, "schema": json.dumps(SCHEMA), **params}
    prompts = PROMPTS * (4 if len(params) > 2 else 1)
    got = run(engine, prompts, **params)
    values = [follows_the_schema(own.text) for own in got]
    assert all(own.finish_reason == "stop" for own in got) and len({own.num_tokens for own in got}) > 1
    if "temperature" in params:
        assert len({json.dumps(value) for value in values}) > 5
        own = seeded(engine, PROMPTS, [1, 2, 3, 4, 5], **params)
        assert seeded(engine, PROMPTS[:2], [1, 2], **params) == own[:2], "in any batch"
        assert all(follows_the_schema(generation.text) for generation in own)
    stopped = run(engine, [*PROMPTS, "Sky"], **params, stop=('"kind"', 'i"}'))
    assert all(own.text.endswith(",") and own.finish_reason == "stop" for own in stopped), "rows end one by one"
    (cut,) = run(engine, ["Sky"], **params | {"max_new_tokens": 4})
    assert cut.finish_reason == "length" and cut.text == '{"na'


def test_without_the_package_replies_are_free_and_it_is_said_once(tiny_model, tiny_tokenizer, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    free = run(engine, PROMPTS, max_new_tokens=8)
    for _ in range(2):
        assert run(engine, PROMPTS, max_new_tokens=8, schema=json.dumps(SCHEMA)) == free
    assert len(caplog.records) == 1 and "pip install llguidance" in caplog.text


def test_a_schema_that_no_grammar_can_follow(tiny_model, tiny_tokenizer, caplog):
    pytest.importorskip("llguidance")
    schema = '{"type": "object", "properties": {"a": {"not": {}}}}'
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    assert run(engine, PROMPTS, max_new_tokens=8, schema=schema) == run(engine, PROMPTS, max_new_tokens=8)
    assert len(caplog.records) == 1 and '"not"' in caplog.text


# A model in the middle of training


def test_training_model_is_left_as_found(tiny_model, tiny_tokenizer):
    expected = run(TransformersEngine(tiny_model, tiny_tokenizer), PROMPTS, max_new_tokens=8)
    tiny_model.train()
    tiny_model.model.layers[1].eval()
    tiny_model.config.use_cache = False
    tiny_model.gradient_checkpointing_enable()
    tiny_model.enable_input_require_grads()
    tiny_tokenizer.padding_side = "right"
    modes = [module.training for module in tiny_model.modules()]
    generation_config = tiny_model.generation_config

    def check():
        assert [module.training for module in tiny_model.modules()] == modes
        assert tiny_model.generation_config is generation_config
        assert tiny_model.config.use_cache is False
        assert tiny_model.model.layers[0].gradient_checkpointing
        assert tiny_tokenizer.padding_side == "right"
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()

    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_tokens=1)
    results = engine.generate(PROMPTS, GenerationParams(max_new_tokens=8))
    index, generation = next(results)
    assert generation == expected[index]
    check()  # also between two results
    del results
    gc.collect()
    check()
    assert run(engine, PROMPTS, max_new_tokens=8) == expected
    check()
    ids = torch.tensor([[5, 6, 7, 8]])
    tiny_model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in tiny_model.parameters())


def test_error_while_generating_leaves_the_model_as_found(tiny_model, tiny_tokenizer, monkeypatch):
    tiny_model.train()
    config = tiny_model.generation_config
    monkeypatch.setattr(tiny_model.model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(TransformersEngine(tiny_model, tiny_tokenizer), ["Sky"])
    assert all(module.training for module in tiny_model.modules()) and tiny_model.generation_config is config


# Adapters


@pytest.fixture
def tuned(tiny_model_dir, tmp_path):
    """A LoRA model on the saved tiny model, with weights that matter, and the directory it is saved in."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_peft_model_adapter_directory_and_merged_agree(tuned, tiny_model_dir, tiny_tokenizer):
    model, directory = tuned
    base = run(TransformersEngine(str(tiny_model_dir)), PROMPTS, max_new_tokens=8)
    loaded = run(TransformersEngine(model, tiny_tokenizer), PROMPTS, max_new_tokens=8)
    assert run(TransformersEngine(str(directory)), PROMPTS, max_new_tokens=8) == loaded
    assert loaded != base
    with model.disable_adapter():
        assert run(TransformersEngine(model, tiny_tokenizer), PROMPTS, max_new_tokens=8) == base
    model.train()
    assert run(TransformersEngine(model, tiny_tokenizer), PROMPTS, max_new_tokens=8) == loaded
    assert model.training
    merged = model.merge_and_unload()
    assert run(TransformersEngine(merged, tiny_tokenizer), PROMPTS, max_new_tokens=8) == loaded


def test_adapter_whose_base_is_gone(tuned, tmp_path):
    _, directory = tuned
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"cannot load the base model .*moved") as caught:
        TransformersEngine(str(directory))
    assert "\n" not in str(caught.value)


# Bad input


def test_missing_model_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"cannot load the model .*nothing-here") as caught:
        TransformersEngine(str(tmp_path / "nothing-here"))
    assert "\n" not in str(caught.value)


def test_model_without_a_name_needs_a_tokenizer(tiny_model):
    with pytest.raises(ValueError, match="pass tokenizer="):
        TransformersEngine(tiny_model)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("Sky", TypeError, "one string; wrap it in a list"),
        (["Sky", ""], ValueError, "prompt 1 is empty"),
        (["Sky", []], ValueError, "prompt 1 is empty"),
        (["Sky", 3], TypeError, "prompt 1 must be a string or a list of messages, got int"),
        (["Sky", [{"role": "user"}]], TypeError, "prompt 1: a message needs"),
        (["Sky", [{"role": "user", "content": None}]], TypeError, "prompt 1: a message needs"),
        (["Sky", "x " * 300], ValueError, r"prompt 1 has \d+ tokens, .* context of 512: shorten"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(tiny_model, tiny_tokenizer, prompts, error, message):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    with pytest.raises(error, match=message):
        engine.generate(prompts, GenerationParams(max_new_tokens=8))


def test_context_bound_is_exact(tiny_model, tiny_tokenizer):
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    length = len(encode(tiny_tokenizer, "Sky"))
    engine.generate(["Sky"], GenerationParams(max_new_tokens=512 - length))
    with pytest.raises(ValueError, match="prompt 0 has"):
        engine.generate(["Sky"], GenerationParams(max_new_tokens=513 - length))


def test_chat_without_template(tiny_model, tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="prompt 1 is a chat, but the tokenizer has no chat template"):
        TransformersEngine(tiny_model, tiny_tokenizer).generate(PROMPTS[:2], GenerationParams())


def test_tokenizer_without_pad_token(tiny_model, tiny_tokenizer):
    expected = run(TransformersEngine(tiny_model, tiny_tokenizer), PROMPTS, max_new_tokens=8)
    tiny_tokenizer.pad_token = None
    assert run(TransformersEngine(tiny_model, tiny_tokenizer), PROMPTS, max_new_tokens=8) == expected
    assert tiny_tokenizer.pad_token is None


def test_rendered_prompt_gets_no_second_bos(tiny_model, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.bos_token = "<|im_start|>"
    bos = tiny_tokenizer.bos_token_id
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    assert tiny_tokenizer("Sky")["input_ids"][0] == bos, "the tokenizer adds one by itself"
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    assert run(engine, ["<|im_start|>Sky"], max_new_tokens=8) == run(engine, ["Sky"], max_new_tokens=8)


# vLLM


# From token ids to `vllm.logprobs.Logprob`, the likeliest tokens at the first place
LISTED = {
    number: types.SimpleNamespace(logprob=math.log(share), rank=number + 1, decoded_token=token)
    for number, (token, share) in enumerate([("7", 0.5), (" 7", 0.25), ("8", 0.1), (None, 0.05)])
}


def fake_vllm(calls):
    """
    Modules with the part of vLLM's interface the engine uses: constructor and call arguments are checked against the
    names and types of vLLM 0.12 and later, and answers come as objects shaped like `RequestOutput`.
    """

    class SamplingParams:
        def __init__(
            self,
            *,
            max_tokens,
            temperature=1.0,
            top_p=1.0,
            stop=None,
            seed=None,
            logprobs=None,
            structured_outputs=None,
        ):
            assert isinstance(max_tokens, int) and temperature >= 0 and 0 < top_p <= 1
            assert stop is None or isinstance(stop, list)
            assert seed is None or isinstance(seed, int)
            assert logprobs is None or 0 <= logprobs <= 20, "vLLM's own limit, unless it is raised"
            self.logprobs, self.structured_outputs = logprobs, structured_outputs
            self.temperature, self.top_p, self.stop, self.seed = temperature, top_p, stop, seed
            self.max_tokens = max_tokens

    class LoRARequest:
        def __init__(self, lora_name, lora_int_id, lora_path):
            assert lora_int_id > 0
            self.path = lora_path

    class Tokenizer:
        def decode(self, token_ids, *, skip_special_tokens):
            assert skip_special_tokens
            return "".join(map(chr, token_ids))

    class LLM:
        def __init__(
            self, model, *, tokenizer=None, dtype="auto", tensor_parallel_size=1, gpu_memory_utilization=0.9,
            revision=None, trust_remote_code=False, enable_lora=False, max_lora_rank=16,
        ):  # fmt: skip
            assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
            calls.append(("LLM", model, tokenizer, tensor_parallel_size, enable_lora, max_lora_rank))

        def get_tokenizer(self):
            return Tokenizer()

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
            assert all(isinstance(prompt, str) for prompt in prompts)
            return self._answer("generate", prompts, sampling_params, use_tqdm, lora_request)

        def chat(self, messages, sampling_params=None, use_tqdm=True, lora_request=None):
            assert all(isinstance(chat, list) and isinstance(chat[0], dict) for chat in messages)
            return self._answer("chat", messages, sampling_params, use_tqdm, lora_request)

        def _answer(self, call, prompts, sampling_params, use_tqdm, lora_request):
            assert len(sampling_params) == len(prompts) and not use_tqdm
            calls.append((call, list(prompts), sampling_params, lora_request))
            return [
                types.SimpleNamespace(
                    outputs=[
                        types.SimpleNamespace(
                            text=f" {prompt} answered \n",
                            token_ids=[ord(character) for character in f"{prompt} answered \n"],
                            finish_reason="length" if prompt == "Sky" else "stop",
                            logprobs=[LISTED] if own.logprobs else None,
                        )
                    ],
                    prompt_token_ids=[1] * len(str(prompt)),
                )
                for prompt, own in zip(prompts, sampling_params, strict=True)
            ]

    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, SamplingParams
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest
    sampling = types.ModuleType("vllm.sampling_params")
    sampling.StructuredOutputsParams = lambda *, json: types.SimpleNamespace(json=json)
    lora = types.ModuleType("vllm.lora")
    return {"vllm": vllm, "vllm.lora": lora, "vllm.lora.request": request, "vllm.sampling_params": sampling}


@pytest.fixture
def vllm_calls(monkeypatch):
    calls = []
    for name, module in fake_vllm(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_vllm_calls(vllm_calls):
    """
    Against a stand-in: proves which calls and arguments vLLM would get, and how answers find their prompts. It proves
    nothing about vLLM itself, which needs a GPU.
    """
    engine = VLLMEngine("org/model", tensor_parallel_size=2, chunk_size=2)
    got = run(engine, PROMPTS, max_new_tokens=9, temperature=0.7, top_p=0.9, stop=("END",), seed=3)
    assert vllm_calls[0] == ("LLM", "org/model", None, 2, False, 16)
    calls = [(call, prompts) for call, prompts, _, _ in vllm_calls[1:]]
    assert calls == [
        ("generate", [PROMPTS[0], PROMPTS[2]]),
        ("generate", [PROMPTS[4]]),
        ("chat", [PROMPTS[1], PROMPTS[3]]),
    ]
    sampling = vllm_calls[1][2][0]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.stop) == (9, 0.7, 0.9, ["END"])
    seeds = [params.seed for _, _, sampling, _ in vllm_calls[1:] for params in sampling]
    assert len(set(seeds)) == len(PROMPTS)
    assert all(lora is None for *_, lora in vllm_calls[1:])
    for prompt, generation in zip(PROMPTS, got, strict=True):
        text = f"{prompt} answered"
        # Decoded from the tokens alone, without the space vLLM's own text starts with; two characters are stripped.
        assert generation == Generation(text, "length" if prompt == "Sky" else "stop", len(text) + 2)


def test_vllm_seeds_and_options(vllm_calls):
    engine = VLLMEngine("org/model", chunk_size=2)
    params = {"max_new_tokens": 9, "temperature": 0.7}
    got = seeded(engine, PROMPTS, [5, 6, 7, 8, 9], **params)
    sent = {
        str(p): own.seed
        for _, prompts, sampling, _ in vllm_calls[1:]
        for p, own in zip(prompts, sampling, strict=True)
    }
    assert sent == {str(prompt): seed for prompt, seed in zip(PROMPTS, [5, 6, 7, 8, 9], strict=True)}
    assert [own.num_prompt_tokens for own in got] == [len(str(prompt)) for prompt in PROMPTS]
    del vllm_calls[1:]
    results = sorted(engine.option_logprobs(PROMPTS, ["7", "8", "9"]), key=lambda result: result[0])
    assert [index for index, _, _ in results] == list(range(len(PROMPTS)))
    for (_, cost, values), prompt in zip(results, PROMPTS, strict=True):
        assert values == pytest.approx([math.log(0.75), math.log(0.1), -math.inf])
        assert (cost, cost.num_prompt_tokens) == (Generation("", "length", 1), len(str(prompt)))
    assert all(
        own.max_tokens == 1 and own.temperature == 0 for _, _, sampling, _ in vllm_calls[1:] for own in sampling
    )


def test_vllm_greedy(vllm_calls):
    run(VLLMEngine("org/model"), ["Sky"], max_new_tokens=9, top_p=0.9)
    sampling = vllm_calls[1][2][0]
    assert (sampling.temperature, sampling.top_p, sampling.stop, sampling.seed) == (0.0, 1.0, None, None)


def test_vllm_schema(vllm_calls, monkeypatch, caplog):
    vllm_module._structured_outputs.cache_clear()
    engine = VLLMEngine("org/model")
    run(engine, ["Sky"], max_new_tokens=9, schema='{"type": "object"}')
    assert vllm_calls[1][2][0].structured_outputs.json == '{"type": "object"}'
    run(engine, ["Sky"], max_new_tokens=9)
    assert vllm_calls[2][2][0].structured_outputs is None
    vllm_module._structured_outputs.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", types.ModuleType("an older one"))
    for _ in range(2):
        run(engine, ["Sky"], max_new_tokens=9, schema="{}")
    assert vllm_calls[-1][2][0].structured_outputs is None and len(caplog.records) == 1
    vllm_module._structured_outputs.cache_clear()


def test_vllm_adapter(vllm_calls, tuned, tiny_model_dir):
    """The stand-in again: the base model is loaded with LoRA on, and every call carries the adapter."""
    _, directory = tuned
    engine = create_engine(EngineArguments(engine="vllm"), str(directory))
    run(engine, PROMPTS, max_new_tokens=9)
    # Rank 4 runs under vLLM's smallest useful bound, 8.
    assert vllm_calls[0] == ("LLM", str(tiny_model_dir), None, 1, True, 8)
    assert [lora.path for *_, lora in vllm_calls[1:]] == [str(directory)] * 2


def test_vllm_rejects_adapters_it_cannot_run(vllm_calls, tuned):
    _, directory = tuned
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 1024}))
    with pytest.raises(ValueError, match="up to rank 512, this adapter has rank 1024"):
        VLLMEngine(str(directory))
    path.write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="LoRA adapters only"):
        VLLMEngine(str(directory))
    assert not vllm_calls


def test_vllm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # makes `import vllm` raise ImportError
    with pytest.raises(ImportError, match="pip install vllm"):
        create_engine(EngineArguments(engine="vllm"), "org/model")
