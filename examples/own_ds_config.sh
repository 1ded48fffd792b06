#!/bin/sh
# Tunes below your own DeepSpeed file: trials set the batch sizes and the ZeRO stage, and keep all the rest of it.
# The file itself is never written to; FOLDER/ds_config_optimal.json is yours with the winner's settings.
set -eu
here=$(dirname "$(readlink -f "$0")")
exec ds-tune --gpus 0 --seq-len 32 --trials 2 --no-verify --ds-config "$here/ds_config.json" \
    --results "${1:-autotuning_results}"
