"""Echo over unreliable datagrams: what a link does under load (protocol §10.5). Sans-IO.

    request   u8 1 | u32 seq | u64 time | u32 0 | u32 0 | filler
    reply     u8 2 | u32 seq | u64 time | u32 arrived | u32 unanswered | filler     as long as the request

`Responder` is the listener's side of one session, `Load` the asker's measurement.

(1) A reply is never longer than its request, and there is at most one: nobody can be made to amplify (R-10-44).
(2) What a session asks for above its allowance, or all sessions above theirs, is counted and not answered. Every
    reply tells how many requests arrived and how many of them were not answered, so that the asker knows which way
    its losses went.
(3) Any bytes are an echo request, an echo reply, or not ours: nothing in a datagram can raise (R-10-45).
(4) Memory is bounded: MAX_OUTSTANDING requests, MAX_SAMPLES round trips.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from attrs import define

ECHO_REQUEST: Final = 1
ECHO_REPLY: Final = 2
HEAD: Final = Struct("!BIQII")
MIN_SIZE: Final = HEAD.size
"""Bytes: 21."""
FIRST_APPLICATION_KIND: Final = 0x80
"""Datagrams whose first byte is this or more are the application's own."""

ECHO_RATE: Final = 2_500_000
"""Bytes a second that one session is answered: 20 Mbit/s."""
ECHO_TOTAL: Final = 4
"""All sessions of a listener together have so many times the allowance of one."""
ALLOWANCE_TIME: Final = 0.25
"""Seconds of an allowance that may be used at once."""

MAX_OUTSTANDING: Final = 65_536
"""Requests whose reply may still come; older ones are lost."""
MAX_SAMPLES: Final = 100_000
"""Round trips that are remembered; beyond it every second, then every fourth."""
CATCH_UP: Final = 64
"""Requests that may leave at once when the asker was late; more are not made up for."""

_MASK: Final = 0xFFFFFFFF


