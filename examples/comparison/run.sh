#!/usr/bin/env bash
# Every system of the papers trained on the same data for the same time, measured, and compared with significance.
#
#   bash examples/comparison/run.sh [--minutes M] [--seeds "1 2 3"] [--only "row row"] [--out DIR] [--results DIR]
#
# The default, 12 minutes a row, takes about 15 CPU hours; killed, it goes on where it was. As many rows train at a time as
# there are CPU cores; all of them have the first seed, the main ones the others, too.
# RESULTS.md and the pictures are in OUT/report; with --results DIR, the folder of the measurements, there. What DIR holds is
# not measured again: --results examples/comparison/results makes the committed report from the committed measurements.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/examples/common.sh"

minutes=12 seeds="1 2 3" only="" out="$root/out/comparison" results="" updates=0 sentences=2400 test_sentences=100
usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
parse_options minutes seeds only out results updates sentences test-sentences -- "$@"
out=$(realpath -m "$out") report=$(realpath -m "${results:-$out/report}") results=$(realpath -m "${results:-$out/results}")
use_environment quickstart,recordings
cache=${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}
python examples/quickstart/fetch_models.py --cache "$cache"
# shellcheck disable=SC2086  # several seeds and rows are several words
python examples/comparison/compare.py --out "$out" --results "$results" --minutes "$minutes" --seeds $seeds \
    ${only:+--only $only} --updates "$updates" --sentences "$sentences" --test-sentences "$test_sentences"
python examples/comparison/report.py --results "$results" --data "$out/data" --out "$report"
