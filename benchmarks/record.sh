#!/bin/sh
# What docs/experiments.md records of a machine, in one go: the main command, whether its optimum reproduces, and the
# table of warm ranks. Cut off at any point, the same command goes on. All output also lands in FOLDER.
#
#   benchmarks/record.sh FOLDER [options of tune, such as --memory-cap 80GiB]
#
# DeepSpeed's autotuner beside ds-tune takes calls of its own: head_to_head.py.
set -eu
python=${PYTHON:-python3}
here=$(dirname "$(readlink -f "$0")")
folder=$1
shift
mkdir -p "$folder"

# A hang in one part must not eat the time of the next.
part() {
    name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    started=$(date +%s)
    timeout "$seconds" "$@" >>"$folder/$name.log" 2>&1 && status=0 || status=$?
    tail -n 40 "$folder/$name.log"
    echo "== $name ended with status $status after $(($(date +%s) - started)) s"
}

part tune 420 "$python" -P -m tuner --trials 9 --results "$folder/results" "$@"
part reproduce 150 "$python" "$here/reproduce.py" "$folder/results"
part warm_ranks 300 "$python" "$here/warm_ranks.py" --out "$folder/warm_ranks.jsonl"
