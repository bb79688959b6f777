#!/usr/bin/env bash
# Compiles the Hopper kernels for sm_90a and checks registers, spills, shared memory, tensor cores, TMA. Needs no GPU.
#   kernels_pallas/check_gpu.sh [CASE ...]     CASE: a part of a case's name; none: all
# VENV names an environment with "jax[cuda13]", absl-py and nvidia-cuda-nvdisasm; without it one is made (4 GB) and removed.
# PYTHON names the interpreter it is made with.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${VENV:-}" ]; then
    VENV=$(mktemp -d)
    trap 'rm -rf "$VENV"' EXIT
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        "jax[cuda13]>=0.10.2,<0.12" absl-py nvidia-cuda-nvdisasm  # Mosaic GPU imports absl, which JAX does not ask for
fi
PYTHONPATH=$PWD "$VENV/bin/python" -m kernels_pallas.check_gpu "$@"
