"""How large the packets of one path may be: datagram packetization layer path MTU discovery (RFC 8899; R-6-7).

A sizer belongs to one path and one direction. Whoever sends asks it for `datagram` and sends the probes it wants;
recovery tells it what became of packets. Sizes are bytes of UDP payload, times seconds. On the lowest floor.

(1) A size is used only after a probe of that size was acknowledged, or where the owner of the socket knows the path.
(2) One probe is under way at a time, MAX_PROBES are lost at a size before it counts as too large, and nothing is
    probed while no full packets leave: an idle session has no timer for it.
(3) No packet is larger than what the owner and the peer both allow, whatever is acknowledged.
(4) Where full packets vanish and smaller ones arrive, the size falls a step: BASE_DATAGRAM, MIN_DATAGRAM, `blocked`.

The states of RFC 8899 §5.2 are told by the numbers: Base and Searching while `due_at` is near, Search Complete while
it is RAISE_TIME away, Error while `datagram` lies below BASE_DATAGRAM.
"""

from __future__ import annotations

from typing import Final

BASE_DATAGRAM: Final = 1200
"""Bytes with which a path begins (BASE_PLPMTU)."""
MIN_DATAGRAM: Final = 1024
"""The least that is worth a path (MIN_PLPMTU)."""
MAX_DATAGRAM: Final = 32_000
"""The most that anybody should ask for: of larger ones no two fit into a burst."""
LIKELY: Final = (1472, 1452, 1432, 1392, 1232, BASE_DATAGRAM)
"""What paths often carry: Ethernet over IPv4 and over IPv6, with PPPoE, in a tunnel, the least of IPv6, the base."""
GRAIN: Final = 20
"""Sizes that lie closer together than this are not worth another probe."""
MAX_PROBES: Final = 3  # RFC 8899 §5.1.2
PROBE_PAUSE: Final = 0.1
"""Seconds at least from a lost probe to the next one, times the probes lost of that size."""
RAISE_TIME: Final = 600.0
"""Seconds after which a search that ended below the most is begun anew (PMTU_RAISE_TIMER)."""
AGAIN_TIME: Final = 1.0
"""Seconds from a fall to the next search, twice as many after every further one, up to RAISE_TIME: an outage looks
like a fall, and is over."""
BLACK_HOLE_PACKETS: Final = 5
"""Full packets lost, and none arrived, before a path is suspected."""
STRIKES: Final = 3
"""How often in a row, and none arrived in between, before a path is given up: outages that follow one another."""
TINY: Final = 128
"""Bytes of the packets that ask whether anything at all arrives."""

_RESCUE: Final = (BASE_DATAGRAM, BASE_DATAGRAM, MIN_DATAGRAM, MIN_DATAGRAM, TINY)
_NEVER: Final = float("inf")


