# What all recipes share: options, stages, the environment, training on one or many GPUs. Sourced.
#
# A recipe sets `root`, `stage`, `stop_stage` and the defaults of its options, and has a function `usage`.

# parse_options NAME ... -- "$@": --some-name VALUE sets some_name; --small and --quick, where they are among the names,
# have no value and set small=yes, quick=yes
parse_options() {
    local names=" " option
    while [ "$1" != -- ]; do names+="$1 "; shift; done
    shift
    while [ $# -gt 0 ]; do
        option=${1#--}
        if [ "$1" = -h ] || [ "$1" = --help ]; then usage; exit 0; fi
        [ "$1" = "--$option" ] && [[ "$names" = *" $option "* ]] || fail "unknown option $1 (--help lists them)"
        if [ "$option" = small ] || [ "$option" = quick ]; then printf -v "$option" yes; shift; continue; fi
        [ $# -gt 1 ] || fail "$1 needs a value"
        printf -v "${option//-/_}" '%s' "$2"
        shift 2
    done
}

# whole_numbers NAME ...: of options
whole_numbers() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[0-9]+$ ]] || fail "--${name//_/-} must be a whole number, not '${!name}'"
    done
}

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

# from_here NAME ...: makes paths absolute before the caller's folder is left; what is no file is a name of a model hub
from_here() {
    local name
    for name in "$@"; do
        [ ! -e "${!name}" ] || printf -v "$name" '%s' "$(realpath "${!name}")"
    done
}

# one_run FOLDER OPTIONS: a folder holds what was made with these options; with others its stages were no longer true
one_run() {
    local file=$1/options
    if [ -e "$file" ] && [ "$(cat "$file")" != "$2" ]; then
        fail "$1 holds a run with other options ($(cat "$file")): give another --out, or remove that folder"
    fi
    mkdir -p "$1"
    printf '%s' "$2" >"$file"
}

# use_environment EXTRAS: makes it where it is missing; with BLSPKD_VENV=none the commands on the path are taken
use_environment() {
    if [ "${BLSPKD_VENV:-}" = none ]; then cd "$root"; return; fi
    bash "$root/scripts/venv.sh" "$1"
    PATH=$(realpath -m "${BLSPKD_VENV:-$root/.venv}")/bin:$PATH
    cd "$root"
}

# run_stage N TITLE FUNCTION FOLDER [SETTINGS]: what ended in FOLDER with these settings is done, unless --stage asks for it
run_stage() {
    local ended=$4/.done-$1 settings=${5:-} later
    [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] || return 0
    echo; echo "== stage $1: $2 ($(date +%H:%M:%S))"
    if [ "$stage" -ne "$1" ] && [ -e "$ended" ] && [ "$(cat "$ended")" = "$settings" ]; then echo "done before"; return 0; fi
    mkdir -p "$4"
    "$3"
    # What later stages made is out of date.
    for later in $(seq $(($1 + 1)) 9); do rm -f "$4/.done-$later"; done
    printf '%s' "$settings" >"$ended"
}

# sizes_of FOLDER: the options that the model of save_pretrained there was made with, a word a line
sizes_of() {
    python -c 'import json, sys
for name, value in json.load(open(f"{sys.argv[1]}/config.json")).items():
    if name.startswith(("adapter", "lora")) and value not in ("", 0):
        print("--" + name.replace("_", "-"), value, sep="\n")' "$1"
}

# short_warm_up: the learning rate must reach its peak before training ends; short trials would not get there
short_warm_up() {
    [ "$warm_up" -lt "$max_update" ] || { warm_up=$((max_update / 10)); echo "warm-up: $warm_up updates"; }
}

# share_out: sets batch and accumulation so that an update has per_update utterances on --gpus of each of --nodes.
# GPUs x nodes x batch x accumulation, such as 8 x 1 x 8 x 12 = 768
share_out() {
    local workers=$((nodes * (gpus > 0 ? gpus : 1)))
    while [ "$batch" -gt 1 ] && [ $((batch * workers)) -gt "$per_update" ]; do batch=$((batch / 2)); done
    accumulation=$(((per_update + batch * workers / 2) / (batch * workers)))
    [ "$accumulation" -gt 0 ] || accumulation=1
    local found=$((batch * workers * accumulation))
    [ "$found" -eq "$per_update" ] || echo "an update has $found utterances, not $per_update: $workers GPUs do not divide them"
}

# train_on_gpus ARGUMENTS: fairseq-train on --gpus of each of --nodes
train_on_gpus() {
    if [ "$gpus" -gt 1 ] || [ "$nodes" -gt 1 ]; then
        torchrun --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$gpus" \
            --master-addr "${master%:*}" --master-port "${master##*:}" "$(command -v fairseq-train)" "$@"
    else
        fairseq-train "$@"
    fi
}
