#!/usr/bin/env bash
# BLSP-KD on CoVoST 2: distilled on the speech and transcripts of Common Voice, tested on speech translation.
# Stages that are done are skipped; each can be run again by itself, and a stage that was killed goes on where it was.
#
#   bash examples/covost2/run.sh --common-voice DIR --translations DIR --direction en_de [options]
#   bash examples/covost2/run.sh --small        the same steps on real recordings, on two CPU cores, in minutes
#
#   --common-voice DIR     Common Voice 4, with a folder for each language (clips/, validated.tsv)
#   --translations DIR     covost_v2.*.tsv
#   --direction X          such as en_de; several in quotes, or "all" (21 into English, 15 from English): one by one
#   --speech-encoder NAME  default openai/whisper-small           --llm NAME  default Qwen/Qwen2.5-7B-Instruct
#   --gpus N               on this machine (default 1; 0: CPU)    --nodes N --node-rank R --master HOST:PORT, with a
#                          shared --out: node 0 runs all stages, the others take part in training and wait else
#   --stage N --stop-stage N --out DIR --max-update N
#
#   1 prepare    16 kHz audio and manifests                       4 average    the last 5 checkpoints
#   2 responses  the LLM continues the transcripts                5 generate   fairseq-generate --scoring sacrebleu
#   3 train      fairseq-train                                    6 report     against the cascade and the text
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/examples/common.sh"

