"""Control records: what two nodes say on stream 0 besides messages (protocol §10). Sans-IO.

(1) Whatever bytes come, decoding raises ProtocolError (LimitError for a length above MAX_CONTROL) or
    succeeds; what it gives back can be encoded again.
(2) An unknown type decodes to None, an unknown JSON key is skipped: later versions may know more.
(3) What `encode_control` takes, `decode_control` gives back.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from struct import Struct
from typing import Any, Final, TypeAlias

from attrs import Factory, define

from stp.core.errors import LimitError, ProtocolError, UsageError
from stp.core.wire import Reader
from stp.fields import Fields, id16_of, to_json

MAX_CONTROL: Final = 16_384
"""Bytes of type and body."""
MAX_RANGES: Final = 255
"""Ranges in one RECEIPT."""
MAX_REASON: Final = 256
"""Bytes of the reason in REFUSED that we send; longer ones are cut."""

HELLO: Final = 1
RECEIPT: Final = 2
REFUSED: Final = 3
SUBSCRIBE: Final = 4
UNSUBSCRIBE: Final = 5
DRAIN_CREDIT: Final = 6
STATUS: Final = 7
GOAWAY: Final = 8
INTRODUCE: Final = 9
SUBSCRIBED: Final = 10
MOVED: Final = 11
REVOKED: Final = 12

MAX_SERIALS: Final = 256
"""Serials in one REVOKED; more follow in further ones."""

_SERIAL: Final = re.compile(r"[0-9a-f]{1,40}")
_HEAD: Final = Struct("!IB")
_RECEIPT: Final = Struct("!BQQB")
_REFUSED: Final = Struct("!BQHI")
_DRAIN_CREDIT: Final = Struct("!BI")


@define
class ClassRule:
    """How a keeper's class sorts topics, so that publishers batch per class."""

    name: str
    filters: tuple[str, ...]
    lane: int
    ttl_ms: int = 0
    """0: no limit."""
    linger_ms: int = 0
    """How long a publisher may wait to fill a batch."""
    durability: str = "sync"
    """sync, spill or memory."""


@define
class Hello:
    """The first record of either side (R-10-34)."""

    domain: str
    node: str
    store: bytes
    """16 bytes: the sender's own source; a publisher's is random per process start."""
    run: int
    """Counts the starts of this node."""
    nonce: bytes
    """16 bytes, random per process start: tells a cloned card from an overlap."""
    kind: str
    """The client kind; a newer session replaces an older one only for the same node and kind."""
    software: str = ""
    features: tuple[str, ...] = ()
    time_ms: int = 0
    """The sender's clock, ms since 1970."""
    time_error_ms: int = 0
    classes: list[ClassRule] | None = None
    """From keepers only."""
    continues: bytes = b""
    """The id (16 bytes) of the session that this one takes over from while it still carries; b"" for none."""


@define
class Receipt:
    """What the receiver of a lane has kept and has in custody; places from 0 on this lane in this session."""

    lane: int
    kept: int
    """Every place below is on disk."""
    custody: int
    """Every place below is in custody."""
    ranges: list[tuple[int, int]] = Factory(list)
    """from ≤ place < to in custody beyond that, ascending."""


@define
class Refused:
    """One record was not taken. `code` is a RefusedCode, or one that a later version knows."""

    lane: int
    place: int
    code: int
    retry_after_ms: int = 0
    reason: str = ""


@define
class Subscribe:
    id: str
    filters: tuple[str, ...]
    name: str | None = None
    """Durable under this name; None: live."""
    start: str | int = "now"
    """now, earliest, or ms since 1970."""
    max_lag: float | None = None
    """Seconds that a durable reader may be behind before it is dropped."""
    group: str | None = None


@define
class Unsubscribe:
    id: str


@define
class Subscribed:
    """The answer to SUBSCRIBE: `error` says why not."""

    id: str
    ok: bool = True
    error: str | None = None


@define
class DrainCredit:
    """How fast the peer may send its backlog on a lane."""

    lane: int
    bytes_per_second: int


@define
class Status:
    """Backlog by class, cause, ledger totals: for people, so its inside is free."""

    fields: dict[str, Any]


