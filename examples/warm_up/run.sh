#!/usr/bin/env bash
# The warm-up of a CFormer, from transcripts alone: each speech embedding is classified as, and drawn to, its token's.
#
#   bash examples/warm_up/run.sh --train "librispeech/train-clean-100.tsv gigaspeech/train-xl.tsv" --valid V.tsv --test T.tsv [options]
#   bash examples/blsp_kd/run.sh --from out/warm_up/model/checkpoint_last.pt --train ...
#   bash examples/warm_up/run.sh --small
#
# No paper has it; in the closed comparison it helped BLSP-KD (examples/comparison/results/RESULTS.md: three seeds, no
# verdict). An update costs neither responses nor the LLM's forward pass. The rate is that of blsp_kd, not searched at
# full size.
#
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

name=warm_up needs_responses=""
train_options=(--criterion kl_distillation --token-ce-weight 1 --token-mse-weight 1 --response-kl-weight 0
    --input-kl-weight 0 --lora-scope none)
small_options=(--adapter-pre-layers 1 --adapter-post-layers 1 --adapter-heads 6 --token-vocabulary train)
recipe "$@"
