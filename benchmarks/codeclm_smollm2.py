"""CodecLM for SmolLM2-135M with a stronger model behind llama.cpp's server, from seeds to a trained adapter.

    python benchmarks/codeclm_smollm2.py --strong qwen2.5-0.5b-instruct.gguf [--target in_process|server]
        --config benchmarks/codeclm_smollm2.yaml --seeds seeds.jsonl [any option of `trl-ext codeclm run`]

Serves the two GGUF files on this machine and runs `trl-ext codeclm run` against them; killed, it resumes like that.
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

from benchmarks.llama_server import LlamaServer
from trl_extensions.cli.main import main as trl_ext
from trl_extensions.embedded import embedded_gguf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--strong", required=True, help="GGUF file of the strong model, which also scores and judges")
    parser.add_argument("--target", choices=("server", "in_process"), default="server")
    parser.add_argument("--parallel", type=int, default=8, help="requests a server answers at once")
    parser.add_argument("--context", type=int, default=2560, help="tokens of each of them")
    args, rest = parser.parse_known_args()
    with ExitStack() as stack:

        def serve(path: str | Path) -> str:
            server = LlamaServer(path, parallel=args.parallel, context=args.parallel * args.context)
            url = stack.enter_context(server).base_url
            spec = {"model": Path(path).stem, "base_url": url, "concurrency": args.parallel, "timeout": 1800.0}
            return json.dumps(spec)

        own = ["--strong", serve(args.strong)]
        if args.target == "server":
            own += ["--target", serve(embedded_gguf())]
        return trl_ext(["codeclm", "run", *own, *rest])


if __name__ == "__main__":
    raise SystemExit(main())
