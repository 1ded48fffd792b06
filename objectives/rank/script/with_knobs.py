"""A training script run with knobs laid on its model; the script itself is as it is.

    deepspeed --module ds_tune.objectives.rank.script.with_knobs --knob compile=blocks train.py --deepspeed ds.json

Everything behind the script's name is the script's, and what a launcher puts in front, such as `--local_rank=0`, too.
`--module` before it says that it is the name of a module.
"""

import os
import runpy
import sys
from pathlib import Path

from ds_tune.objectives.rank.knobs import parse_knobs
from ds_tune.objectives.rank.script.laid_on import lay_on_what_trains


def main(words: list[str]) -> None:
    knobs: list[str] = []
    of_launcher: list[str] = []
    is_module = False
    while words and words[0].startswith("-"):
        option, *words = words
        match option:
            case "--knob" if words:
                knob, *words = words
                knobs.append(knob)
            case "--module":
                is_module = True
            case _:
                of_launcher.append(option)
    if not words:
        sys.exit("ds_tune.objectives.rank.script.with_knobs: name the script behind the knobs")
    try:
        laid = parse_knobs(knobs)
    except ValueError as error:
        sys.exit(f"ds_tune.objectives.rank.script.with_knobs: --knob {error}")
    program, *arguments = words
    lay_on_what_trains(laid)
    sys.argv = [program, *of_launcher, *arguments]
    # As the interpreter has it for what it is started with.
    os.environ.pop("PYTHONSAFEPATH", None)
    if is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
