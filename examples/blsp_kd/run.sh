#!/usr/bin/env bash
# BLSP-KD (arXiv 2405.19041): CFormer and Partial LoRA, distilled at the input and at the response.
#
#   bash examples/blsp_kd/run.sh --train "librispeech/train-clean-100.tsv gigaspeech/train-xl.tsv" --valid V.tsv --test T.tsv [options]
#   bash examples/blsp_kd/run.sh --small
#
# Settings of blsp-emo's first stage, the nearest that is published. Also train the encoder: end with
# "-- --unfreeze-speech-encoder". Begin with the checkpoint of examples/warm_up: --from FILE.
#
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

name=blsp_kd
train_options=(--criterion kl_distillation --kd-temperature 2 --lora-scope speech)
small_options=(--adapter-pre-layers 1 --adapter-post-layers 1 --adapter-heads 6)
recipe "$@"