@define
class Goaway:
    """Leave; come back after `slot_ms`."""

    reason: str = ""
    slot_ms: int = 0


@define
class Introduce:
    """Source (16 bytes) to the name of the node it belongs to."""

    names: dict[bytes, str]


@define
class Moved:
    """The sender's last record on this session was answered: what follows comes on the one that continues it."""


@define
class Revoked:
    """Certificates that nobody below may come in with: serial -> Unix seconds until which to remember it."""

    serials: dict[int, int]


Control: TypeAlias = (
    Hello
    | Receipt
    | Refused
    | Subscribe
    | Unsubscribe
    | Subscribed
    | DrainCredit
    | Status
    | Goaway
    | Introduce
    | Moved
    | Revoked
)


# -- encoding -----------------------------------------------------------------------------------------------


def encode_control(control: Control) -> bytes:
    """The whole control record. UsageError for fields that do not fit or a record above MAX_CONTROL."""
    kind, encode = _ENCODERS[type(control)]
    try:
        body = encode(control)
    except (struct.error, TypeError, ValueError) as exc:
        raise UsageError(f"{type(control).__name__} cannot be sent: {exc}") from None
    if len(body) + 1 > MAX_CONTROL:
        raise UsageError(f"{type(control).__name__} of {len(body) + 1} bytes; at most {MAX_CONTROL}")
    return _HEAD.pack(len(body) + 1, kind) + body


def _encode_hello(hello: Hello) -> bytes:
    fields: dict[str, Any] = {
        "domain": hello.domain,
        "node": hello.node,
        "store": hello.store.hex(),
        "run": hello.run,
        "nonce": hello.nonce.hex(),
        "kind": hello.kind,
        "software": hello.software,
        "features": list(hello.features),
        "time_ms": hello.time_ms,
        "time_error_ms": hello.time_error_ms,
    }
    if hello.classes is not None:
        fields["classes"] = [_class_fields(rule) for rule in hello.classes]
    if hello.continues:
        fields["continues"] = hello.continues.hex()
    return to_json(fields)


def _class_fields(rule: ClassRule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "filters": list(rule.filters),
        "lane": rule.lane,
        "ttl": rule.ttl_ms,
        "linger": rule.linger_ms,
        "durability": rule.durability,
    }


def _encode_receipt(receipt: Receipt) -> bytes:
    ranges = receipt.ranges[:MAX_RANGES]  # the rest follows when custody has moved
    flat = [bound for pair in ranges for bound in pair]
    head = _RECEIPT.pack(receipt.lane, receipt.kept, receipt.custody, len(ranges))
    return head + Struct(f"!{len(flat)}Q").pack(*flat)


def _encode_refused(refused: Refused) -> bytes:
    reason = refused.reason.encode(errors="replace")[:MAX_REASON].decode(errors="ignore").encode()
    return _REFUSED.pack(refused.lane, refused.place, refused.code, refused.retry_after_ms) + reason


def _encode_subscribe(subscribe: Subscribe) -> bytes:
    fields: dict[str, Any] = {
        "id": subscribe.id,
        "filters": list(subscribe.filters),
        "name": subscribe.name,
        "start": subscribe.start,
    }
    if subscribe.max_lag is not None:
        fields["max_lag"] = subscribe.max_lag
    if subscribe.group is not None:
        fields["group"] = subscribe.group
    return to_json(fields)


def _encode_unsubscribe(unsubscribe: Unsubscribe) -> bytes:
    return to_json({"id": unsubscribe.id})


def _encode_subscribed(subscribed: Subscribed) -> bytes:
    if subscribed.ok:
        return to_json({"id": subscribed.id, "ok": True})
    return to_json({"id": subscribed.id, "error": subscribed.error or ""})


def _encode_drain_credit(credit: DrainCredit) -> bytes:
    return _DRAIN_CREDIT.pack(credit.lane, credit.bytes_per_second)


def _encode_status(status: Status) -> bytes:
    return to_json(status.fields)


def _encode_goaway(goaway: Goaway) -> bytes:
    return to_json({"reason": goaway.reason, "slot_ms": goaway.slot_ms})


