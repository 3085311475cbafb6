#!/usr/bin/env bash
# An LLM that hears open English: from sentences that people typed to a model that answers speech, in stages that resume.
#
#   bash examples/open_vocabulary/run.sh [--speech DIR] [--sentences DIR] [--train N] [--rows N] [--warm-up-updates N]
#       [--updates N] [--mix "chat:0.5 continue:0.3 repeat:0.2"] [--repeats N] [--augment KINDS] [--augment-variants N]
#       [--pretrained DIR] [--transcript-merges N] [--speech-encoder NAME] [--llm NAME] [--voices "slt rms awb kal16 joe"]
#       [--mean] [--batch N] [--test-rows N] [--processes N] [--quick] [--stage N] [--stop-stage N] [--out DIR] [--cache DIR]
#
#   1 models         Whisper tiny.en and SmolLM2-135M-Instruct, as in the quickstart
#   2 sentences      chats, WordNet's examples and definitions, filtered; what was left out is counted
#   3 speech         the --train sentences that teach most words, and a third as many lists of words, in the voices of
#                    flite and joe, beside the speech of --speech
#   4 responses      what the LLM says to --rows transcripts, asked as --mix says, and to clips in which nobody speaks;
#                    up to --repeats others are to be repeated, and their response is their own transcript
#   5 warm-up        each speech embedding is told its token
#   6 distillation   BLSP-KD on the responses
#   7 recordings     real speech to test on, fetched
#   8 evaluation     the model, the one it began with, the cascade, and the LLM reading the text
#   9 report
#
# --speech adds speech made before (speak.py says what the folder holds), --sentences takes the place of stage 2 (the folder
# of select_sentences.py). With more --warm-up-updates or --updates, training goes on from where it was; everything else
# belongs to OUT, which refuses other options. --augment makes the sound anew in every epoch, or, with --augment-variants,
# so many versions of each clip, whose features are stored. --transcript-merges writes what is heard with so many merges of
# the LLM's tokenizer (default: as many as --pretrained). --mean goes on, after each training, from the mean of what it gave
# and what it began with, which must be of one shape. --batch is that of distillation, the warm-up's is three times as
# large. --quick runs every stage on a few rows. Killed, a run goes on with the same command.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/examples/common.sh"

