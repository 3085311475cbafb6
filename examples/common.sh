# What all recipes share: options, stages, the environment, training on one or many GPUs. Sourced.
#
# A recipe sets `root`, `stage`, `stop_stage` and the defaults of its options, and has a function `usage`.

# parse_options NAME ... -- "$@": --some-name VALUE sets some_name; a NAME with dashes before it, such as --quick, has no
# value, and sets quick=yes
parse_options() {
    local names=" " switches=" " option
    while [ "$1" != -- ]; do
        [ "$1" = "${1#--}" ] || switches+="${1#--} "
        names+="${1#--} "
        shift
    done
    shift
    while [ $# -gt 0 ]; do
        option=${1#--}
        if [ "$1" = -h ] || [ "$1" = --help ]; then usage; exit 0; fi
        [ "$1" = "--$option" ] && [[ "$names" = *" $option "* ]] || fail "unknown option $1 (--help lists them)"
        if [[ "$switches" = *" $option "* ]]; then printf -v "${option//-/_}" yes; shift; continue; fi
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
    echo "${0##*/}: $*" >&2
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
    note "$2" "$file"
}

# note TEXT FILE: the file holds the text or what it held before, whenever another node reads it
note() {
    printf '%s' "$1" >"$2.$(hostname).$$"
    mv "$2.$(hostname).$$" "$2"
}

# use_environment EXTRAS: makes it where it is missing; with BLSPKD_VENV=none the commands on the path are taken
use_environment() {
    if [ "${BLSPKD_VENV:-}" = none ]; then cd "$root"; return; fi
    bash "$root/scripts/venv.sh" "$1"
    PATH=$(realpath -m "${BLSPKD_VENV:-$root/.venv}")/bin:$PATH
    cd "$root"
}

# What runs beside the recipe ends with it.
children=()
trap '[ ${#children[@]} -eq 0 ] || kill "${children[@]}" 2>/dev/null || true' EXIT

# check_nodes TRAINING_STAGE: --nodes know each other, and none runs a stage again while others take it for done
check_nodes() {
    [ "$nodes" -gt 1 ] || return 0
    [ "$node_rank" -lt "$nodes" ] || fail "--node-rank must be below --nodes $nodes, not $node_rank"
    [ "${master%:*}" != 127.0.0.1 ] || fail "--master HOST:PORT of node 0 must be given with --nodes $nodes"
    [ "$stage" -eq 0 ] || [ "$stage" -ge "$1" ] || fail "--stage $stage is run by one node: first --nodes 1 --stop-stage $(($1 - 1))"
}

# begin_signs_of_life: node 0 tells the others in $out, as long as it lives, that it is at work
begin_signs_of_life() {
    [ -z "${signs:-}" ] || return 0
    signs=begun
    ( while kill -0 $$ 2>/dev/null; do note "$SECONDS" "$out/.alive"; sleep "${BLSPKD_SIGN_SECONDS:-10}"; done ) >/dev/null 2>&1 &
    children+=($!)
}

# wait_for_node_0 TITLE FILE SETTINGS: until it has ended; without a sign of life for ten minutes, it is lost
wait_for_node_0() {
    local limit=${BLSPKD_WAIT_SECONDS:-600} sign="" seen=$SECONDS now
    echo "node $node_rank waits for node 0: $1"
    until [ -e "$2" ] && [ "$(cat "$2")" = "$3" ]; do
        now=$(cat "$out/.alive" 2>/dev/null || true)
        [ "$now" = "$sign" ] || { sign=$now; seen=$SECONDS; }
        [ $((SECONDS - seen)) -lt "$limit" ] || fail "node 0 gave no sign of life in $out for $limit s (BLSPKD_WAIT_SECONDS)" \
            "before it had ended '$1': look at its messages, and whether both nodes share that folder"
        sleep "${BLSPKD_SIGN_SECONDS:-10}"
    done
}

# run_stage N TITLE FUNCTION FOLDER [SETTINGS]: what ended in FOLDER with these settings is done, unless --stage asks for it.
# Of several nodes one runs it and the others wait, but with on_all_nodes=yes
run_stage() {
    local ended=$4/.done-$1 settings=${5:-} later
    [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] || return 0
    echo; echo "== stage $1: $2 ($(date +%H:%M:%S))"
    if [ "$stage" -ne "$1" ] && [ -e "$ended" ] && [ "$(cat "$ended")" = "$settings" ]; then echo "done before"; return 0; fi
    mkdir -p "$4"
    if [ "${node_rank:-0}" -gt 0 ]; then
        if [ "${on_all_nodes:-}" = yes ]; then "$3"; else wait_for_node_0 "$2" "$ended" "$settings"; fi
        return 0
    fi
    [ "${nodes:-1}" -eq 1 ] || begin_signs_of_life
    "$3"
    # What later stages made is out of date.
    for later in $(seq $(($1 + 1)) 9); do rm -f "$4/.done-$later"; done
    note "$settings" "$ended"
}

# sizes_of FOLDER: the options that the model of save_pretrained there was made with, a word a line
sizes_of() {
    python -c 'import json, sys
for name, value in json.load(open(f"{sys.argv[1]}/config.json")).items():
    if name.startswith(("adapter", "lora", "transcript")) and value not in ("", 0):
        print("--" + name.replace("_", "-"), *([] if value is True else [value]), sep="\n")' "$1"
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

# need_gpus: --gpus are there; fewer of them would train something else, or on the CPU, without a word
need_gpus() {
    local found
    [ "$gpus" -gt 0 ] || return 0
    found=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$found" -ge "$gpus" ] || fail "--gpus $gpus, but torch finds $found on this machine: give as many (0: CPU)"
}

# answer_on_gpus ARGUMENTS --output FILE: generate_responses.py, a shard on each of --gpus, which are joined then. A run
# that goes on with another number of GPUs keeps the shards that it has
answer_on_gpus() {
    local output=${*: -1} shards devices shard first last failed=() running
    need_gpus
    shards=$((gpus > 1 ? gpus : 1))
    [ ! -e "$output.responses.jsonl" ] || shards=1
    [ ! -e "$output.shards" ] || shards=$(cat "$output.shards")
    if [ "$shards" -eq 1 ]; then python scripts/generate_responses.py "$@"; return; fi
    mkdir -p "$(dirname "$output")"
    note "$shards" "$output.shards"
    IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus > 0 ? gpus - 1 : 0)))}"
    for ((first = 0; first < shards; first = last)); do
        last=$((first + (gpus > 0 ? gpus : 1))) running=()
        [ "$last" -le "$shards" ] || last=$shards
        for ((shard = first; shard < last; shard++)); do
            CUDA_VISIBLE_DEVICES=${devices[shard - first]} python scripts/generate_responses.py "$@" \
                --num-shards "$shards" --shard "$shard" &
            running+=($!) children+=($!)
        done
        # What the others answer is kept, whichever fails.
        for shard in "${!running[@]}"; do wait "${running[shard]}" || failed+=($((first + shard))); done
    done
    [ ${#failed[@]} -eq 0 ] || fail "responses: shard ${failed[*]} of $shards failed, as its message above says; run this again"
    python scripts/generate_responses.py "$@" --num-shards "$shards"
}

# published_schedule: sets schedule, the options of fairseq-train that all recipes share, of lr, warm_up, max_update,
# batch, accumulation and save_every
published_schedule() {
    schedule=(--optimizer adamw --lr "$lr" --lr-scheduler polynomial_decay --warmup-updates "$warm_up" --weight-decay 0.05
        --clip-norm 1.0 --max-update "$max_update" --total-num-update "$max_update"
        --batch-size "$batch" --update-freq "$accumulation" --max-tokens $((batch * 480000))
        --skip-bad-audio --seed 1 --num-workers 2 --log-interval 10
        --save-interval-updates "$save_every" --validate-interval-updates "$save_every" --keep-interval-updates 3
        --keep-last-epochs 5)
}

# train_on_gpus ARGUMENTS: fairseq-train on --gpus of each of --nodes
train_on_gpus() {
    need_gpus
    if [ "$gpus" -gt 1 ] || [ "$nodes" -gt 1 ]; then
        torchrun --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node $((gpus > 0 ? gpus : 1)) \
            --master-addr "${master%:*}" --master-port "${master##*:}" "$(command -v fairseq-train)" "$@"
    else
        fairseq-train "$@"
    fi
}
