"""How long a message takes from publish to the subscriber's hands, through two stores that sync.

    python -m bench.latency [--rate 1000] [--size 1024] [--json]

The same four processes as `bench.relay`, at a steady rate far below what they can do. The clock starts when the
publisher calls `publish` and stops when the subscriber has the message; telemetry, so the library may linger.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.ends import MIN_SIZE
from bench.relay import BenchError, Options, Result, median, run_once


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=int, default=1000, help="messages a second")
    parser.add_argument("--size", type=int, default=1024, help="bytes of payload")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long a run takes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="where the stores go: on a disk (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def main() -> int:
    given = arguments().parse_args()
    if given.size < MIN_SIZE or given.rate < 1:
        print(f"bench.latency: at least {MIN_SIZE} bytes, and one message a second", file=sys.stderr)
        return 64
    options = Options(
        size=given.size,
        messages=round(given.rate * given.seconds),
        batch=0,
        topics=1,
        devices=1,
        in_flight=16,
        runs=given.runs,
        directory=given.dir,
        rate=given.rate,
    )
    results: list[Result] = []
    try:
        for number in range(given.runs):
            one = run_once(options)
            results.append(one)
            print(f"run {number + 1}: p50 {one.p50_ms} ms  p99 {one.p99_ms} ms", file=sys.stderr, flush=True)
    except (BenchError, RuntimeError) as error:
        print(f"bench.latency: {error}", file=sys.stderr)
        return 1
    found = {"bench": "latency", "size": given.size, "rate": given.rate, "runs": given.runs} | median(results)
    if given.json:
        print(json.dumps(found), flush=True)
    return 1 if any(found[name] for name in ("lost", "duplicated", "reordered", "corrupt")) else 0


if __name__ == "__main__":
    sys.exit(main())
