"""Two framed sessions and the stream between them, in simulated time: bytes come in order, cut anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from stp.core.channel import PlainChannel, TlsChannel
from stp.core.events import Event, SessionClosed
from stp.core.flow import WindowBudget
from stp.core.framed import FOR_EVER, FramedContext, FramedSession, allow
from stp.core.handshake import Authorise, PeerIdentity
from stp.core.states import State
from tests.identity_kit import DOMAIN, Flaw
from tests.sim import START, context, credentials

ADDRESS = ("192.0.2.7", 4711)
HUB, EDGE = "hub-1", "edge-1"


class End:
    """One side: its session, what it heard, and an owner who reads everything at once."""

    def __init__(self, session: FramedSession, shared: FramedContext) -> None:
        self.session = session
        self.context = shared
        self.heard: list[Event] = []
        self.received: dict[int, bytearray] = {}
        self.auto = True
        self.written: list[bytes] = []
        self.on_writable: Callable[[int], None] | None = None

    def serve(self) -> None:
        agenda = self.context.agenda
        while agenda.ready:
            agenda.ready.pop().in_ready = False
            while (event := self.session.next_event()) is not None:
                self.heard.append(event)
            if self.auto:
                self.read_all()

    def read_all(self) -> None:
        session = self.session
        for stream in list(session._streams.recv):
            data = session.read(stream)
            if data:
                got = self.received.setdefault(stream, bytearray())
                got += data
                if stream:
                    session.advance_credit(stream, len(got))

    def got(self, stream: int) -> bytes:
        return bytes(self.received.get(stream, b""))

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kind)]

    @property
    def closed(self) -> SessionClosed | None:
        found = self.of(SessionClosed)
        return found[0] if found else None


class Pair:
    """`edge` dials `hub`. `chunks` cuts what flies at random places, one piece per `delay` seconds and direction."""

    def __init__(
        self,
        seed: int = 0,
        *,
        carrier: str = "tls",
        chunks: bool = False,
        delay: float = 0.01,
        expected: tuple[str, str] | None = (DOMAIN, HUB),
        hub_flaw: Flaw = Flaw.NONE,
        edge_flaw: Flaw = Flaw.NONE,
        peer: PeerIdentity | None = None,
        names: tuple[str, str] | None = (f"stp://{DOMAIN}/{HUB}", f"stp://{DOMAIN}/{EDGE}"),
        authorise: Authorise = allow,
        **options: Any,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = START
        self.delay = delay
        self.chunks = chunks
        self.refusals: list[tuple[Any, PeerIdentity | None, str]] = []

        def shared(**more: Any) -> FramedContext:
            return FramedContext(
                carrier=carrier,
                random_bytes=self.rng.randbytes,
                budget=WindowBudget(64 << 20),
                on_refused=lambda *args: self.refusals.append(args),
                **(options | more),
            )

        ours, theirs = shared(), shared(authorise=authorise)
        self.edge = End(
            FramedSession(
                ours,
                TlsChannel(context(EDGE, edge_flaw, False), leaf(EDGE, edge_flaw), dialling=True)
                if carrier == "tls"
                else PlainChannel(None),
                ADDRESS,
                dialling=True,
                now=self.now,
                expected=expected,
            ),
            ours,
        )
        self.hub = End(
            FramedSession(
                theirs,
                TlsChannel(context(HUB, hub_flaw, True), leaf(HUB, hub_flaw), dialling=False)
                if carrier == "tls"
                else PlainChannel(peer or PeerIdentity(DOMAIN, EDGE, 0, FOR_EVER)),
                ADDRESS,
                dialling=False,
                now=self.now,
                names=None if carrier == "tls" else names,
            ),
            theirs,
        )
        self.flying: dict[str, bytearray] = {"edge": bytearray(), "hub": bytearray()}
        self.cut = False

    def ends(self) -> tuple[tuple[str, End, End], tuple[str, End, End]]:
        return ("hub", self.edge, self.hub), ("edge", self.hub, self.edge)

    def step(self) -> bool:
        """Everything that can leave leaves, one piece arrives on each side, timers ring. False: nothing moved."""
        moved = False
        for to, sender, _ in self.ends():
            sender.serve()
            while data := sender.session.next_write(self.now):
                sender.written.append(data)
                if not self.cut:
                    self.flying[to] += data
                moved = True
                sender.serve()
        self.now += self.delay
        for to, _, receiver in self.ends():
            flying = self.flying[to]
            if flying:
                size = self.rng.choice((1, 2, 3, 7, 100, 5000, 70_000)) if self.chunks else len(flying)
                piece = bytes(flying[:size])
                del flying[:size]
                receiver.session.receive(piece, self.now)
                moved = True
            due = receiver.session.next_timeout()
            if due is not None and due <= self.now:
                receiver.session.handle_timeout(self.now)
                moved = True
            receiver.serve()
        return moved

    def run(self, until: Callable[[], bool], steps: int = 50_000) -> None:
        for _ in range(steps):
            if until():
                return
            self.step()
        raise AssertionError("it did not come to that")

    def settle(self) -> None:
        """Until nothing moves any more."""
        while self.step():
            pass

    def wait(self, seconds: float) -> None:
        """Time goes by; timers ring when they are due."""
        end = self.now + seconds
        while True:
            self.settle()
            dues = [e.session.next_timeout() for _, e, _ in self.ends()]
            due = min((d for d in dues if d is not None), default=end)
            if due >= end:
                break
            self.now = max(self.now, due)
        self.now = end

    def establish(self) -> Pair:
        self.run(lambda: all(e.session.state is State.ESTABLISHED for _, e, _ in self.ends()))
        return self

    def inject(self, to: End, unit: bytes) -> None:
        """A unit that the other side's code would never send."""
        other = self.hub if to is self.edge else self.edge
        to.session.receive(other.session._channel.seal(len(unit).to_bytes(4, "big") + unit), self.now)
        to.serve()


def leaf(node: str, flaw: Flaw = Flaw.NONE) -> bytes:
    return credentials(node, flaw).chain_der[0]


def fill(session: FramedSession, stream: int, data: bytes) -> int:
    """As much as there is room for; how much that was."""
    size = min(len(data), session.room(stream))
    if size:
        session.write(stream, data[:size])
    return size


__all__ = ["ADDRESS", "EDGE", "HUB", "End", "Pair", "fill", "leaf"]
