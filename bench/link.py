"""STP on a narrow link, alone and beside others: goodput, loss, fairness, and how soon a command leaves. Needs root.

    python -m bench.link [--json] [--rounds 3] [--only clean,loss,…] [--rate 10] [--rtt 30] [--queue 25]

Two processes in two network namespaces, both with real sockets, the link between them is bench.wire's: by default
10 Mbit/s of IP packets each way, 15 ms each way, a FIFO of 25 packets. The last line on stdout is JSON; all but
`command` are medians of the rounds.

    clean       the share of the link that 10 MiB took, bytes of the stream over bytes of the link
    loss        the same at 2 % random loss in both directions
    flows       two STP flows, the second 2 s later: the larger share over the smaller one in 20 s, and Jain's index
    stp_first   STP, and 2 s later the kernel's CUBIC: as above
    tcp_first   the other way round
    tcp_alone   TCP, clean and at the same loss, for comparison
    command     at 1 Mbit/s, bulk without end: ms from writing a command of 1 KiB to its arrival
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

from attrs import asdict, define, evolve

from bench.link_ends import COMMAND, Plan
from bench.transport import make_identities
from bench.wire import A, B, Conditions, Wire, WireError

Flow: TypeAlias = list[tuple[float, int]]
"""Pairs of time and bytes so far."""

SIZE: Final = 10 * 1024 * 1024
LOSS: Final = 0.02
STAGGER: Final = 2.0
"""Seconds by which the second flow is later."""
SETTLE: Final = 3.0
"""Seconds that both have together before the count starts."""
WINDOW: Final = 20.0
"""Seconds for which shares are counted."""
NARROW: Final = 125_000.0
"""Bytes a second of the link on which commands are timed."""
COMMANDS_FOR: Final = 30.0
"""Seconds."""


@define
class Setting:
    """What all measurements of a run have in common."""

    conditions: Conditions
    directory: Path
    congestion: str
    seed: int = 1


def python(*argv: str) -> list[str]:
    return [sys.executable, "-m", "bench.link_ends", *argv]


def serve(wire: Wire, setting: Setting, kind: str, size: int = 0) -> subprocess.Popen[str]:
    command = python("serve", kind, str(setting.directory), str(size))
    server = wire.popen(B, command, stdin=subprocess.PIPE)
    assert server.stdout is not None
    if server.stdout.readline().strip() != "READY":
        raise SystemExit(f"bench.link: the {kind} receiver did not start")
    return server


def send(wire: Wire, setting: Setting, kind: str, **plan: Any) -> subprocess.Popen[str]:
    given = Plan(congestion=setting.congestion if kind == "stp" else "", **plan)
    return wire.popen(A, python("send", kind, str(setting.directory), json.dumps(asdict(given))))


def report(server: subprocess.Popen[str], *, ask: bool) -> dict[str, Any]:
    """What the receiver saw."""
    out, _ = server.communicate("stop\n" if ask else None)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def goodput(setting: Setting, kind: str, loss: float, size: int = SIZE) -> float:
    """The share of the link that `size` bytes took, from the first to the last."""
    with Wire(setting.conditions, setting.seed) as wire:
        server = serve(wire, setting, kind, size)
        wire.set(loss=loss)
        send(wire, setting, kind, size=size)
        (flow,) = report(server, ask=False)["flows"]
    (first, _), (last, total) = flow[0], flow[-1]
    if total < size:
        raise SystemExit(f"bench.link: {kind} carried {total} of {size} bytes")
    return float(total / (last - first) / setting.conditions.rate)


def bytes_at(flow: Flow, when: float) -> int:
    return max((total for at, total in flow if at <= when), default=0)


def shares(setting: Setting, first: str, second: str, window: float = WINDOW) -> tuple[float, float]:
    """What each of two flows got of the link while both were there."""
    with Wire(setting.conditions, setting.seed) as wire:
        kinds = list(dict.fromkeys((first, second)))
        servers = {kind: serve(wire, setting, kind) for kind in kinds}
        send(wire, setting, first)
        time.sleep(STAGGER)
        send(wire, setting, second)
        time.sleep(SETTLE)
        start = time.monotonic()
        time.sleep(window)
        stop = time.monotonic()
        found = {kind: report(server, ask=True)["flows"] for kind, server in servers.items()}
    flows = [found[first][0], found[second][1 if first == second else 0]]
    one, two = (
        (bytes_at(flow, stop) - bytes_at(flow, start)) / window / setting.conditions.rate for flow in flows
    )
    return one, two


def fairness(pair: tuple[float, float]) -> dict[str, float]:
    one, two = pair
    jain = (one + two) ** 2 / (2 * (one**2 + two**2))
    return {
        "ratio": round(max(pair) / max(min(pair), 1e-9), 2),
        "jain": round(jain, 3),
        "first": round(one, 3),
        "second": round(two, 3),
    }


def commands(setting: Setting) -> dict[str, float]:
    """Milliseconds that commands of 1 KiB need beside bulk without end on a link of 1 Mbit/s."""
    conditions = evolve(setting.conditions, rate=NARROW)
    with Wire(conditions, setting.seed) as wire:
        server = serve(wire, setting, "stp")
        send(wire, setting, "stp", command_every=0.37)
        time.sleep(COMMANDS_FOR)
        delays = sorted(report(server, ask=True)["commands"])
        there, _ = wire.counts()
    alone = COMMAND / conditions.rate + conditions.delay
    full = alone + conditions.queue * there.largest / conditions.rate
    return {
        "commands": len(delays),
        "p50_ms": round(delays[len(delays) // 2] * 1e3, 1),
        "worst_ms": round(delays[-1] * 1e3, 1),
        "alone_ms": round(alone * 1e3, 1),
        "behind_a_full_queue_ms": round(full * 1e3, 1),
        "queued_packets_at_most": there.longest,
    }


def median_pair(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """The run with the median ratio, whole."""
    ordered = sorted(pairs, key=lambda pair: max(pair) / max(min(pair), 1e-9))
    return fairness(ordered[len(ordered) // 2])


MEASURES: Final[dict[str, Callable[[Setting], Any]]] = {
    "clean": lambda setting: goodput(setting, "stp", 0.0),
    "loss": lambda setting: goodput(setting, "stp", LOSS),
    "flows": lambda setting: shares(setting, "stp", "stp"),
    "stp_first": lambda setting: shares(setting, "stp", "tcp"),
    "tcp_first": lambda setting: shares(setting, "tcp", "stp"),
    "tcp_alone": lambda setting: (
        goodput(setting, "tcp", 0.0),
        goodput(setting, "tcp", LOSS, SIZE // 8),
    ),
    "command": commands,
}


def measure(setting: Setting, names: list[str], rounds: int, *, loud: bool) -> dict[str, Any]:
    found: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            if name == "command" and turn:
                continue
            found[name].append(MEASURES[name](evolve(setting, seed=turn + 1)))
            if loud:
                print(f"round {turn + 1}: {name:10} {found[name][-1]}", file=sys.stderr, flush=True)
    results: dict[str, Any] = {}
    for name, values in found.items():
        if name == "command":
            results[name] = values[0]
        elif name == "tcp_alone":
            results[name] = {
                "clean": round(statistics.median(clean for clean, _ in values), 3),
                "loss": round(statistics.median(loss for _, loss in values), 3),
            }
        elif isinstance(values[0], tuple):
            results[name] = median_pair(values)
        else:
            results[name] = round(statistics.median(values), 3)
    return results


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.link", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(MEASURES), help="measurements, separated by commas")
    parser.add_argument("--rate", type=float, default=10.0, help="Mbit/s of IP packets, each way")
    parser.add_argument("--rtt", type=float, default=30.0, help="ms, half of it each way")
    parser.add_argument("--queue", type=int, default=25, help="packets")
    parser.add_argument("--congestion", default="", help="STP's controller (default: the endpoint's)")
    return parser


def main() -> int:
    given = arguments().parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(MEASURES):
        print(
            f"bench.link: no measurement {unknown.pop()!r}; there are {', '.join(MEASURES)}", file=sys.stderr
        )
        return 64
    conditions = Conditions(rate=given.rate * 125_000, delay=given.rtt / 2000, queue=given.queue)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_identities(directory)
        setting = Setting(conditions, directory, given.congestion)
        try:
            found = measure(setting, names, given.rounds, loud=not given.json)
        except WireError as exc:
            print(f"bench.link: {exc}", file=sys.stderr)
            return 1
    print(json.dumps({"bench": "link", "rounds": given.rounds, "conditions": asdict(conditions)} | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
