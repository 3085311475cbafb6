#!/usr/bin/env bash
# Every system of the papers trained on the same data for the same time, measured, and compared with significance.
#
#   bash examples/comparison/run.sh [--minutes M] [--seeds "1 2 3"] [--only "row row"] [--out DIR] [--results DIR]
#
# The default, 12 minutes a row, takes about 10 CPU hours; killed, it goes on where it was. As many rows train at a time as
# there are CPU cores; all of them have the first seed, the main ones the others, too.
# RESULTS.md and the pictures are in OUT/report.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

minutes=12 seeds="1 2 3" only="" out="$root/out/comparison" results="" updates=0 sentences=2400 test_sentences=100
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --minutes | --seeds | --only | --out | --results | --updates | --sentences | --test-sentences)
            [ $# -gt 1 ] || { echo "run.sh: $1 needs a value" >&2; exit 2; }
            name=${1#--}; printf -v "${name//-/_}" '%s' "$2"; shift 2 ;;
        *) echo "run.sh: unknown option $1 (--help lists them)" >&2; exit 2 ;;
    esac
done
out=$(realpath -m "$out") results=$(realpath -m "${results:-$out/results}")
bash "$root/scripts/venv.sh" quickstart,recordings
PATH=$(realpath -m "${BLSPKD_VENV:-$root/.venv}")/bin:$PATH
cd "$root"
cache=${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}
python examples/quickstart/fetch_models.py --cache "$cache"
# shellcheck disable=SC2086  # several seeds and rows are several words
python "$here/compare.py" --out "$out" --results "$results" --minutes "$minutes" --seeds $seeds ${only:+--only $only} \
    --updates "$updates" --sentences "$sentences" --test-sentences "$test_sentences"
python "$here/report.py" --results "$results" --data "$out/data" --out "$out/report"
