# The recipe of one system; sourced by examples/{blsp,warm_up,blsp_kd,x_opd,cascade}/run.sh, which set the variables of
# the first paragraph and then call `recipe "$@"`. Stages that are done are skipped; each can be run again by itself.
#
#   --train "A.tsv B.tsv"  manifests to train on (README, Data)       --valid FILE    --test FILE
#   --small                the same steps on real recordings, on two CPU cores, in minutes
#   --speech-encoder NAME  default openai/whisper-small                --llm NAME      default Qwen/Qwen2.5-7B-Instruct
#   --gpus N               on this machine (default 8; 0: CPU)         --nodes N --node-rank R --master HOST:PORT, with a
#                          shared --out: node 0 runs all stages, the others take part in training and wait else
#   --from FILE            checkpoint to begin with
#   --stage N --stop-stage N --max-update N                            --out DIR       default out/SYSTEM, SYSTEM_small
#   -- OPTIONS             more options of fairseq-train, in place of the recipe's where it has them
#
#   1 data       one manifest for each split                           3 train      fairseq-train
#   2 responses  the LLM continues the transcripts                     4 evaluate   against the cascade and the text
set -euo pipefail

# updates: 2,600 of 768 utterances are an epoch of 3,000 hours
name="" prompt=continue response_tokens=48 lr=1e-4 warm_up=1000 per_update=768 updates=2600 max_update=0
save_every=250  # updates: what a lost machine costs at most
train_options=() small_options=() trained=yes needs_responses=yes needs_start=""
recipe_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$recipe_folder/.." && pwd)
source "$recipe_folder/common.sh"

recipe() {
    local stage=0 stop_stage=4 train="" valid="" test="" gpus=8 nodes=1 node_rank=0 master=127.0.0.1:29500 from=""
    local speech_encoder=openai/whisper-small llm=Qwen/Qwen2.5-7B-Instruct out="" small="" own=() more=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do own+=("$1"); shift; done
    more=("${@:2}")
    parse_options --small stage stop-stage train valid test gpus nodes node-rank master from speech-encoder llm out \
        max-update -- "${own[@]}"
    [ -n "$trained" ] || [ ${#more[@]} -eq 0 ] || fail "${more[*]}: nothing is trained here"
    whole_numbers stage stop_stage gpus nodes node_rank max_update
    check_nodes 3
    if [ -z "$small" ] && { [ -z "$test" ] || { [ -n "$trained" ] && { [ -z "$train" ] || [ -z "$valid" ]; }; }; }; then
        fail "${trained:+--train, --valid and }--test must be given (or --small; --help lists the options)"
    fi
    [ -z "$needs_start" ] || [ -n "$small" ] || [ -n "$from" ] || fail "--from must be given: $needs_start"
    local word words=""
    for word in $train; do from_here word; words+="$word "; done
    train=${words% }
    from_here valid test from speech_encoder llm
    out=$(realpath -m "${out:-$root/out/$name${small:+_small}}")
    one_run "$out" "--train $train --valid $valid --test $test --speech-encoder $speech_encoder --llm $llm --from $from${more[*]:+ -- ${more[*]}}"
    local batch=8 accumulation device=() responses=(--max-new-tokens "$response_tokens" --batch-size 64) evaluate=()
    share_out
    [ "$gpus" -gt 0 ] || device=(--cpu)
    use_environment "quickstart${small:+,recordings}"
    if [ -n "$small" ]; then
        local cache=${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq} corpus=$out/corpus
        speech_encoder=$cache/whisper-tiny.en llm=$cache/smollm2-135m-instruct gpus=0 device=(--cpu)
        python examples/quickstart/fetch_models.py --cache "$cache"
        [ -d "$corpus" ] || python scripts/fetch_recordings.py --cache "$cache" --layout librispeech "$corpus"
        python scripts/prepare_librispeech.py --root "$corpus" --output "$out/prepared"
        train=$out/prepared/train-clean-100.tsv valid=$out/prepared/dev-clean.tsv test=$out/prepared/test-clean.tsv
        batch=16 accumulation=1 lr=1e-3 warm_up=2 train_options+=("${small_options[@]}")
        responses=(--max-new-tokens 12 --batch-size 64 --rows 64) evaluate=(--max-new-tokens 16 --batch-size 32)
        [ "$max_update" -gt 0 ] || max_update=20
    fi
    [ "$max_update" -gt 0 ] || max_update=$updates
    short_warm_up
    if [ -n "$trained" ]; then
        run_stage 1 "$name, data" make_data "$out"
        [ -z "$needs_responses" ] || run_stage 2 "$name, responses of the LLM to the transcripts" make_responses "$out"
        on_all_nodes=yes run_stage 3 "$name, train" run_training "$out" "$max_update updates"
    fi
    [ "$node_rank" -eq 0 ] || return 0
    run_stage 4 "$name, evaluate" run_evaluation "$out"
    [ "$stop_stage" -lt 4 ] || echo "report: $out/report/report.md"
}

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[-1]}"; sed -n '/^#   --train/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

make_data() {
    # shellcheck disable=SC2086  # several manifests are several words
    python scripts/merge_manifests.py --inputs $train --output "$out/data/train.tsv"
    python scripts/merge_manifests.py --inputs "$valid" --output "$out/data/valid.tsv"
    python -m blspkd_fairseq.data.validate "$out/data"
}

make_responses() {
    local split
    for split in train valid; do
        answer_on_gpus --llm "$llm" --prompt "$prompt" --input "$out/data/$split.tsv" "${responses[@]}" \
            --output "$out/data/responses/$split.tsv"
    done
}

run_training() {
    local data=$out/data start=() schedule
    published_schedule
    [ -z "$needs_responses" ] || data=$out/data/responses
    [ -z "$from" ] || start=(--finetune-from-model "$from")
    train_on_gpus "$data" --user-dir blspkd_fairseq --task blsp_kd "${device[@]}" --prompt "$prompt" \
        --arch blsp_kd --speech-encoder "$speech_encoder" --llm "$llm" \
        --save-dir "$out/model" "${schedule[@]}" "${start[@]}" "${train_options[@]}" "${more[@]}"
}

run_evaluation() {
    local checkpoint=()
    [ -z "$trained" ] || checkpoint=(--checkpoint "$name=$out/model/checkpoint_last.pt")
    python -m blspkd_fairseq.evaluate --asr "$test" --qa "$test" --qa-prompt continue --language en --llm "$llm" \
        "${checkpoint[@]}" --cascade "$speech_encoder" --text "${evaluate[@]}" --out "$out/report"
}
