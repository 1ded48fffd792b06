#!/bin/sh
# Searches the space of space.toml: stages, batch sizes and a constraint, with activation checkpointing always on.
set -eu
here=$(dirname "$(readlink -f "$0")")
exec ds-tune --gpus 0 --seq-len 32 --trials 2 --no-verify --space "$here/space.toml" --results "${1:-autotuning_results}"
