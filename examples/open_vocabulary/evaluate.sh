#!/usr/bin/env bash
# What a model hears of real people, beside the cascade of the same Whisper and LLM: measured anew, in twelve minutes.
#
#   bash examples/open_vocabulary/evaluate.sh [--model MODEL] [--rows N] [--most-tokens N] [--speech DIR]
#       [--speech-encoder NAME] [--llm NAME] [--out DIR] [--cache DIR]
#
# MODEL is a checkpoint or a folder of save_pretrained (default: the published one). Telephone prompts, a game's actors and
# five sentences of an audio book are fetched, clips in which nobody speaks are made; --speech adds test.tsv and
# test_unheard.tsv of a folder of speech made before (speak.py says what it holds). --most-tokens cuts the answers short, to
# see that it runs. What was measured with the same options is kept; OUT/report/report.md has it all.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/examples/common.sh"

model="$root/blspkd_fairseq/pretrained/whisper-tiny.en-smollm2-135m" rows=100 most_tokens=1000 speech="" speech_encoder="" llm=""
out="$root/out/evaluate" cache="${BLSPKD_CACHE:-$HOME/.cache/blspkd_fairseq}"
usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
parse_options model rows most-tokens speech speech-encoder llm out cache -- "$@"
whole_numbers rows most_tokens
out=$(realpath -m "$out") cache=$(realpath -m "$cache")
from_here model speech speech_encoder llm
[ -e "$model" ] || fail "--model $model does not exist"
[ -z "$speech" ] || [ -f "$speech/test.tsv" ] || fail "--speech $speech holds no test.tsv: speak.py says what it needs"
one_run "$out" "--model $model --rows $rows --most-tokens $most_tokens --speech $speech --speech-encoder $speech_encoder --llm $llm"
use_environment quickstart,recordings
speech_encoder=${speech_encoder:-$cache/whisper-tiny.en}
llm=${llm:-$cache/smollm2-135m-instruct}
here=examples/open_vocabulary

python examples/quickstart/fetch_models.py --cache "$cache"
[ -f "$out/sets/book.tsv" ] ||
    python $here/recordings.py --out "$out/sets" --cache "$cache" --whisper "$speech_encoder" --rows "$rows"
[ -f "$out/sets/nothing.tsv" ] || python $here/no_speech.py --out "$out/sets" --count 100 --voices "$out/sets/phone.tsv"
sets=(--set "phone=$out/sets/phone.tsv" --set "game=$out/sets/game.tsv" --set "book=$out/sets/book.tsv")
for split in test test_unheard; do
    [ ! -f "$speech/$split.tsv" ] || sets+=(--set "$split=$speech/$split.tsv")
done
mkdir -p "$out/results"
for system in text cascade model; do
    case $system in
        text) options=(--llm "$llm") ;;
        cascade) options=(--llm "$llm" --cascade "$speech_encoder" --nothing "$out/sets/nothing.tsv") ;;
        model)
            options=(--checkpoint "$model" --nothing "$out/sets/nothing.tsv")
            options+=(--boundaries "$speech_encoder" --boundary-rows 30)
            ;;
    esac
    echo; echo "== $system ($(date +%H:%M:%S))"
    [ -f "$out/results/$system.json" ] ||
        python $here/hear.py "${options[@]}" "${sets[@]}" --rows "$rows" --most-tokens "$most_tokens" --out "$out/results/$system.json"
done
python $here/write_report.py --results "$out/results" --logs --out "$out/report"
cat "$out/report/report.md"