def _encode_introduce(introduce: Introduce) -> bytes:
    return to_json({source.hex(): node for source, node in introduce.names.items()})


def _encode_moved(moved: Moved) -> bytes:
    return to_json({})


def _encode_revoked(revoked: Revoked) -> bytes:
    if len(revoked.serials) > MAX_SERIALS:
        raise ValueError(f"{len(revoked.serials)} serials; at most {MAX_SERIALS}")
    return to_json({f"{serial:x}": until for serial, until in revoked.serials.items()})


_ENCODERS: Final[dict[type, tuple[int, Callable[[Any], bytes]]]] = {
    Hello: (HELLO, _encode_hello),
    Receipt: (RECEIPT, _encode_receipt),
    Refused: (REFUSED, _encode_refused),
    Subscribe: (SUBSCRIBE, _encode_subscribe),
    Unsubscribe: (UNSUBSCRIBE, _encode_unsubscribe),
    DrainCredit: (DRAIN_CREDIT, _encode_drain_credit),
    Status: (STATUS, _encode_status),
    Goaway: (GOAWAY, _encode_goaway),
    Introduce: (INTRODUCE, _encode_introduce),
    Subscribed: (SUBSCRIBED, _encode_subscribed),
    Moved: (MOVED, _encode_moved),
    Revoked: (REVOKED, _encode_revoked),
}


# -- decoding -----------------------------------------------------------------------------------------------


def decode_control(type: int, body: bytes) -> Control | None:
    """The control record of that type; None for a type we do not know. Raises ProtocolError for a bad one."""
    decode = _DECODERS.get(type)
    return None if decode is None else decode(body)


def _lane(lane: int) -> int:
    if not 1 <= lane <= 4:
        raise ProtocolError(f"there is no lane {lane}")
    return lane


def _decode_hello(body: bytes) -> Hello:
    fields = Fields.parse(body, "HELLO")
    classes = fields.objects("classes")
    return Hello(
        domain=fields.text("domain"),
        node=fields.text("node"),
        store=fields.id16("store"),
        run=fields.number("run"),
        nonce=fields.id16("nonce"),
        kind=fields.text("kind"),
        software=fields.text("software", ""),
        features=fields.texts("features", []),
        time_ms=fields.number("time_ms", 0),
        time_error_ms=fields.number("time_error_ms", 0),
        classes=None if classes is None else [_decode_class(rule) for rule in classes],
        continues=fields.id16("continues") if "continues" in fields.all() else b"",
    )


def _decode_class(rule: Fields) -> ClassRule:
    return ClassRule(
        name=rule.text("name"),
        filters=rule.texts("filters"),
        lane=rule.number("lane", least=1, most=4),
        ttl_ms=rule.number("ttl", 0, most=0xFFFF_FFFF),
        linger_ms=rule.number("linger", 0, most=0xFFFF_FFFF),
        durability=rule.text("durability", "sync"),
    )


def _decode_receipt(body: bytes) -> Receipt:
    reader = Reader(body)
    lane = _lane(reader.u8())
    kept = reader.u64()
    custody = reader.u64()
    ranges = [(reader.u64(), reader.u64()) for _ in range(reader.u8())]
    reader.done()
    if custody > kept:
        raise ProtocolError(f"RECEIPT: custody of {custody}, but only {kept} kept")
    last = custody
    for start, stop in ranges:
        if start < last or stop <= start:
            raise ProtocolError(f"RECEIPT: range {start}..{stop} after {last}")
        last = stop
    return Receipt(lane, kept, custody, ranges)


def _decode_refused(body: bytes) -> Refused:
    reader = Reader(body)
    lane = _lane(reader.u8())
    place = reader.u64()
    code = reader.u16()
    retry_after_ms = reader.u32()
    try:
        return Refused(lane, place, code, retry_after_ms, reader.rest().decode())
    except UnicodeDecodeError:
        raise ProtocolError("REFUSED: the reason is not UTF-8") from None


