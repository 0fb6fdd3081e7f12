"""RESET (protocol §8): a restart is known in one round trip, and nobody else can end a session."""

from __future__ import annotations

import os

from stp.core.errors import LocalCause
from stp.core.packet import DATA_BYTE, MIN_RESET
from stp.core.resets import MAX_ADDRESSES, RESET_INTERVAL, Resetter
from stp.core.states import State
from tests.sim import Host, Network

KEYS = {"cid_key": b"c" * 32, "reset_key": b"r" * 32}


def restarted(net: Network, hub: Host, **keys: bytes) -> Host:
    """The same address, and nothing else, comes back."""
    del net.hosts[hub.addr]
    return net.listener(hub.node, addr=hub.addr, **keys)


def test_a_restart_is_known_in_one_round_trip() -> None:
    """R-8-2."""
    net = Network(1, delay=0.05)
    hub, edge = net.listener(**KEYS), net.dialler()
    session = edge.connect(hub)
    net.establish(session)
    net.run_for(1.0)
    again = restarted(net, hub, **KEYS)
    session.write(session.open_stream(), b"x")
    took = net.run(lambda: edge.closed(session) is not None, limit=1.0)
    closed = edge.closed(session)
    assert closed is not None
    assert closed.code is LocalCause.RESET_BY_PEER
    assert took <= 0.11, "one round trip"
    assert session.state is State.CLOSED
    assert again.endpoint.statistics().resets_sent == 1
    assert edge.endpoint.statistics().resets_received == 1


def test_fault_57_a_sibling_never_resets_what_it_does_not_own() -> None:
    """Another instance, and one with other keys, are silent; so is one without keys that outlive a start.

    R-8-3, R-8-4.
    """
    for keys in ({**KEYS, "instance": 1}, {"cid_key": b"x" * 32, "reset_key": b"r" * 32}, {}):
        net = Network(2)
        hub, edge = net.listener(**KEYS), net.dialler()
        session = edge.connect(hub)
        net.establish(session)
        sibling = restarted(net, hub, **keys)  # type: ignore[arg-type]
        session.write(session.open_stream(), b"x")
        net.run_for(1.0)
        assert session.state is State.ESTABLISHED
        assert sibling.endpoint.statistics().resets_sent == 0


def test_fault_56_a_forged_reset_ends_nothing() -> None:
    """Neither a guess nor a token from another address; the true token from the peer's address would (R-8-5)."""
    net = Network(3)
    hub, edge = net.listener(**KEYS), net.dialler()
    session = edge.connect(hub)
    net.establish(session)
    net.run_for(0.5)
    assert session._data is not None
    token = next(iter(session._data.remote_cids.tokens.values()))
    head = bytes([DATA_BYTE | 0x0A]) + os.urandom(24)
    net.inject(head + os.urandom(16), source=hub, to=edge)
    net.inject(head + token, source=("203.0.113.9", 9000), to=edge)
    net.inject((head + token)[-(MIN_RESET - 1) :], source=hub, to=edge)
    assert session.state is State.ESTABLISHED
    net.inject(head + token, source=hub, to=edge)
    assert session.state is State.CLOSED


def test_garbage_draws_nothing() -> None:
    """R-8-2."""
    net = Network(4)
    hub = net.listener(**KEYS)
    for size in (20, 25, 60, 1200):
        net.inject(bytes([DATA_BYTE]) + net.rng.randbytes(size), source=("203.0.113.9", 1), to=hub)
    net.run_for(0.1)
    assert net.log == []


def test_rate_and_size_are_bounded() -> None:
    """Promises (2) and (3, R-2-9, R-8-2)."""
    net = Network(5)
    hub = net.listener(**KEYS)
    cid = hub.endpoint._new_cid()
    resetter = Resetter(KEYS["cid_key"], KEYS["reset_key"], 0, os.urandom)
    packet = bytes([DATA_BYTE]) + cid + bytes(40)
    first = resetter.answer(packet, "a", 1.0)
    assert first is not None
    assert MIN_RESET <= len(first) < len(packet)
    assert resetter.answer(packet, "a", 1.0 + RESET_INTERVAL / 2) is None
    assert resetter.answer(packet, "b", 1.0 + RESET_INTERVAL / 2) is not None
    assert resetter.answer(packet, "a", 1.0 + RESET_INTERVAL) is not None
    assert resetter.answer(packet[:MIN_RESET], "c", 1.0) is None, "nothing shorter is left"
    for number in range(MAX_ADDRESSES + 5):
        resetter.answer(packet, number, 2.0)
    assert len(resetter._said) <= MAX_ADDRESSES


def test_who_expects_something_notices_sooner() -> None:
    """Liveness.expect: PINGs after 1, 2, 4, … seconds of silence; each would draw the RESET."""
    net = Network(6, delay=0.05)
    hub, edge = net.listener(**KEYS), net.dialler()
    session = edge.connect(hub)
    net.establish(session)
    net.run_for(10.0)
    session.expect(1.0)
    net.run_for(30.0)
    assert session.state is State.ESTABLISHED
    mine = [at for at, source, _, _ in net.log if source == edge.addr and at > net.now - 30.0]
    assert 3 <= len(mine) <= 6, "the pings grow rare"
    restarted(net, hub, **KEYS)
    session.expect(1.0)
    took = net.run(lambda: edge.closed(session) is not None, limit=5.0)
    assert took <= 1.2
