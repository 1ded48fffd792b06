#!/bin/sh
# What docs/log records of a machine, in one go: the main command, whether its optimum reproduces, the table of
# warm ranks, DeepSpeed's autotuner in its default stage, and the head to head with it. Cut off at any point, the same
# command goes on: a part that is done is not done again. All output also lands in FOLDER.
#
#   benchmarks/record.sh FOLDER GPUS [options of tune, such as --memory-cap 80GiB]
set -eu
python=${PYTHON:-python3}
here=$(dirname "$(readlink -f "$0")")
folder=$1 gpus=$2
shift 2
mkdir -p "$folder"

# A hang in one part must not eat the time of the next.
part() {
    name=$1 seconds=$2
    shift 2
    [ ! -e "$folder/$name.done" ] || return 0
    echo "== $name: $*"
    started=$(date +%s)
    timeout "$seconds" "$@" >>"$folder/$name.log" 2>&1 && status=0 || status=$?
    tail -n 40 "$folder/$name.log"
    echo "== $name ended with status $status after $(($(date +%s) - started)) s"
    [ "$status" -ne 0 ] || touch "$folder/$name.done"
}

part tune 420 "$python" -P -m ds_tune.tuner --trials 9 --results "$folder/results" --gpus "$gpus" "$@"
part reproduce 150 "$python" "$here/reproduce.py" "$folder/results"
part warm_ranks 400 "$python" "$here/warm_ranks.py" --out "$folder/warm_ranks.jsonl" --gpus "$gpus" \
    --part memory fresh --timed-seconds 2
part autotuner 600 "$python" "$here/deepspeed_autotuner.py" --out "$folder/autotuner.json" --gpus "$gpus"
part head_to_head 600 "$python" "$here/head_to_head.py" --out "$folder/head_to_head" --gpus "$gpus" \
    --contestants deepspeed core wide matched
