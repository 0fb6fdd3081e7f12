"""Publisher → gateway → hub → durable subscriber: four processes, both stores on disk and synced.

    python -m bench.relay [--size 100|1024|16384] [--devices 1000 --batch 1] [--json]

Every message is checked for loss, doubling, order and content. The figures are medians of three runs, each with
new stores; with --json the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from attrs import asdict, define, evolve

from bench.ends import MIN_SIZE, Plan
from bench.fleet import Fleet, Node

SIZES: Final = (100, 1024, 16384)
SECONDS: Final = 8
"""How long a run should take about, from which the number of messages follows."""
GUESSES: Final = {100: 250_000, 1024: 50_000, 16384: 3_500}
"""Messages a second of these sizes, for that."""
GUESS_DEVICES: Final = 10_000
END_WITHIN: Final = 300.0
"""Seconds for a run, beyond which it counts as stuck."""
MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs"})
LIMITS: Final = """
[limits]
handshakes_per_second = 2000
handshakes_per_address = 2000
half_open = 4000
half_open_per_address = 4000
"""
"""A thousand devices behind one address is the bench's doing, not an attack."""


class BenchError(Exception):
    """A run could not be made. The text says what went wrong, for people."""


@define
class Options:
    size: int
    messages: int
    batch: int
    topics: int
    devices: int
    in_flight: int
    runs: int
    directory: Path
    rate: int = 0


@define
class Result:
    """One run. Rates from the first publish to the last message at the subscriber."""

    seconds: float
    msgs_per_s: float
    MB_per_s: float
    lost: int
    duplicated: int
    reordered: int
    corrupt: int
    gateway_cpu_s_per_M: float
    hub_cpu_s_per_M: float
    publisher_cpu_s_per_M: float
    subscriber_cpu_s_per_M: float
    gateway_rss_MB: float
    hub_rss_MB: float
    unexplained: int
    p50_ms: float | None = None
    p99_ms: float | None = None

    @property
    def bad(self) -> int:
        """Messages that did not arrive once, in order and undamaged."""
        return self.lost + self.duplicated + self.reordered + self.corrupt


class End:
    """A publisher or subscriber as a process."""

    def __init__(self, role: str, plan: Plan, log: IO[bytes]) -> None:
        self._role = role
        words = [sys.executable, "-m", "bench.ends", role, json.dumps(asdict(plan))]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self._log = log.name

    def ready(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "READY":
            raise BenchError(f"{self._role} did not start; see {self._log}:\n{tail(self._log)}")

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        try:
            out, _ = self._process.communicate(timeout=END_WITHIN)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self._role} is stuck; see {self._log}:\n{tail(self._log)}") from None
        if self._process.returncode or not out.strip():
            raise BenchError(f"{self._role} failed; see {self._log}:\n{tail(self._log)}")
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return found

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def tail(log: str) -> str:
    return "\n".join(Path(log).read_text(errors="replace").splitlines()[-20:])


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new directory on a disk, gone afterwards."""
    kind = file_system(parent)
    if kind in MEMORY_FILE_SYSTEMS:
        raise BenchError(
            f"{parent} is on {kind}: a store synced to memory proves nothing; give a --dir on a disk"
        )
    directory = Path(tempfile.mkdtemp(prefix="stp-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def file_system(path: Path) -> str:
    """The kind of file system that holds `path`, as /proc/mounts names it."""
    path, best, kind = path.resolve(), "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def run_once(options: Options) -> Result:
    """One run in a new fleet. Raises BenchError."""
    with scratch(options.directory) as directory, Fleet(directory) as fleet:
        hub = fleet.hub(extra='[store]\nbudget = "20GB"\n')
        gateway = fleet.gateway(upstream=hub, extra=LIMITS + '[store]\nbudget = "20GB"\n')
        hub.start()
        gateway.start()
        plan = Plan(
            url=hub.url,
            identity=str(fleet.device("reader", hub)),
            size=options.size,
            count=options.messages,
            batch=options.batch,
            topics=options.topics,
            devices=options.devices,
            in_flight=options.in_flight,
            rate=options.rate,
        )
        sender = evolve(plan, url=gateway.url, identity=str(fleet.device("sender", gateway)))
        role = "devices" if options.devices > 1 else "publish"
        with (directory / "ends.log").open("wb") as log:
            ends = [End("subscribe", plan, log), End(role, sender, log)]
            try:
                found = measure(plan, ends[0], ends[1], gateway, hub)
                if found.bad:
                    logs = [tail(log.name), gateway.tail(), hub.tail()]
                    print(*logs, sep="\n--\n", file=sys.stderr, flush=True)
                return found
            finally:
                for end in ends:
                    end.kill()


def measure(plan: Plan, subscriber: End, publisher: End, gateway: Node, hub: Node) -> Result:
    subscriber.ready()
    publisher.ready()
    before = gateway.cpu_seconds(), hub.cpu_seconds()
    subscriber.go()
    publisher.go()
    sent, seen = publisher.result(), subscriber.result()
    after = gateway.cpu_seconds(), hub.cpu_seconds()
    seconds = seen["last"] - sent["began"]
    count = plan.each * plan.devices
    return Result(
        seconds=seconds,
        msgs_per_s=count / seconds,
        MB_per_s=count * plan.size / seconds / 1e6,
        lost=seen["lost"],
        duplicated=seen["duplicated"],
        reordered=seen["reordered"],
        corrupt=seen["corrupt"],
        gateway_cpu_s_per_M=(after[0] - before[0]) / count * 1e6,
        hub_cpu_s_per_M=(after[1] - before[1]) / count * 1e6,
        publisher_cpu_s_per_M=sent["cpu"] / count * 1e6,
        subscriber_cpu_s_per_M=seen["cpu"] / count * 1e6,
        gateway_rss_MB=gateway.rss_bytes() / 1e6,
        hub_rss_MB=hub.rss_bytes() / 1e6,
        unexplained=unexplained(gateway) + unexplained(hub),
        p50_ms=seen["p50_ms"],
        p99_ms=seen["p99_ms"],
    )


def unexplained(node: Node) -> int:
    """What the node's ledger cannot account for, once the last receipts have settled; -1 if it does not say."""
    found = -1
    for _ in range(50):
        status, body = node.get("/metrics")
        lines = [line for line in body.splitlines() if "unexplained" in line and not line.startswith("#")]
        if status == 200 and lines:
            found = int(sum(float(line.rpartition(" ")[2]) for line in lines))
            if not found:
                return 0
        time.sleep(0.02)
    return found


