"""Echo over datagrams: who is answered, and what the asker makes of it (protocol §10.5, R-10-44, R-10-45)."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from stp.core.events import DatagramReceived
from stp.core.session import Session
from stp.echo import (
    ALLOWANCE_TIME,
    CATCH_UP,
    ECHO_REPLY,
    ECHO_REQUEST,
    HEAD,
    MAX_OUTSTANDING,
    MIN_SIZE,
    Allowance,
    Load,
    LoadReport,
    Responder,
)
from tests.sim import Network

FREE = Allowance(1e12)


def request(seq: int, size: int = 100) -> bytes:
    return HEAD.pack(ECHO_REQUEST, seq, 7, 0, 0) + bytes(size - MIN_SIZE)


def test_a_reply_is_its_request_with_two_counts() -> None:
    """R-10-44"""
    responder = Responder(1e9, FREE)
    responder.answer(request(4), 0.0)
    asked = HEAD.pack(ECHO_REQUEST, 5, 123456789, 0, 0) + b"filler"
    assert responder.answer(asked, 0.0) == HEAD.pack(ECHO_REPLY, 5, 123456789, 2, 0) + b"filler"


def test_what_is_above_the_allowance_is_counted_and_not_answered() -> None:
    """R-10-44"""
    total = Allowance(1e12)
    responder = Responder(10_000, total)
    answers = [responder.answer(request(n), 10.0) for n in range(100)]
    most = int(10_000 * ALLOWANCE_TIME / 100)
    assert [one is not None for one in answers] == [True] * most + [False] * (100 - most)
    assert responder.unanswered == 100 - most
    late = responder.answer(request(100), 11.0)
    assert late is not None
    assert HEAD.unpack_from(late)[3:] == (101, 100 - most)


def test_all_sessions_together_have_one_allowance() -> None:
    """R-10-44"""
    total = Allowance(10_000)
    answered = sum(Responder(10_000, total).answer(request(n), 10.0) is not None for n in range(100))
    assert answered == int(10_000 * ALLOWANCE_TIME / 100)


def test_an_allowance_of_nothing_answers_nobody() -> None:
    assert Responder(0, FREE).answer(request(1), 5.0) is None


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_are_answered_or_dropped(seed: int) -> None:
    """R-10-45"""
    rng = random.Random(seed)
    responder, load = Responder(1e12, FREE), Load(1e6, 100, 0.0)
    for _ in range(3000):
        data = rng.randbytes(rng.choice((0, 1, 20, 21, 22, 100)))
        data = bytes((rng.randrange(4),)) + data[1:] if data else data
        reply = responder.answer(data, 1.0)
        assert reply is None or (len(reply) == len(data) and reply[0] == ECHO_REPLY)
        assert (reply is not None) == (len(data) >= MIN_SIZE and data[0] == ECHO_REQUEST)
        assert not load.on_datagram(data, 1.0)
    assert responder.strange + responder.arrived == 3000


def run(
    seed: int, rate: float, seconds: float, allowance: float = 1e9, **conditions: float
) -> tuple[LoadReport, Network, Callable[[], tuple[int, int]]]:
    """A load over the simulated network, and what the network knows: datagrams that arrived above and below."""
    net = Network(seed, **conditions)
    hub, edge = net.listener(), net.dialler()
    session = edge.connect(hub)
    peer = net.establish(session)
    responder = Responder(allowance, Allowance(allowance))
    load = Load(rate, 1000, net.now)
    arrived = [0]

    def at_hub(one: Session) -> None:
        while (event := one.next_event()) is not None:
            if isinstance(event, DatagramReceived):
                reply = responder.answer(event.data, net.now)
                if reply is not None:
                    one.send_datagram(reply)

    def at_edge(one: Session) -> None:
        while (event := one.next_event()) is not None:
            if isinstance(event, DatagramReceived):
                arrived[0] += load.on_datagram(event.data, net.now)

    hub.on_ready, edge.on_ready = at_hub, at_edge
    end = net.now + seconds
    while net.now < end:
        while (data := load.request(net.now)) is not None:
            load.on_sent(session.send_datagram(data))
        net.run_for(max(1e-4, min(load.next_at, end) - net.now))
    net.run_for(1.0)
    assert peer.live
    return load.report(seconds), net, lambda: (responder.arrived, arrived[0])


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_told_by_way_as_the_network_had_it(seed: int) -> None:
    report, _, truth = run(seed, 125_000, 5.0, loss=0.05, delay=0.02)
    up, down = truth()
    assert report.sent == pytest.approx(625, abs=2)
    assert report.answered == down
    assert 0 <= report.lost_up - (report.sent - up) <= 3  # the last replies may have been lost
    assert report.lost_up + report.lost_down == report.sent - down > 20
    assert report.rtt_p50 == pytest.approx(0.04, abs=0.01)
    assert report.rtt_min <= report.rtt_p50 <= report.rtt_p95 <= report.rtt_p99 <= report.rtt_max


def test_jitter_is_the_network_s() -> None:
    still, *_ = run(1, 125_000, 2.0, delay=0.02)
    shaken, *_ = run(1, 125_000, 2.0, delay=0.02, jitter=0.01)
    assert still.jitter < 0.001
    assert 0.002 < shaken.jitter < 0.012
    assert shaken.reordered > 0
    assert still.lost == shaken.lost == 0.0


def test_a_load_beyond_the_link_is_held_back_not_lost() -> None:
    report, *_ = run(2, 1_250_000, 5.0, delay=0.02, bandwidth=125_000.0)
    assert report.held_back > report.sent
    assert report.lost < 0.1
    assert 60_000 < report.goodput < 125_000


def test_a_load_beyond_the_allowance_is_told_apart_from_loss() -> None:
    report, *_ = run(3, 125_000, 4.0, allowance=50_000, delay=0.01)
    assert report.lost == 0.0
    assert report.unanswered > 200
    assert report.answered + report.unanswered == pytest.approx(report.sent, abs=3)


def test_an_asker_that_lost_its_turn_makes_up_for_little() -> None:
    load = Load(1e6, 1000, 0.0)
    taken = 0
    while load.request(5.0) is not None:
        load.on_sent(taken=True)
        taken += 1
    assert taken <= CATCH_UP + 2


def test_memory_is_bounded() -> None:
    load = Load(1e9, 1000, 0.0)
    last = MAX_OUTSTANDING + 99
    for _ in range(last + 1):
        load.next_at = 0.0
        assert load.request(0.0) is not None
        load.on_sent(taken=True)
    assert len(load._outstanding) == MAX_OUTSTANDING
    reply = HEAD.pack(ECHO_REPLY, last, 0, last, 0)
    assert load.on_datagram(reply, 1.0)
    assert not load.on_datagram(reply, 1.0)  # once
