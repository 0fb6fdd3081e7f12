"""What is remembered of the networks that this machine has been in: keep-alive, carrier (protocol §8, §11).

(1) A network is known by a hash of its default gateways: no name, no address of it stands in the file.
(2) The file has mode 0600 and is replaced as a whole; at most MAX_NETWORKS are kept, those used last.
(3) It is advice. A file that is not there, not readable or damaged means that nothing is remembered, and one that
    cannot be written that nothing will be: both are counted, neither raises.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import trio
from attrs import asdict, define, evolve

from stp.core.keepalive import KeepaliveLearner
from stp.core.path import KEEPALIVE, KEEPALIVE_LEAST, KEEPALIVE_MOST
from stp.identity import write_atomically

MAX_NETWORKS: Final = 64
"""Networks in the file; the one unused for longest gives way."""
MAX_FILE: Final = 64 * 1024
"""Bytes; a longer file is not ours."""
CARRIERS: Final = frozenset({"", "udp", "tls"})
FORMAT: Final = 1

_PROC: Final = Path("/proc/net")
_RTF_GATEWAY: Final = 0x2  # linux/route.h
_NO_MAC: Final = "00:00:00:00:00:00"


@define
class Network:
    """What is known of one network. Treat as frozen: `evolve` it and `put` it back."""

    keepalive: float = KEEPALIVE
    """Seconds of silence that are known to do no harm."""
    too_long: float = 0.0
    """Seconds of silence after which a NAT had forgotten us; 0.0: never seen."""
    carrier: str = ""
    """The carrier that worked last: "udp", "tls", or "" when nothing is known."""
    used: int = 0
    """When this was put last, Unix seconds."""


class Networks:
    """The file, and what it holds. One per process and path; `put` may be called in a worker thread."""

    def __init__(self, path: str | Path | None = None, *, wall: Callable[[], float] = time.time) -> None:
        """`path` None: remembered for as long as this object lives. Blocking, as `put`."""
        self._path = Path(path) if path is not None else None
        self._wall = wall
        self._lock = threading.Lock()
        self.read_errors = 0
        """Times the file was there and could not be understood."""
        self.write_errors = 0
        self._known: dict[str, Network] = self._read()

    def get(self, key: str) -> Network:
        """What is known of the network `key`, the defaults if nothing is."""
        return self._known.get(key) or Network()

    def put(self, key: str, network: Network) -> None:
        """Remember this, and write the file, with what other processes wrote meanwhile. Blocking.

        Nothing happens for the key "", which is no network.
        """
        if not key:
            return
        with self._lock:
            self._put(key, network)

    def _put(self, key: str, network: Network) -> None:
        self._known = {**self._known, **self._read(), key: evolve(network, used=int(self._wall()))}
        while len(self._known) > MAX_NETWORKS:
            del self._known[min(self._known, key=lambda one: self._known[one].used)]
        if self._path is None:
            return
        shown = {key: asdict(one) for key, one in self._known.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            data = json.dumps({"format": FORMAT, "networks": shown}, indent=1)
            write_atomically(self._path, data.encode() + b"\n")
        except OSError:
            self.write_errors += 1

    def _read(self) -> dict[str, Network]:
        """What the file says, and nothing that is out of bounds (3)."""
        if self._path is None:
            return {}
        try:
            with open(self._path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except FileNotFoundError:
            return {}
        except OSError:
            self.read_errors += 1
            return {}
        try:
            return parse(data)
        except ValueError:
            self.read_errors += 1
            return {}


class Here:
    """What is learned in the network that this process is in. Ask `learner` before each dial."""

    def __init__(self, networks: Networks | None = None, *, find: Callable[[], str] | None = None) -> None:
        """`find` says which network that is, by default `here`."""
        self.networks = networks or Networks()
        self._find = find or here
        self._key = ""
        self._learner = KeepaliveLearner()
        self._carrier, self._changed = "", False

    def learner(self) -> KeepaliveLearner:
        """Of the network that we are in now; sessions dialled in one network share it."""
        key = self._find()
        if key != self._key or not key:
            known = self.networks.get(key)
            self._key, self._learner = key, KeepaliveLearner(known.keepalive, known.too_long)
            self._carrier, self._changed = known.carrier, False
        return self._learner

    def carrier(self) -> str:
        """The carrier that worked last in the network that we are in now; "" when nothing is known."""
        self.learner()
        return self._carrier

    def worked(self, carrier: str) -> None:
        """A session is up over it, in the network that we are in now."""
        self.learner()
        if carrier in CARRIERS and carrier != self._carrier:
            self._carrier, self._changed = carrier, True

    @property
    def changed(self) -> bool:
        """There is something to `save`."""
        return (self._learner.changed or self._changed) and bool(self._key)

    async def keep(self) -> None:
        """`save` if there is something to, in a worker thread. Call it every now and then."""
        if self.changed:
            await trio.to_thread.run_sync(self.save)

    def save(self) -> None:
        """Remember what was learned. Blocking; a worker thread may do it."""
        key, learner = self._key, self._learner
        learner.changed = self._changed = False
        known = self.networks.get(key)
        learned = evolve(known, keepalive=learner.interval, too_long=learner.too_long, carrier=self._carrier)
        self.networks.put(key, learned)


def parse(data: bytes) -> dict[str, Network]:
    """The file's bytes. Entries that are out of bounds are left out. Raises ValueError for what is no such file."""
    if len(data) > MAX_FILE:
        raise ValueError("too long")
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("too deep") from None
    entries = found.get("networks") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(entries, dict):
        raise ValueError("another format")  # noqa: TRY004 - as everything else that may be wrong with it
    read = {key: _entry(entry) for key, entry in list(entries.items())[:MAX_NETWORKS]}
    return {key: one for key, one in read.items() if one is not None}


