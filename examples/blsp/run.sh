#!/usr/bin/env bash
# BLSP (arXiv 2309.00916): a CNN adapter, trained by cross-entropy on the LLM's continuations; LLM and encoder frozen.
#
#   bash examples/blsp/run.sh --train "librispeech/train-clean-100.tsv gigaspeech/train-xl.tsv" --valid V.tsv --test T.tsv [options]
#   bash examples/blsp/run.sh --small
#
# Its first stage, which taught a base LLM to follow instructions, is not needed with a chat LLM: to repeat it, fine-tune
# the base LLM on Alpaca with any trainer and give the result as --llm. Published: Whisper-small, Llama-2-7B.
#
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

name=blsp lr=5e-5 response_tokens=64
prompt="Continue the following text in a coherent and engaging style with less than 40 words. {speech}"
train_options=(--adapter cnn --criterion kl_distillation --response-ce-weight 1 --response-kl-weight 0 --input-kl-weight 0
    --lora-scope none)
small_options=(--adapter-bottleneck 64)
recipe "$@"
