"""A small deterministic fuzzer: mutated seeds and random bytes into one parser at a time.

(1) The same target, seed and number of inputs give the same inputs, on every machine.
(2) An input is a finding if the target raises anything but the errors it promises, or takes over MAX_SECONDS.
(3) A finding is cut down before it is kept, and what is kept is replayed by the suite for ever.
"""

from __future__ import annotations

import hashlib
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from attrs import Factory, define

CORPUS: Final = Path(__file__).resolve().parent / "corpus"

MAX_SECONDS: Final = 5.0
"""One input may take this long. Generous: the machine may be busy with other things."""
MAX_INPUT: Final = 70_000
"""Bytes of one input."""
CUT_TRIES: Final = 400
"""Attempts to make a finding smaller."""

BOUNDARIES: Final = (
    0,
    1,
    2,
    3,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
WIDTHS: Final = (1, 2, 4, 8)


@define(kw_only=True)
class Target:
    """One door for untrusted bytes."""

    name: str
    feed: Callable[[bytes], object]
    """Parse one input. May raise `promised`, and nothing else."""
    seeds: Sequence[bytes]
    """Valid inputs, from which most of the others are made."""
    promised: tuple[type[Exception], ...]
    words: Sequence[bytes] = ()
    """Pieces worth inserting: keywords, separators."""
    repair: Callable[[bytes], bytes] | None = None
    """Makes sizes and checksums right again, so that what lies behind is reached. Used 2 times in 3."""


@define
class Finding:
    target: str
    data: bytes
    report: str

    @property
    def path(self) -> Path:
        return CORPUS / self.target / hashlib.sha256(self.data).hexdigest()[:12]

    def keep(self) -> Path:
        """Write the input into the corpus; returns where."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(self.data)
        return self.path


@define
class Outcome:
    """What a run came to."""

    inputs: int = 0
    refused: int = 0
    """Inputs that ended in a promised error; the others were accepted."""
    findings: list[Finding] = Factory(list)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    width = rng.choice(WIDTHS)
    if len(data) >= width:
        at = rng.randrange(len(data) - width + 1)
        value = rng.choice(BOUNDARIES) + rng.choice((-1, 0, 0, 1))
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "big")


def _nudge(rng: random.Random, data: bytearray) -> None:
    width = rng.choice(WIDTHS)
    if len(data) >= width:
        at = rng.randrange(len(data) - width + 1)
        value = int.from_bytes(data[at : at + width], "big") + rng.randint(-9, 9)
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "big")


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))


def _delete(rng: random.Random, data: bytearray) -> None:
    if data:
        at = rng.randrange(len(data))
        del data[at : at + rng.choice((1, 2, 4, 8, 64))]


def _repeat(rng: random.Random, data: bytearray) -> None:
    if data:
        at = rng.randrange(len(data))
        chunk = data[at : at + rng.choice((1, 4, 16, 256))]
        data[at:at] = chunk * rng.choice((1, 2, 50))


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randint(0, len(data)) :]


def _exchange(rng: random.Random, data: bytearray) -> None:
    """Swap two neighbouring pieces."""
    if len(data) > 2:
        a, b, c = sorted(rng.randint(0, len(data)) for _ in range(3))
        data[a:c] = data[b:c] + data[a:b]


MUTATIONS: Final = (_overwrite, _overwrite, _nudge, _flip, _insert, _delete, _repeat, _truncate, _exchange)


def make_input(rng: random.Random, target: Target) -> bytes:
    """One input: now and then random bytes or a seed as it is, mostly a seed with a few mutations."""
    dice = rng.random()
    if dice < 0.03 or not target.seeds:
        return rng.randbytes(rng.choice((0, 1, 7, 20, 64, 1200, 1500)))
    data = bytearray(rng.choice(target.seeds))
    if dice < 0.05:
        return bytes(data)
    if dice < 0.15:
        other = rng.choice(target.seeds)
        data = data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if target.words and rng.random() < 0.4:
            at = rng.randint(0, len(data))
            data[at : at + rng.choice((0, 0, 1, 8))] = rng.choice(target.words)
        else:
            rng.choice(MUTATIONS)(rng, data)
    made = bytes(data[:MAX_INPUT])
    return target.repair(made) if target.repair is not None and rng.random() < 0.67 else made


def try_one(target: Target, data: bytes) -> tuple[bool, str]:
    """Feed one input. Returns whether a promised error ended it, and a report of any other end, or ""."""
    began = time.perf_counter()
    refused = False
    try:
        target.feed(data)
    except (*target.promised, Warning):  # the suite turns warnings of the libraries into errors
        refused = True
    except Exception:
        return False, traceback.format_exc()
    took = time.perf_counter() - began
    return refused, f"took {took:.1f} s" if took > MAX_SECONDS else ""


def cut_down(target: Target, data: bytes) -> bytes:
    """A smaller input with a finding of the same kind: pieces are left out as long as it stays one."""
    kind = try_one(target, data)[1].strip().rsplit("\n", 1)[-1].split(":")[0]
    size, tries = len(data) // 2, 0
    while size and tries < CUT_TRIES:
        at = 0
        while at < len(data) and tries < CUT_TRIES:
            tries += 1
            shorter = data[:at] + data[at + size :]
            if try_one(target, shorter)[1].strip().rsplit("\n", 1)[-1].split(":")[0] == kind:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """Endless inputs, the same for the same seed, promise (1)."""
    rng = random.Random(f"{target.name}/{seed}")
    yield from target.seeds
    while True:
        yield make_input(rng, target)


def run(target: Target, *, seed: int, seconds: float, count: int | None = None, findings: int = 5) -> Outcome:
    """Feed inputs until `seconds` are over, `count` were fed, or so many different findings were made."""
    outcome = Outcome()
    end = time.perf_counter() + seconds
    known: set[str] = set()
    for data in inputs(target, seed):
        if time.perf_counter() > end or outcome.inputs == count or len(outcome.findings) == findings:
            break
        refused, report = try_one(target, data)
        outcome.inputs += 1
        outcome.refused += refused
        place = "".join(report.strip().splitlines()[-3:-1])
        if report and place not in known:
            known.add(place)
            small = cut_down(target, data)
            outcome.findings.append(Finding(target.name, small, try_one(target, small)[1] or report))
    return outcome