stage=0 stop_stage=9 speech="" sentences="" train=36000 rows=12000 repeats=8000 warm_up_updates=8000 updates=4000 test_rows=200 quick="" mean=""
mix="chat:0.5 continue:0.3 repeat:0.2" transcript_merges="" augment="" augment_variants=0 batch=16 voices="slt rms awb kal16 joe" speech_encoder="" llm="" processes=$(nproc)
pretrained="$root/blspkd_fairseq/pretrained/whisper-tiny.en-smollm2-135m"
out="$root/out/open_vocabulary" cache="${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}"
usage() { sed -n '2,29s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
parse_options stage stop-stage speech sentences train rows repeats warm-up-updates updates test-rows --quick mix augment \
    augment-variants transcript-merges speech-encoder llm processes pretrained out cache batch voices --mean -- "$@"
whole_numbers stage stop_stage train rows repeats warm_up_updates updates test_rows processes batch augment_variants
out=$(realpath -m "$out") cache=$(realpath -m "$cache")
[ -z "$transcript_merges" ] || whole_numbers transcript_merges
from_here speech sentences speech_encoder llm pretrained
[ -z "$speech" ] || [ -f "$speech/train.tsv" ] || fail "--speech $speech holds no train.tsv: speak.py says what it needs"
[ -z "$sentences" ] || [ -f "$sentences/train.txt" ] || fail "--sentences $sentences holds no train.txt: give a folder of select_sentences.py"
[ -f "$pretrained/config.json" ] || fail "--pretrained $pretrained holds no config.json: give a folder of save_pretrained"
valid=200 nothing=400 tokens=48 answer_tokens=1000 sentence_limit=0 most_ready=0 conditions=(white:20 white:10 white:0 babble:10 8khz)
if [ -n "$quick" ]; then
    train=24 rows=18 repeats=6 warm_up_updates=4 updates=4 test_rows=4 valid=6 nothing=4 tokens=8 answer_tokens=8 sentence_limit=200 most_ready=12
    conditions=(white:10) voices="kal16 awb"
fi
one_run "$out" "--speech $speech --train $train --rows $rows --mix $mix --voices $voices --augment $augment --augment-variants $augment_variants --batch $batch --pretrained $pretrained --speech-encoder $speech_encoder --llm $llm --test-rows $test_rows --repeats $repeats${sentences:+ --sentences $sentences}${transcript_merges:+ --transcript-merges $transcript_merges}${mean:+ --mean}${quick:+ --quick}"
use_environment quickstart,recordings
speech_encoder=${speech_encoder:-$cache/whisper-tiny.en}
llm=${llm:-$cache/smollm2-135m-instruct}
here=examples/open_vocabulary data=$out/data asked=$out/data/asked model=$out/model results=$out/results
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then device=() negatives=0; else device=(--cpu) negatives=3000; fi

gather_sentences() {
    if [ -n "$sentences" ]; then
        mkdir -p "$out/sentences"; cp "$sentences"/*.txt "$sentences/frequencies.tsv" "$out/sentences"; return
    fi
    python $here/gather_sentences.py --out "$out/sentences" --cache "$cache" --limit "$sentence_limit"
}

speak() {
    # shellcheck disable=SC2086  # several voices are several words
    python $here/speak.py --sentences "$out/sentences" --out "$data" --cache "$cache" --train "$train" \
        --lists $((train / 3)) --valid "$valid" --test "$valid" --voices $voices --most-ready "$most_ready" --processes "$processes" \
        ${speech:+--speech "$speech"}
}

respond() {
    local split size=128
    [ ${#device[@]} -gt 0 ] || size=512
    # shellcheck disable=SC2086  # a mix is several words
    python $here/mix_prompts.py --data "$data" --rows "$rows" --held-out "$valid" --nothing "$nothing" --mix $mix
    for split in train valid test test_unheard; do
        [ -f "$asked/$split.tsv" ] || continue
        python scripts/generate_responses.py --llm "$llm" --input "$asked/$split.tsv" \
            --output "$asked/responses/$split.tsv" --max-new-tokens "$tokens" --batch-size "$size"
    done
    [ "$repeats" -eq 0 ] || python $here/mix_prompts.py --data "$data" --repeats "$repeats"
}

# train_part FOLDER DATA OPTIONS: goes on from the checkpoint in FOLDER, if there is one
train_part() {
    local folder=$1 part=$2 sizes features=(--cache-encoder-features)
    if [ "$augment_variants" -gt 0 ]; then
        features+=(--augment "$augment" --augment-variants "$augment_variants")
    elif [ -n "$augment" ]; then
        features=(--augment "$augment" --num-workers "$processes")
    fi
    mapfile -t sizes < <(sizes_of "$pretrained")
    mkdir -p "$folder"
    fairseq-train "$part" --user-dir blspkd_fairseq --task blsp_kd --audio-root "$data" "${device[@]}" \
        --arch blsp_kd --speech-encoder "$speech_encoder" --llm "$llm" --speech-encoder-dtype bfloat16 \
        --product-dtype bfloat16 --criterion kl_distillation --optimizer adamw --adam-betas "(0.9, 0.98)" --clip-norm 1.0 \
        --lr-scheduler polynomial_decay --num-workers 0 --seed 1 --log-format json --log-interval 20 \
        --no-epoch-checkpoints --save-interval-updates 200 --keep-interval-updates 1 --validate-interval-updates 200 \
        --adapter-soft-tokens "${sizes[@]}" ${transcript_merges:+--transcript-merges "$transcript_merges"} "${features[@]}" --save-dir "$folder" "${@:3}" 2>&1 | tee -a "$folder.log"
}

# trained PART: what a training gave, or the mean of that and what it began with
trained() {
    if [ -n "$mean" ]; then echo "$model/$1-mean.pt"; else echo "$model/$1/checkpoint_last.pt"; fi
}

# average_with START PART
average_with() {
    [ -z "$mean" ] || blspkd average --inputs "$model/$2/checkpoint_last.pt" "$1" --output "$(trained "$2")"
}

warm_up() {
    train_part "$model/warm-up" "$data" --pretrained-model "$pretrained" --batch-size $((3 * batch)) --lr 6e-4 \
        --token-ce-weight 1 --token-mse-weight 0.3 --token-negatives "$negatives" \
        --response-kl-weight 0 --input-kl-weight 0 \
        --warmup-updates $((warm_up_updates / 20)) --total-num-update "$warm_up_updates" --max-update "$warm_up_updates"
    average_with "$pretrained" warm-up
}

distil() {
    local start="warm-up-updates=$warm_up_updates" folder=$model/distillation part=$asked/responses
    [ "$repeats" -eq 0 ] || part=$asked/distilled
    # On top of another warm-up it begins anew.
    [ "$(cat "$folder.start" 2>/dev/null)" = "$start" ] || rm -rf "$folder" "$folder.log"
    printf '%s' "$start" >"$folder.start"
    train_part "$folder" "$part" --finetune-from-model "$(trained warm-up)" \
        --token-ce-weight 0.3 \
        --batch-size "$batch" --lr 3e-4 --warmup-updates $((updates / 20)) --total-num-update "$updates" \
        --max-update "$updates"
    average_with "$(trained warm-up)" distillation
}

fetch_recordings() {
    python $here/recordings.py --out "$out/sets" --cache "$cache" --whisper "$speech_encoder" --rows "$test_rows"
}

evaluate() {
    local split sets=() common
    for split in test test_unheard; do
        [ ! -f "$asked/responses/$split.tsv" ] || sets+=(--set "$split=$asked/responses/$split.tsv")
    done
    for split in phone game book; do
        [ "$(cat "$out/sets/$split.tsv" 2>/dev/null | wc -l)" -lt 2 ] || sets+=(--set "$split=$out/sets/$split.tsv")
    done
    common=("${sets[@]}" --audio-root "$data" --rows "$test_rows" --most-tokens "$answer_tokens")
    hear text --llm "$llm"
    hear cascade --llm "$llm" --cascade "$speech_encoder" --nothing "$asked/nothing.tsv" --conditions "${conditions[@]}"
    hear before --checkpoint "$pretrained" --nothing "$asked/nothing.tsv"
    hear warm-up --checkpoint "$(trained warm-up)"
    hear model --checkpoint "$(trained distillation)" --nothing "$asked/nothing.tsv" \
        --boundaries "$speech_encoder" --conditions "${conditions[@]}"
    hear sound --checkpoint "$(trained distillation)" --by-sound --answers
}

# hear NAME OPTIONS: measures a system, unless it was measured and has not been trained since
hear() {
    local of=$results/$1.of now=$1
    case $1 in warm-up | model | sound) now="$1 $trained_on" ;; esac
    if [ -f "$results/$1.json" ] && [ "$(cat "$of" 2>/dev/null)" = "$now" ]; then echo "$1: measured before"; return; fi
    python $here/hear.py "${@:2}" "${common[@]}" --out "$results/$1.json"
    printf '%s' "$now" >"$of"
}

report() {
    python $here/write_report.py --results "$results" --logs "$model/warm-up.log" "$model/distillation.log" \
        --out "$out/report"
}

trained_on="warm-up-updates=$warm_up_updates updates=$updates"
mkdir -p "$model" "$results"
if [ "$stage" -le 1 ]; then
    echo; echo "== stage 1: models ($(date +%H:%M:%S))"
    python examples/quickstart/fetch_models.py --cache "$cache"
fi
run_stage 2 "sentences" gather_sentences "$out"
run_stage 3 "speech" speak "$out"
run_stage 4 "responses of the LLM to the transcripts" respond "$out"
run_stage 5 "warm-up" warm_up "$out" "warm-up-updates=$warm_up_updates"
run_stage 6 "distillation" distil "$out" "$trained_on"
run_stage 7 "real recordings" fetch_recordings "$out"
run_stage 8 "evaluation" evaluate "$out" "$trained_on"
run_stage 9 "report" report "$out" "$trained_on"
[ "$stop_stage" -lt 9 ] || cat "$out/report/report.md"
