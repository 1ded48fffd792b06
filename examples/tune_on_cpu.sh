#!/bin/sh
# Tunes the built-in small model with real DeepSpeed on two CPU ranks: two trials, and no verification afterwards.
# Leave the options out to tune GPT2-xl on all visible GPUs, and to run the winner again in fresh processes.
set -eu
exec ds-tune --gpus 0 --seq-len 32 --trials 2 --no-verify --results "${1:-autotuning_results}"