def median(results: list[Result]) -> dict[str, Any]:
    """Medians of what is measured; of what must be nothing, the worst."""
    found: dict[str, Any] = {}
    worst = {"lost", "duplicated", "reordered", "corrupt", "unexplained"}
    for name in asdict(results[0]):
        values = [getattr(one, name) for one in results]
        if name in worst:
            found[name] = max(values)
        elif None not in values:
            middle = statistics.median(values)
            found[name] = round(middle) if middle >= 1000 else round(middle, 3)
    return found


def default_messages(size: int, devices: int) -> int:
    if devices > 1:
        return GUESS_DEVICES * SECONDS
    nearest = min(GUESSES, key=lambda known: abs(known - size))
    return GUESSES[nearest] * SECONDS


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.relay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=0, help="bytes of payload (default: 100, 1024 and 16384)")
    parser.add_argument(
        "--messages", type=int, default=0, help="messages in a run (default: about 8 s worth)"
    )
    parser.add_argument(
        "--batch", type=int, default=-1, help="messages handed to the library at once (0: singly)"
    )
    parser.add_argument("--topics", type=int, default=1, help="distinct topics of the publisher")
    parser.add_argument("--devices", type=int, default=1, help="devices with a session each, instead of one")
    parser.add_argument("--in-flight", type=int, default=16, help="unanswered batches of a device")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="where the stores go: on a disk (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def main() -> int:
    given = arguments().parse_args()
    sizes = [given.size] if given.size else list(SIZES)
    if min(sizes) < MIN_SIZE:
        print(f"bench.relay: a message needs {MIN_SIZE} bytes to be told from others", file=sys.stderr)
        return 64
    bad = False
    for size in sizes:
        batch = given.batch if given.batch >= 0 else 1 if given.devices > 1 else max(1, 65536 // (size + 32))
        options = Options(
            size=size,
            messages=given.messages or default_messages(size, given.devices),
            batch=max(batch, 1) if given.devices > 1 else batch,
            topics=given.topics,
            devices=given.devices,
            in_flight=given.in_flight,
            runs=given.runs,
            directory=given.dir,
        )
        results = []
        try:
            for number in range(options.runs):
                results.append(run_once(options))
                report(number, size, results[-1])
        except (BenchError, RuntimeError) as error:
            print(f"bench.relay: {error}", file=sys.stderr)
            return 1
        found = {"bench": "relay", "size": size, "batch": options.batch, "devices": options.devices}
        found |= {"messages": options.messages, "runs": options.runs} | median(results)
        bad = bad or any(found[name] for name in ("lost", "duplicated", "reordered", "corrupt"))
        if given.json:
            print(json.dumps(found), flush=True)
    return 1 if bad else 0


def report(number: int, size: int, one: Result) -> None:
    """A line for people, while it goes on."""
    print(
        f"run {number + 1}: {size} B  {one.msgs_per_s:,.0f} msg/s  {one.MB_per_s:.1f} MB/s"
        f"  lost {one.lost}  doubled {one.duplicated}  disordered {one.reordered}  damaged {one.corrupt}"
        f"  cpu/M: gateway {one.gateway_cpu_s_per_M:.2f} s, hub {one.hub_cpu_s_per_M:.2f} s",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
