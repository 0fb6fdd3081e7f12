"""The receiving half of a link: lanes opened by the peer, records, places, credit (protocol §7, §10).

The promises are numbered at the head of `stp.link`; this file keeps (2), (4) to (8). Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from stp.control import Receipt, Refused
from stp.core.errors import CorruptError, ErrorCode, LimitError, MessageError, ProtocolError, UsageError
from stp.lanes import LANES, OPENING_BYTES, Incoming, Refusals, Unsettled
from stp.link_events import (
    LinkEvent,
    LinkStatistics,
    RecordReceived,
    RecordRejected,
    SourceIntroduced,
)
from stp.records import RecordCutter, RecordHead, RefusedCode, check_batches, read_record
from stp.sources import Sources

if TYPE_CHECKING:
    from stp.core.verbs import AnySession

CREDIT_FLOOR: Final = 512 * 1024
"""Bytes: no lane window is smaller. A peer with less than this unsettled can finish its record."""
MAX_REFUSALS: Final = 8_192
"""(lane, source) pairs whose order after a refusal is kept, else LIMIT."""
MAX_REJECT_REASON: Final = 128
"""Characters of the reason that a refusal by the link itself carries."""

KIND_LANE: Final = 1
"""First byte of a stream that is a lane (protocol §10)."""


class Receiver:
    """What the peer sends on its lanes. Knows nothing of stream 0 but how to put a REFUSED there."""

    __slots__ = (
        "_by_stream",
        "_check_batches",
        "_ignored",
        "_introduce_timeout",
        "_lanes",
        "_openings",
        "_record_timeout",
        "_refusals",
        "_send_refused",
        "_session",
        "_stats",
        "failure",
        "sources",
    )

    def __init__(
        self,
        session: AnySession,
        sources: Sources,
        stats: LinkStatistics,
        send_refused: Callable[[Refused], None],
        *,
        record_timeout: float,
        introduce_timeout: float,
        check_batches: bool,
    ) -> None:
        self._session = session
        self.sources = sources
        self._stats = stats
        self._send_refused = send_refused
        self._record_timeout = record_timeout
        self._introduce_timeout = introduce_timeout
        self._check_batches = check_batches
        self._lanes: dict[int, Incoming] = {}
        self._by_stream: dict[int, Incoming] = {}
        self._openings: dict[int, bytes] = {}
        self._ignored: set[int] = set()
        self._refusals = Refusals()
        self.failure: LimitError | None = None
        """A limit that was passed while the owner called; the link closes with it."""

    # -- streams -----------------------------------------------------------------------------------------

    def read(self, stream: int, now: float, out: list[LinkEvent]) -> None:
        """Take the stream's bytes. Raises ProtocolError or LimitError where the peer broke a rule."""
        incoming = self._by_stream.get(stream)
        if incoming is not None:
            self._read_lane(incoming, self._session.read(stream), now, out)
        elif stream not in self._ignored:
            self._read_opening(stream, now, out)

    def is_lane(self, stream: int) -> bool:
        return stream in self._by_stream

    def forget(self, stream: int) -> None:
        """A stream that is no lane came to its end."""
        self._openings.pop(stream, None)
        self._ignored.discard(stream)

    def _read_opening(self, stream: int, now: float, out: list[LinkEvent]) -> None:
        """The first bytes of a stream say what it is (§10, streams, R-10-4)."""
        data = self._openings.pop(stream, b"") + self._session.read(stream)
        if not data:
            return
        if data[0] != KIND_LANE:
            if not self._session.ended(stream):
                self._session.stop_stream(stream, ErrorCode.NO_ERROR)
                self._ignored.add(stream)
            self._stats.streams_ignored += 1
            return
        if len(data) < OPENING_BYTES:
            self._openings[stream] = data
            return
        lane = data[1]
        if stream & 2 == 0:
            raise ProtocolError(f"lane {lane} on the bidirectional stream {stream}")
        if lane not in LANES:
            raise ProtocolError(f"there is no lane {lane}")
        if lane in self._lanes:
            raise ProtocolError(f"lane {lane} was opened twice")
        incoming = Incoming(lane, stream, RecordCutter())
        self._lanes[lane] = self._by_stream[stream] = incoming
        self._read_lane(incoming, data[OPENING_BYTES:], now, out)

    def _read_lane(self, incoming: Incoming, data: bytes, now: float, out: list[LinkEvent]) -> None:
        records = incoming.cutter.feed(data)
        if records:
            incoming.record_since = None
            incoming.cut += sum(map(len, records))
            if incoming.held:
                incoming.held.extend(records)
            else:
                self._take_records(incoming, records, now, out)
        if incoming.cutter.incomplete:
            incoming.dirty = True
            if incoming.record_since is None:
                incoming.record_since = now

    # -- records -----------------------------------------------------------------------------------------

    def _take_records(
        self, incoming: Incoming, records: list[bytes], now: float, out: list[LinkEvent]
    ) -> None:
        for at, record in enumerate(records):
            if not self._take_record(incoming, record, out, wait=True):
                incoming.held.extend(records[at:])
                incoming.held_since = now
                return

    def _take_record(self, incoming: Incoming, record: bytes, out: list[LinkEvent], *, wait: bool) -> bool:
        """Hand a record to the owner, or refuse it; False when it must wait for INTRODUCE (if `wait`)."""
        lane = incoming.lane
        try:
            head = read_record(record)
            if head.lane != lane:
                raise CorruptError(f"a record of lane {head.lane} on lane {lane}")
        except MessageError as error:
            self._reject(incoming, record, None, RefusedCode.CORRUPT, str(error), out)
            return True
        source = head.source
        if source not in self.sources.allowed:
            allowed = self.sources.may_send(source)
            if allowed is None and wait:
                return False
            if not allowed:
                self._reject_source(incoming, record, head, out, unknown=allowed is None)
                return True
        if self._refusals:
            code = self._refusals.in_the_way(lane, source, head.number)
            if code is not None:
                self._remember(lane, head, code)
                self._reject(incoming, record, head, code, "an earlier record was refused", out)
                return True
        if self._check_batches:
            try:
                check_batches(record, head)
            except MessageError as error:
                # The record's own CRC is right: its publisher made it so, and its number can be trusted.
                self._remember(lane, head, RefusedCode.CORRUPT)
                self._reject(incoming, record, head, RefusedCode.CORRUPT, str(error), out)
                return True
        place = incoming.place
        incoming.place = place + 1
        incoming.open[place] = Unsettled(len(record), head)
        if self._refusals:
            self._refusals.came(lane, source, head.number, head.to)
        self._stats.records_received += 1
        out.append(RecordReceived(lane, place, record, head))
        return True

    def _reject_source(
        self, incoming: Incoming, record: bytes, head: RecordHead, out: list[LinkEvent], *, unknown: bool
    ) -> None:
        if unknown:  # it may be introduced yet; order must have survived until then
            self._remember(incoming.lane, head, RefusedCode.SOURCE)
        reason = "the source was never introduced" if unknown else "the source is another node's"
        self._reject(incoming, record, head, RefusedCode.SOURCE, reason, out)

    def _reject(
        self,
        incoming: Incoming,
        record: bytes,
        head: RecordHead | None,
        code: RefusedCode,
        reason: str,
        out: list[LinkEvent],
    ) -> None:
        """R-10-23."""
        place = incoming.refused_unseen(len(record))
        self._stats.rejected += 1
        self._send_refused(Refused(incoming.lane, place, int(code), 0, reason[:MAX_REJECT_REASON]))
        out.append(RecordRejected(incoming.lane, place, head, code, 0 if head is None else head.messages))

    def _remember(self, lane: int, head: RecordHead, code: RefusedCode) -> None:
        self._refusals.refused(lane, head.source, head.number, head.to, code)
        if len(self._refusals) > MAX_REFUSALS:
            self.failure = LimitError(f"more than {MAX_REFUSALS} sources refused at once")

    # -- sources -----------------------------------------------------------------------------------------

    def introduce(self, names: dict[bytes, str], now: float, out: list[LinkEvent]) -> None:
        """INTRODUCE came: say whose sources are new, and go on with what waited for it."""
        for source, node in names.items():
            if self.sources.introduce(source, node):
                out.append(SourceIntroduced(source, node))
        for incoming in self._lanes.values():
            if incoming.held:
                self._resume(incoming, now, out, wait=True)

    def _resume(self, incoming: Incoming, now: float, out: list[LinkEvent], *, wait: bool) -> None:
        """Go on with held records; `wait` False: the first has waited long enough."""
        held = incoming.held
        while held and self._take_record(incoming, held[0], out, wait=wait):
            held.popleft()
            incoming.held_since = now
            wait = True

    # -- answers -----------------------------------------------------------------------------------------

    def admit(self, event: RecordReceived) -> RefusedCode | None:
        """The code with which the owner must refuse, because an earlier record was refused since."""
        if not self._refusals:
            return None
        return self._refusals.in_the_way(event.lane, event.head.source, event.head.number)

    def settle(self, lane: int, place: int, *, custody: bool) -> None:
        head = self._incoming(lane).settle(place, custody=custody)
        if self._refusals:
            self._refusals.came(lane, head.source, head.number, head.to)

    def in_custody(self, lane: int, place: int) -> None:
        incoming = self._incoming(lane)
        if place not in incoming.kept:
            raise UsageError(f"place {place} of lane {lane} is in custody before it was settled")
        incoming.custody.add(place)
        incoming.dirty = True

    def refuse(self, lane: int, place: int, code: RefusedCode, retry_after_ms: int, reason: str) -> None:
        head = self._incoming(lane).settle(place, custody=True)
        self._stats.refused_by_owner += 1
        self._remember(lane, head, code)
        self._send_refused(Refused(lane, place, int(code), retry_after_ms, reason))

    def _incoming(self, lane: int) -> Incoming:
        try:
            return self._lanes[lane]
        except KeyError:
            raise UsageError(f"the peer has sent nothing on lane {lane}") from None

    def give_credit(self, *, receipts: bool) -> list[Receipt]:
        """Give back what was answered since the last call; with `receipts` also what is to be told."""
        told: list[Receipt] = []
        for incoming in self._lanes.values():
            if not incoming.dirty:
                continue
            self._session.advance_credit(incoming.stream, incoming.taken + incoming.cutter.incomplete)
            if receipts:
                incoming.dirty = False
                receipt = incoming.receipt()
                if receipt is not None:
                    told.append(receipt)
        return told

    # -- deadlines ---------------------------------------------------------------------------------------

    def check(self, now: float, out: list[LinkEvent]) -> None:
        """(5) and (8). LimitError for a record that was not completed in time."""
        for incoming in self._lanes.values():
            if incoming.held and now - incoming.held_since >= self._introduce_timeout:
                self._resume(incoming, now, out, wait=False)
            if incoming.record_since is None:
                continue
            if incoming.unsettled_bytes >= CREDIT_FLOOR:
                incoming.record_since = now  # the peer may have been without credit until now
            elif now - incoming.record_since >= self._record_timeout:
                raise LimitError(
                    f"a record on lane {incoming.lane} was not complete within {self._record_timeout:g} s"
                )

    def gauges(self) -> tuple[int, int]:
        """Records open with the owner, and records held for INTRODUCE."""
        lanes = self._lanes.values()
        return sum(len(lane.open) for lane in lanes), sum(len(lane.held) for lane in lanes)
