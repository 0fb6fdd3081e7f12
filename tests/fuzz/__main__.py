"""`python -m tests.fuzz [--seconds 60] [--seed N] [target …]`: every parser in turn."""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings

from tests.fuzz.engine import run
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Mutated and random bytes into every parser."
    )
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default 60)")
    parser.add_argument(
        "--seed", type=int, default=None, help="repeat an earlier run; default: the time of day"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    warnings.simplefilter("ignore")  # libraries have much to say about such certificates
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}, {options.seconds:g} s each")
    print(f"{'target':<14}{'inputs':>10}{'accepted':>10}{'a second':>10}{'peak MiB':>10}{'found':>7}")
    found = 0
    for name in options.targets or TARGETS:
        began = time.perf_counter()
        outcome = run(TARGETS[name](), seed=seed, seconds=options.seconds)
        took = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            f"{name:<14}{outcome.inputs:>10}{outcome.inputs - outcome.refused:>10}"
            f"{outcome.inputs / took:>10.0f}{peak:>10}{len(outcome.findings):>7}",
            flush=True,
        )
        for finding in outcome.findings:
            found += 1
            print(f"  kept as {finding.keep()}\n{finding.report}")
    print("nothing found" if not found else f"{found} found: mend, then `pytest tests/fuzz` replays them")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