stage=0 stop_stage=6 common_voice="" translations="" direction="" gpus=1 nodes=1 node_rank=0 master=127.0.0.1:29500
speech_encoder=openai/whisper-small llm=Qwen/Qwen2.5-7B-Instruct out="" max_update=0 small=""
usage() { sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
parse_options --small stage stop-stage common-voice translations direction gpus nodes node-rank master speech-encoder \
    llm out max-update -- "$@"
whole_numbers stage stop_stage gpus nodes node_rank max_update
check_nodes 3
if [ -z "$small" ] && { [ -z "$common_voice" ] || [ -z "$direction" ]; }; then
    fail "--common-voice and --direction are needed (or --small; --help lists the options)"
fi
common_voice=${common_voice:+$(realpath -m "$common_voice")} translations=${translations:+$(realpath -m "$translations")}
out=$(realpath -m "${out:-$root/out/covost2${small:+_small}}")
from_here speech_encoder llm
one_run "$out" "--common-voice $common_voice --translations $translations --speech-encoder $speech_encoder --llm $llm"

# What minutes of a CPU can show: that every step works. SmolLM2 cannot translate, so its BLEU says nothing.
prepare=() responses=() train=() generate=(--max-len-b 128) evaluate=(--max-new-tokens 128)
# The published recipe takes 768 utterances per update: GPUs x nodes x batch x accumulation.
#   1 GPU:            1 x 1 x 8 x 96 = 768
#   8 GPUs:           8 x 1 x 8 x 12 = 768
#   2 nodes of 8:     8 x 2 x 8 x  6 = 768
batch=8 per_update=768
share_out
# 2,000 updates are five epochs of English, the largest set; the published warm-up of 1,000 is for ten times the data.
lr=1e-4 warm_up=200 save_every=250 cuda=()
[ "$gpus" -gt 0 ] || cuda=(--cpu)
use_environment "quickstart${small:+,recordings}"
if [ -n "$small" ]; then
    cache=${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}
    speech_encoder=$cache/whisper-tiny.en llm=$cache/smollm2-135m-instruct direction=en_fr gpus=0 cuda=(--cpu)
    common_voice=$out/corpus translations=$out/corpus/en
    prepare=(--any-direction) responses=(--max-new-tokens 16 --batch-size 64 --rows 64)
    generate=(--max-len-b 16) evaluate=(--max-new-tokens 16 --conditions white:10 --align)
    train=(--adapter-pre-layers 1 --adapter-post-layers 1 --adapter-heads 6 --token-ce-weight 1 --token-mse-weight 1)
    batch=16 accumulation=1 lr=1e-3 warm_up=5
    [ "$max_update" -gt 0 ] || max_update=40
    python examples/quickstart/fetch_models.py --cache "$cache"
    [ -d "$out/corpus" ] || python scripts/fetch_recordings.py --cache "$cache" --layout covost2 "$out/corpus"
fi
[ "$max_update" -gt 0 ] || max_update=2000
short_warm_up
if [ "$direction" = all ]; then
    direction=$(python -c 'from blspkd_fairseq.data.corpora import EN_TO_X, X_TO_EN
print(*(f"{x}_en" for x in X_TO_EN), *(f"en_{x}" for x in EN_TO_X))')
fi

run_direction() {
    local pair=$1 work=$out/$1 data=$out/$1/data model=$out/$1/model
    run_stage 1 "$pair, prepare" prepare_data "$work"
    run_stage 2 "$pair, responses of the LLM to the transcripts" make_responses "$work"
    on_all_nodes=yes run_stage 3 "$pair, train" run_training "$work" "$max_update updates"
    [ "$node_rank" -eq 0 ] || return 0
    run_stage 4 "$pair, average" average_checkpoints "$work"
    run_stage 5 "$pair, generate" run_generation "$work"
    run_stage 6 "$pair, report" make_report "$work"
    [ "$stop_stage" -lt 6 ] || echo "report: $work/report/report.md"
}

prepare_data() {
    python scripts/prepare_covost2.py --root "$common_voice" ${translations:+--translations "$translations"} \
        --direction "$pair" --output "$data" "${prepare[@]}"
    python -m blspkd_fairseq.data.validate "$data"
}

make_responses() {
    local split
    mkdir -p "$data/responses"
    for split in train:train dev:valid; do
        answer_on_gpus --llm "$llm" --input "$data/${split%:*}.tsv" "${responses[@]}" \
            --output "$data/responses/${split#*:}.tsv"
    done
}

run_training() {
    local schedule
    published_schedule
    train_on_gpus "$data/responses" --user-dir blspkd_fairseq --task blsp_kd --audio-root "$data" "${cuda[@]}" \
        --arch blsp_kd --speech-encoder "$speech_encoder" --llm "$llm" \
        --criterion kl_distillation --kd-temperature 2 \
        --save-dir "$model" "${schedule[@]}" "${train[@]}"
}

average_checkpoints() {
    local epochs inputs=()
    epochs=$(find "$model" -regex '.*/checkpoint[0-9]+\.pt' | wc -l)
    if [ "$epochs" -gt 0 ]; then
        inputs=("$model" --num-epoch-checkpoints $((epochs < 5 ? epochs : 5)))
    else
        echo "training ended within its first epoch: checkpoint_last.pt stands for the average"
        inputs=("$model/checkpoint_last.pt")
    fi
    python scripts/average_checkpoints.py --output "$model/checkpoint_average.pt" --inputs "${inputs[@]}"
}

run_generation() {
    local tokenizer
    tokenizer=$(python -c 'import sys
from blspkd_fairseq.evaluation.metrics import bleu_tokenizer
print(bleu_tokenizer(sys.argv[1]))' "${pair#*_}")
    fairseq-generate "$data" --user-dir blspkd_fairseq --task blsp_kd "${cuda[@]}" --gen-subset test \
        --path "$model/checkpoint_average.pt" --prompt translate --beam 1 --batch-size 32 "${generate[@]}" \
        --scoring sacrebleu --sacrebleu-tokenizer "$tokenizer" --results-path "$work/generated"
    tail -n 1 "$work/generated/generate-test.txt"
}

make_report() {
    python -m blspkd_fairseq.evaluate --translation "$data/test.tsv" --asr "$data/test.tsv" \
        --checkpoint "blsp_kd=$model/checkpoint_average.pt" --cascade "$speech_encoder" --text --llm "$llm" \
        --batch-size 32 "${evaluate[@]}" --out "$work/report"
}

for pair in $direction; do run_direction "$pair"; done
