#!/usr/bin/env bash
# The cascade: Whisper transcribes, the LLM reads that. Nothing is trained; beside it, the LLM reading the true text.
#
#   bash examples/cascade/run.sh --test T.tsv [--speech-encoder openai/whisper-large-v3] [--llm NAME] [--out DIR]
#   bash examples/cascade/run.sh --small
#
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

name=cascade trained=""
recipe "$@"
