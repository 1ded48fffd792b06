"""Does the exported optimum train as fast as reported? Runs `cmd_optimal.txt` as it stands and compares.

    python benchmarks/reproduce.py autotuning_results [--times 3]

The command gets options for the clock alone: how many steps to take, so that a run lasts about --timed-seconds.
Prints one JSON line a run, then one with the ratio of their mean to the study's figure: the verified one, if any.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="for each run")
    parser.add_argument("--timed-seconds", type=float, default=20, metavar="S", help="of each run, about (default 20)")
    arguments = parser.parse_args()
    reported = json.loads((arguments.results / "summary.json").read_text())["best"]
    expected = reported["verified_samples_per_second"] or reported["samples_per_second"]
    steps = max(round(arguments.timed_seconds * expected / reported["global_batch_size"]), 3)
    counts = f"--warmup-steps {min(steps, 6)} --steps {min(steps, 100)}"
    command = (arguments.results / "cmd_optimal.txt").read_text().strip()
    rates = []
    for run in range(arguments.times):
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            finished = subprocess.run(
                ["sh", "-c", f'{command} {counts} --json "$0"', str(figures)],
                capture_output=True,
                text=True,
                timeout=arguments.timeout,
                check=False,
            )
            if finished.returncode != 0:
                print(finished.stdout[-2000:], finished.stderr[-4000:], sep="\n", file=sys.stderr)
                return 1
            rates.append(json.loads(figures.read_text())["samples_per_second"])
        print(json.dumps({"run": run, "samples_per_second": rates[-1]}), flush=True)
    ratio = statistics.fmean(rates) / expected
    summary = {"name": reported["name"], "reported": expected, "reproduced_over_reported": ratio}
    print(json.dumps(summary), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
