#!/usr/bin/env bash
# X-OPD (arXiv 2603.24596) on top of a BLSP-KD checkpoint: the student answers, the text teacher scores every token.
#
#   bash examples/x_opd/run.sh --from out/blsp_kd/model/checkpoint_last.pt --train T.tsv --valid V.tsv --test T.tsv [options]
#   bash examples/x_opd/run.sh --small [--from FILE]
#
# The paper trains the whole LLM (Adam, 2e-6, 256 utterances per update, 4 roll-outs each, one epoch of 27,847: 109
# updates); adapter and Partial LoRA bear ten times that rate. No dropout: roll-outs are drawn without. The
# prompt is the spoken message itself. To add behind the other options:
#
#   -- --lora-scope all    as in the paper: LoRA acts on text, too, held by L_im (what a checkpoint learned on speech acts
#                          on text from the start then)
#   -- --teacher-llm NAME  a larger teacher                     -- --estimator exact  less variance
#
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

name=x_opd prompt=chat lr=2e-5 warm_up=50 per_update=256 updates=109 save_every=25 needs_responses=""
needs_start="roll-outs of a student that does not hear yet teach nothing"
train_options=(--criterion on_policy_distillation --rollouts 4 --rollout-max-tokens 256 --lora-scope speech
    --adapter-dropout 0 --lora-dropout 0)
small_options=(--adapter-pre-layers 1 --adapter-post-layers 1 --adapter-heads 6 --rollouts 2 --rollout-max-tokens 8)
recipe "$@"
