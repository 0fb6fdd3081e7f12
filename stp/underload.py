"""`stp ping --load`: a load of echoes with ordinary pings beside it, as fields and as lines for people."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Final

import trio

from stp.core.errors import StpError, UsageError
from stp.echo import LoadReport
from stp.lines import Unreachable

if TYPE_CHECKING:
    from stp.client import Client

PINGS_BEFORE: Final = 5
"""Pings of the idle link that the load is compared with."""
PING_PAUSE: Final = 0.2
"""Seconds between pings."""

RATE: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(k|M|G)?bit(?:/s)?")
DURATION: Final = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)\s*(s|m|h)?")
PREFIXES: Final = {None: 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
UNITS: Final = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def read_rate(text: str) -> float:
    """Bytes a second from "1Mbit", "500kbit" or "2.5 Mbit/s". Raises UsageError."""
    found = RATE.fullmatch(text)
    if found is None or not float(found[1]):
        raise UsageError(f"--load {text!r} is not a rate such as 500kbit or 1Mbit")
    return float(found[1]) * PREFIXES[found[2]] / 8


def read_seconds(text: str) -> float:
    """Seconds from "10s", "1m" or "10". Raises UsageError."""
    found = DURATION.fullmatch(text)
    if found is None or not float(found[1]):
        raise UsageError(f"--for {text!r} is not a time such as 10s or 1m")
    return float(found[1]) * UNITS[found[2]]


async def measure(client: Client, rate: float, size: int, seconds: float, timeout: float) -> dict[str, Any]:
    """Load the link, and say what it did. Raises UsageError, Unreachable."""
    node = client.peer.node if client.peer is not None else "?"
    before = [await _ping(client, timeout) for _ in range(PINGS_BEFORE)]
    beside: list[float] = []

    async def ping_beside() -> None:
        with contextlib.suppress(Unreachable):  # then there is no figure for it
            while True:
                beside.append(await _ping(client, timeout))

    report: LoadReport | None = None
    failure: StpError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ping_beside)
        try:
            report = await client.load(rate, size=size, seconds=seconds)
        except StpError as error:  # raised as it is, not as a member of the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if report is None:
        assert failure is not None
        raise failure
    return _fields(node, report, before, beside)


def _fields(node: str, report: LoadReport, before: list[float], beside: list[float]) -> dict[str, Any]:
    return {
        "node": node,
        "seconds": report.seconds,
        "size": report.size,
        "load_bit_s": round(report.wanted_rate * 8),
        "goodput_bit_s": round(report.goodput * 8),
        "sent": report.sent,
        "answered": report.answered,
        "loss_percent": round(100 * report.lost, 3),
        "lost_up": report.lost_up,
        "lost_down": report.lost_down,
        "reordered": report.reordered,
        "held_back": report.held_back,
        "unanswered": report.unanswered,
        "rtt_ms": {
            "min": _ms(report.rtt_min),
            "p50": _ms(report.rtt_p50),
            "p95": _ms(report.rtt_p95),
            "p99": _ms(report.rtt_p99),
            "max": _ms(report.rtt_max),
        },
        "jitter_ms": _ms(report.jitter),
        "ping_ms": {"idle": _ms(_middle(before)), "loaded": _ms(_middle(beside))},
    }


async def _ping(client: Client, timeout: float) -> float:
    await trio.sleep(PING_PAUSE)
    return (await client.ping(timeout=timeout)).round_trip


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def describe(found: dict[str, Any]) -> list[str]:
    """The fields of `measure` in words."""
    rtt, ping = found["rtt_ms"], found["ping_ms"]
    lines = [
        f"{found['node']}: {_bits(found['load_bit_s'])} of {found['size']}-byte datagrams, echoed, for"
        f" {found['seconds']:g} s",
        f"rtt      p50 {rtt['p50']:.2f} ms   p95 {rtt['p95']:.2f} ms   p99 {rtt['p99']:.2f} ms"
        f"   jitter {found['jitter_ms']:.2f} ms",
        f"lost     {found['loss_percent']:.2f} % of {found['sent']:,}: {found['lost_up']} on the way up,"
        f" {found['lost_down']} on the way down; {found['reordered']} out of order",
        f"goodput  {_bits(found['goodput_bit_s'])} each way",
        f"ping     {ping['idle']:.2f} ms before, {ping['loaded']:.2f} ms under load",
    ]
    share = 100 * found["held_back"] / max(1, found["held_back"] + found["sent"])
    if share >= 1:
        lines.append(
            f"note     {share:.0f} % were not sent: congestion control finds the link too slow for them"
        )
    if found["unanswered"]:
        lines.append(
            f"note     {found['unanswered']:,} arrived and were not answered: the keeper echoes no more"
            " (limits.echo_bytes_per_second), or was busy"
        )
    return lines


def _bits(rate: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.0f} bit/s"