class Allowance:
    """Bytes a second, with ALLOWANCE_TIME of them at once."""

    __slots__ = ("_at", "_tokens", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._tokens = rate * ALLOWANCE_TIME
        self._at = 0.0

    def has(self, size: int, now: float) -> bool:
        """Whether `size` bytes are allowed now; `take` them then."""
        self._tokens = min(self.rate * ALLOWANCE_TIME, self._tokens + (now - self._at) * self.rate)
        self._at = now
        return self._tokens >= size

    def take(self, size: int) -> None:
        self._tokens -= size


class Responder:
    """Answers the echo requests of one session (1)."""

    __slots__ = ("_own", "_total", "arrived", "strange", "unanswered")

    def __init__(self, rate: float, total: Allowance) -> None:
        """`rate`: bytes a second of this session, 0 to answer none; `total`: what all sessions share."""
        self._own = Allowance(rate)
        self._total = total
        self.arrived = 0
        self.unanswered = 0
        self.strange = 0
        """Datagrams that are no echo request."""

    def answer(self, data: bytes, now: float) -> bytes | None:
        """The reply to what came, if it is to have one (2)."""
        if len(data) < MIN_SIZE or data[0] != ECHO_REQUEST:
            self.strange += 1
            return None
        self.arrived += 1
        size = len(data)
        if not (self._own.has(size, now) and self._total.has(size, now)):
            self.unanswered += 1
            return None
        self._own.take(size)
        self._total.take(size)
        _, seq, time, _, _ = HEAD.unpack_from(data)
        head = HEAD.pack(ECHO_REPLY, seq, time, self.arrived & _MASK, self.unanswered & _MASK)
        return head + data[MIN_SIZE:]


@define(kw_only=True)
class LoadReport:
    """What a load did to a link. Times are seconds, rates bytes a second of datagram content, one way."""

    seconds: float
    size: int
    wanted_rate: float
    sent: int
    held_back: int
    """Requests that were due and not sent: congestion control let no more of them leave."""
    answered: int
    answered_in: float
    """Seconds to the last reply, or `seconds` where that was later."""
    unanswered: int
    """Requests that arrived and were not answered: above the listener's allowance, or it was busy."""
    lost_up: int
    lost_down: int
    reordered: int
    """Replies that a later one overtook."""
    rtt_min: float
    rtt_p50: float
    rtt_p95: float
    rtt_p99: float
    rtt_max: float
    jitter: float
    """Mean difference between the round trips of two replies in a row."""

    @property
    def lost(self) -> float:
        """Share of all requests, 0 to 1, that the link lost on either way."""
        return (self.lost_up + self.lost_down) / self.sent if self.sent else 0.0

    @property
    def goodput(self) -> float:
        return self.answered * self.size / self.answered_in if self.answered_in else 0.0


class Load:
    """A stream of requests at a rate, and what came back. The owner calls, again and again:

    load.next_at                      when the next request is due
    while (data := load.request(now)) is not None: load.on_sent(session.send_datagram(data))
    load.on_datagram(data, now)       for everything that came
    """

    def __init__(self, rate: float, size: int, now: float) -> None:
        """`rate`: bytes a second; `size`: bytes of each, at least MIN_SIZE."""
        self.size = max(size, MIN_SIZE)
        self.rate = rate
        self.next_at = now
        self.began = now
        self._interval = self.size / rate
        self._filler = bytes(self.size - MIN_SIZE)
        self._seq = 0
        self._outstanding: dict[int, float] = {}
        self._last: tuple[int, float] = (-1, 0.0)
        self._last_at = now
        self._samples: list[float] = []
        self._stride = 1
        self._jitter_sum = 0.0
        self.sent = self.held_back = self.answered = self.reordered = 0
        self._arrived = self._unanswered = 0

    def request(self, now: float) -> bytes | None:
        """The next request, if one is due. Tell `on_sent` what became of it."""
        if self.next_at > now:
            return None
        late = int((now - self.next_at) / self._interval) - CATCH_UP
        if late > 0:  # this process did not get its turn: nothing is made up for
            self.next_at += late * self._interval
        self.next_at += self._interval
        self._outstanding[self._seq] = now
        return HEAD.pack(ECHO_REQUEST, self._seq, int(now * 1e6), 0, 0) + self._filler

    def on_sent(self, taken: bool) -> None:
        """Whether the session took the request."""
        if not taken:
            del self._outstanding[self._seq]
            self.held_back += 1
            return
        self.sent += 1
        self._seq = (self._seq + 1) & _MASK
        if len(self._outstanding) > MAX_OUTSTANDING:
            del self._outstanding[next(iter(self._outstanding))]

    def on_datagram(self, data: bytes, now: float) -> bool:
        """Whether it was a reply to one of our requests; a second one to the same is not."""
        if len(data) < MIN_SIZE or data[0] != ECHO_REPLY:
            return False
        _, seq, _, arrived, unanswered = HEAD.unpack_from(data)
        left_at = self._outstanding.pop(seq, None)
        if left_at is None:
            return False
        rtt = now - left_at
        self.answered += 1
        if seq < self._last[0]:
            self.reordered += 1
        elif self._last[0] >= 0:
            self._jitter_sum += abs(rtt - self._last[1])
        self._last = (max(seq, self._last[0]), rtt)
        self._last_at = now
        self._arrived = max(self._arrived, arrived)
        self._unanswered = max(self._unanswered, unanswered)
        if self.answered % self._stride == 0:
            self._samples.append(rtt)
            if len(self._samples) >= MAX_SAMPLES:
                self._samples = self._samples[::2]
                self._stride *= 2
        return True

    def report(self, seconds: float) -> LoadReport:
        """What is known after `seconds` of sending and a while of waiting for the last replies."""
        arrived = min(max(self._arrived, self.answered), self.sent)
        unanswered = min(self._unanswered, arrived - self.answered)
        samples = sorted(self._samples) or [0.0]

        def share(part: float) -> float:
            return samples[min(len(samples) - 1, int(part * len(samples)))]

        return LoadReport(
            seconds=seconds,
            size=self.size,
            wanted_rate=self.rate,
            sent=self.sent,
            held_back=self.held_back,
            answered=self.answered,
            answered_in=max(seconds, self._last_at - self.began),
            unanswered=unanswered,
            lost_up=self.sent - arrived,
            lost_down=arrived - self.answered - unanswered,
            reordered=self.reordered,
            rtt_min=samples[0],
            rtt_p50=share(0.5),
            rtt_p95=share(0.95),
            rtt_p99=share(0.99),
            rtt_max=samples[-1],
            jitter=self._jitter_sum / max(1, self.answered - self.reordered - 1),
        )