class Sizer:
    """Made with its path."""

    __slots__ = (
        "_lost_probes",
        "_passed_at",
        "_probed_at",
        "_since",
        "_strikes",
        "_top",
        "above",
        "black_holes",
        "blocked",
        "datagram",
        "due_at",
        "missing",
        "missing_base",
        "most",
        "probe",
        "probes",
    )

    def __init__(self, start: int = BASE_DATAGRAM, most: int = BASE_DATAGRAM, now: float = 0.0) -> None:
        self.datagram = start
        """Bytes that full packets have."""
        self.most = max(start, most)
        """Up to which size this path is probed."""
        self.due_at = _NEVER
        """When the next full packets are to take a probe along."""
        self.probe = -1
        """The number of the packet that is the probe under way; -1: there is none."""
        self.probes = 0
        """Probes sent."""
        self.black_holes = 0
        """How often the size fell."""
        self.blocked = False
        """Not even MIN_DATAGRAM passes: only another path or carrier helps."""
        self.above = 0
        """Packets above so many bytes tell whether the size still passes; all smaller ones whether the path lives."""
        self._top = self.most + 1
        """The least size that is known not to pass."""
        self._lost_probes = 0
        self._probed_at = 0.0
        self.missing = 0
        """Packets above `above` that were lost since one of them arrived."""
        self.missing_base = 0
        """Packets of the base size that were lost meanwhile."""
        self._strikes = 0  # how often that was enough for a fall since one of them arrived
        self._since = 0.0  # when the first of them left
        self._passed_at = now  # what left before is of no interest: it belongs to another path or size
        self._settle(start)

    def bound(self, limit: int) -> None:
        """The peer receives at most `limit` bytes (3)."""
        self.most = min(self.most, limit)
        self._top = self.most + 1
        self._settle(min(self.datagram, limit))

    def begin(self, now: float) -> None:
        """The peer is proved to be there: the search may start."""
        if self.datagram < self.most:
            self.due_at = now

    def _settle(self, size: int) -> None:
        """`size` passes, as far as we know."""
        self.datagram = size
        self.above = next(step for step in (BASE_DATAGRAM, MIN_DATAGRAM, TINY) if size > step)
        self.missing = self.missing_base = self._strikes = 0

    # -- probes

    def next_probe(self) -> int:
        """At `due_at`: the size to be probed; 0 if there is none, and `due_at` is later then."""
        if self.probe >= 0:
            self.due_at = _NEVER  # until it is told of that one
            return 0
        size = self._candidate()
        if not size and self._top <= self.most:  # a search that ended long ago
            self._top = self.most + 1
            size = self._candidate()
        if not size:
            self.due_at = _NEVER
        return size

    def _candidate(self) -> int:
        low, top = self.datagram, self._top
        if low >= self.most or top - low <= 1:
            return 0
        if top > self.most:
            return self.most
        for size in LIKELY:
            if low < size < top:
                return size
        return (low + top) // 2 if top - low > GRAIN else 0

    def on_probe_sent(self, pn: int, now: float) -> None:
        """What `next_probe` asked for left as packet `pn`; `on_acked` or `on_lost` follows, with its size."""
        self.probe = pn
        self.probes += 1
        self._probed_at = now
        self.due_at = _NEVER

    def on_acked(self, token: object) -> None:
        """A probe arrived: `token` is its size (1)."""
        self.probe = -1
        if isinstance(token, int) and self.datagram < token <= self.most:
            self._lost_probes = 0
            if self._top <= token:
                self._top = self.most + 1
            self._settle(token)
            self._passed_at = max(self._passed_at, self._probed_at)
            self.blocked = False
        self._plan(0.0)

    def on_lost(self, token: object) -> None:
        """A probe was lost; that is no sign of congestion (RFC 8899 §3, rule 6)."""
        self.probe = -1
        if isinstance(token, int):
            self._lost_probes += 1
            if self._lost_probes >= MAX_PROBES:
                self._rule_out(token)
        self._plan(PROBE_PAUSE * max(1, self._lost_probes))

    def _rule_out(self, size: int) -> None:
        self._lost_probes = 0
        if size > self.datagram:
            self._top = min(self._top, size)

    def _plan(self, pause: float) -> None:
        """When to probe next, counted from the last probe."""
        if self._candidate():
            self.due_at = self._probed_at + pause
        else:
            self.due_at = self._probed_at + RAISE_TIME if self.datagram < self.most else _NEVER

    # -- black holes

    def on_passed(self, sent_at: float) -> None:
        """A packet of more than `above` bytes, sent then, arrived."""
        if sent_at >= self._since:
            self.missing = self.missing_base = self._strikes = 0
        self._passed_at = max(self._passed_at, sent_at)

    def on_missing(self, count: int, sent_at: float) -> None:
        """`count` packets of more than `above` bytes, sent then, are lost. Probes are none of these."""
        if not count or sent_at <= self._passed_at:
            return  # a later one arrived: the size is not to blame
        if not self.missing:
            self._since = sent_at
        self.missing += count

    def judge(self, arrived: float, rtt: float, now: float) -> None:
        """Something of at most `above` bytes, sent at `arrived`, came through: fall if nothing larger does (4).

        For a whole round trip, that is: an overflowing queue swallows dozens of packets in a row, too.
        """
        if self.missing < BLACK_HOLE_PACKETS or arrived < self._since + rtt:
            return
        self._strikes += 1
        if self.above == TINY and self._strikes < STRIKES:
            self.missing = self.missing_base = 0
            self._passed_at = now
            return
        self._fall(now)

    def on_too_large(self, size: int, now: float) -> None:
        """The kernel refused a datagram of `size` bytes: the first hop's own word, which needs no repetition."""
        if size > self.datagram:
            self._rule_out(size)
        elif size > self.above:
            self._fall(now)
            self._top = min(self._top, size)

    def _fall(self, now: float) -> None:
        self.black_holes += 1
        if self.above == TINY:
            self.blocked = True
        if self.above == BASE_DATAGRAM and self.missing_base >= MAX_PROBES:
            self.above = MIN_DATAGRAM  # that one does not pass either
        self._settle(max(self.above, MIN_DATAGRAM))
        self._passed_at = now
        self._top = self.most + 1
        self._lost_probes = 0
        self.due_at = now + min(AGAIN_TIME * 2 ** min(self.black_holes - 1, 16), RAISE_TIME)

    def rescue_size(self, probes: int) -> int:
        """Bytes that a probe of RFC 9002 §6.2.4 may have when `probes` timeouts came in a row: it is to arrive, and
        should what it repeats have been too large, at last in pieces that pass."""
        start = (self.datagram <= BASE_DATAGRAM) + 2 * (self.datagram <= MIN_DATAGRAM)
        return min(self.datagram, _RESCUE[min(max(start + probes - 1, 0), len(_RESCUE) - 1)])