def _entry(entry: Any) -> Network | None:
    if not isinstance(entry, dict):
        return None
    keepalive, too_long = entry.get("keepalive", KEEPALIVE), entry.get("too_long", 0.0)
    carrier, used = entry.get("carrier", ""), entry.get("used", 0)
    numbers = all(type(n) in (int, float) for n in (keepalive, too_long, used))
    if not numbers or not isinstance(carrier, str) or carrier not in CARRIERS:
        return None
    if not KEEPALIVE_LEAST <= keepalive <= KEEPALIVE_MOST or not 0 <= too_long < 1e9 or not 0 <= used < 1e12:
        return None
    return Network(float(keepalive), float(too_long), carrier, int(used))


def here(proc: Path = _PROC) -> str:
    """The key of the network that this machine is in now: 16 hexadecimal digits, "" without a default route.

    Gateways are told apart by their hardware address too: half the world's are 192.168.1.1. Blocking, but only for
    the kernel.
    """
    gateways = _gateways_v4(proc) or _gateways_v6(proc)
    if not gateways:
        return ""
    return sha256(b"stp/1 network" + "|".join(sorted(gateways)).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError):
        return []


def _gateways_v4(proc: Path) -> list[str]:
    macs = {row[0]: row[3] for row in _lines(proc / "arp") if len(row) >= 6 and row[3] != _NO_MAC}
    found = []
    for row in _lines(proc / "route")[1:]:
        if len(row) < 8 or int(row[1], 16) or int(row[7], 16):
            continue
        if int(row[3], 16) & _RTF_GATEWAY:
            address = ".".join(str(byte) for byte in reversed(bytes.fromhex(row[2])))
            found.append(f"{address} {macs.get(address, '')}")
        else:
            found.append(row[0])  # point to point: the device is all there is to know it by
    return found


def _gateways_v6(proc: Path) -> list[str]:
    rows = [row for row in _lines(proc / "ipv6_route") if len(row) >= 10]
    return [row[4] for row in rows if row[1] == "00" and row[9] != "lo" and int(row[4], 16)]