def _decode_subscribe(body: bytes) -> Subscribe:
    fields = Fields.parse(body, "SUBSCRIBE")
    start: str | int
    if isinstance(fields.all().get("start"), str):
        start = fields.text("start")
        if start not in ("now", "earliest"):
            raise ProtocolError(f"SUBSCRIBE: no start {start[:32]!r}")
    else:
        start = fields.number("start")
    return Subscribe(
        id=fields.text("id"),
        filters=fields.texts("filters"),
        name=fields.optional_text("name"),
        start=start,
        max_lag=fields.seconds("max_lag"),
        group=fields.optional_text("group"),
    )


def _decode_unsubscribe(body: bytes) -> Unsubscribe:
    return Unsubscribe(Fields.parse(body, "UNSUBSCRIBE").text("id"))


def _decode_subscribed(body: bytes) -> Subscribed:
    fields = Fields.parse(body, "SUBSCRIBED")
    if fields.all().get("ok") is True:
        return Subscribed(fields.text("id"))
    return Subscribed(fields.text("id"), False, fields.text("error"))


def _decode_drain_credit(body: bytes) -> DrainCredit:
    reader = Reader(body)
    credit = DrainCredit(_lane(reader.u8()), reader.u32())
    reader.done()
    return credit


def _decode_status(body: bytes) -> Status:
    return Status(Fields.parse(body, "STATUS").all())


def _decode_goaway(body: bytes) -> Goaway:
    fields = Fields.parse(body, "GOAWAY")
    return Goaway(fields.text("reason", ""), fields.number("slot_ms", 0))


def _decode_introduce(body: bytes) -> Introduce:
    fields = Fields.parse(body, "INTRODUCE")
    names: dict[bytes, str] = {}
    for key in fields.all():
        source = id16_of(key)
        if source is None:
            raise ProtocolError("INTRODUCE: a key is not 16 bytes in hex")
        names[source] = fields.text(key)
    return Introduce(names)


def _decode_moved(body: bytes) -> Moved:
    Fields.parse(body, "MOVED")
    return Moved()


def _decode_revoked(body: bytes) -> Revoked:
    fields = Fields.parse(body, "REVOKED")
    serials: dict[int, int] = {}
    for key in fields.all():
        if not _SERIAL.fullmatch(key):
            raise ProtocolError("REVOKED: a key is not a serial in hex")
        serials[int(key, 16)] = fields.number(key)
    if len(serials) > MAX_SERIALS:
        raise ProtocolError(f"REVOKED: {len(serials)} serials; at most {MAX_SERIALS}")
    return Revoked(serials)


_DECODERS: Final[dict[int, Callable[[bytes], Control]]] = {
    HELLO: _decode_hello,
    RECEIPT: _decode_receipt,
    REFUSED: _decode_refused,
    SUBSCRIBE: _decode_subscribe,
    UNSUBSCRIBE: _decode_unsubscribe,
    DRAIN_CREDIT: _decode_drain_credit,
    STATUS: _decode_status,
    GOAWAY: _decode_goaway,
    INTRODUCE: _decode_introduce,
    SUBSCRIBED: _decode_subscribed,
    MOVED: _decode_moved,
    REVOKED: _decode_revoked,
}


# -- cutting ------------------------------------------------------------------------------------------------


class ControlCutter:
    """Cuts stream 0 into control records. Useless once it has raised (R-10-32)."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def incomplete(self) -> int:
        """Bytes held of a record that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """(type, body) of every record that is complete with `data`.

        Raises LimitError for a length above MAX_CONTROL, ProtocolError for one of 0.
        """
        buffer = self._buffer
        buffer += data
        records: list[tuple[int, bytes]] = []
        pos = 0
        while len(buffer) - pos >= 4:
            length = int.from_bytes(buffer[pos : pos + 4], "big")
            if length > MAX_CONTROL:
                raise LimitError(f"a control record of {length} bytes; at most {MAX_CONTROL}")
            if not length:
                raise ProtocolError("a control record without a type")
            stop = pos + 4 + length
            if stop > len(buffer):
                break
            records.append((buffer[pos + 4], bytes(buffer[pos + 5 : stop])))
            pos = stop
        del buffer[:pos]
        return records
