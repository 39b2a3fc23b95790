#!/bin/sh
# Fetch into .whl/ what a machine without a network lacks beside PyTorch, transformers, peft and accelerate:
#
#     sh benchmarks/gpu/wheels.sh            # here, once
#     python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl     # there
#
# For CPython 3.12 on x86-64. Of bitsandbytes only the library of CUDA 13.0 and the one for CPUs are kept.
set -eu
cd "$(dirname "$0")/../.."
CUDA=130
mkdir -p .whl
rm -f .whl/*.whl

fetch() {
    # pip matches the number of a manylinux tag exactly
    tags=$(for n in 17 24 27 28 31 34 35; do printf -- ' --platform manylinux_2_%s_x86_64' $n; done)
    # shellcheck disable=SC2086
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $tags \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl "$@"
}

# Training
fetch trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 evaluate==0.4.6 bitsandbytes==0.50.2
# Clients and configurations
fetch pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 \
    typing-extensions==4.16.0 openai==3.57.0 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 jiter==0.19.0 \
    sniffio==1.3.1 json-repair==0.64.6
# `trl-ext ... run`
fetch gguf==0.19.0 datasketch==2.0.0 nltk==3.10.4 defusedxml==0.7.1 llguidance==1.9.1
python3 -m pip wheel -q --no-deps -w .whl rouge-score==0.1.2  # there is no wheel of it to download

python3 - "$CUDA" <<'PYTHON'
"""Write bitsandbytes anew without the libraries of other devices, and say how large everything is."""
import pathlib
import sys
import zipfile

folder, cuda = pathlib.Path(".whl"), sys.argv[1]
(whole,) = folder.glob("bitsandbytes-*.whl")
part = whole.with_suffix(".part")
with zipfile.ZipFile(whole) as old, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
    kept = {f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", f"cuda{cuda}")}
    missing = kept - set(old.namelist())
    if missing:
        raise SystemExit(f"{whole} lacks {', '.join(sorted(missing))}: set CUDA to one that it has")
    for entry in old.infolist():
        if entry.filename.endswith(".so") and entry.filename not in kept:
            continue
        data = old.read(entry)
        if entry.filename.endswith("/RECORD"):
            lines = data.decode().splitlines(keepends=True)
            left_out = lambda line: (name := line.split(",")[0]).endswith(".so") and name not in kept
            data = "".join(line for line in lines if not left_out(line)).encode()
        new.writestr(entry, data, zipfile.ZIP_DEFLATED)
part.replace(whole)
sizes = {path.name: path.stat().st_size for path in folder.glob("*.whl")}
for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
    print(f"{size / 2**20:7.2f} MiB  {name}")
print(f"{sum(sizes.values()) / 2**20:7.2f} MiB in all")
PYTHON
