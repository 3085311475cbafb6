#!/usr/bin/env bash
# Everything that must hold before a commit: style, types, tests. Installs what that needs first.
#
#   bash scripts/test.sh [--all] [--skip-models] [arguments of pytest]
#
# --all          the second tier, too: tests that take long, and whose subject the first one has in small (marked slow)
# --skip-models  fetch neither the small real models nor the real recordings, and leave out the tests that need them
# BLSPKD_VENV    the virtual environment (default: .venv beside setup.py)
# BLSPKD_CACHE   where those models are kept (default: ~/.cache/blspkd_fairseq)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Absolute before the change of folder, since the caller's paths are relative to where the caller is.
BLSPKD_VENV=$(realpath -m "${BLSPKD_VENV:-$root/.venv}")
BLSPKD_CACHE=$(realpath -m "${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}")
export BLSPKD_VENV BLSPKD_CACHE
cd "$root"

models=yes
chosen="not slow" # an expression of pytest's markers
pytest_args=()
for arg in "$@"; do
    case $arg in
        --all) chosen="" ;;
        --skip-models) models=no ;;
        *) pytest_args+=("$arg") ;;
    esac
done
leave_out() { chosen="${chosen:+$chosen and }not $1"; }

bash scripts/venv.sh dev,quickstart,recordings
py=$BLSPKD_VENV/bin/python

"$py" -m ruff check .
"$py" -m ruff format --check .
"$py" -m mypy blspkd_fairseq
if [[ $models == no ]]; then
    leave_out real
else
    "$py" examples/quickstart/fetch_models.py --cache "$BLSPKD_CACHE"
    if ! "$py" scripts/fetch_recordings.py --cache "$BLSPKD_CACHE"; then
        echo "test.sh: the tests on real recordings, which come as Debian packages, are LEFT OUT" >&2
        leave_out recordings
    fi
fi
if [[ $chosen != "not slow"* && $models == yes ]] && ! timeout 300 "$py" scripts/fetch_chromium.py --cache "$BLSPKD_CACHE"; then
    echo "test.sh: the tests of the demo's page in a browser, which comes as Debian packages, are LEFT OUT" >&2
fi
# A file at a time in each process: the tests of a file share what they have trained.
workers=$(nproc)
"$py" -m pytest -q -n $((workers < 8 ? workers : 8)) --dist loadfile --no-loadscope-reorder -m "$chosen" \
    ${pytest_args[@]+"${pytest_args[@]}"}
