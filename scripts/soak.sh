#!/usr/bin/env bash
# Kills, damages and signals in full numbers, on tiny models; arguments go to scripts/soak.py (--help).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
py=${BLSPKD_VENV:-$root/.venv}/bin/python
[ -x "$py" ] || py=python
export PYTHONPATH=$root:$root/tests:$root/scripts OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$py" "$root/scripts/soak.py" "$@"
