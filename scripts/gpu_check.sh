#!/usr/bin/env bash
# What must hold on a machine with one GPU, in under 8 minutes, with what is installed and without a network.
#
#   bash scripts/gpu_check.sh --out DIR [--device cuda|cpu] [--quick] [--steps a,b,..] [--seconds N] [--quickstart DIR]
#
# Nothing is written but in DIR: log.txt, summary.json and the tables of the benchmarks. --help says more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 \
    exec "${PYTHON:-$(command -v python || command -v python3)}" -u "$root/scripts/gpu_check.py" "$@"
