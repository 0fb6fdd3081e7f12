"""The simulated network keeps what its head promises: others build their proofs on it."""

from __future__ import annotations

import pytest

from tests.sim import START, Address, Conditions, Network, flip_bit

A: Address = ("192.0.2.101", 1)
B: Address = ("192.0.2.102", 2)


class Sink:
    """An endpoint that only listens."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.got: list[tuple[float, bytes, int]] = []

    def receive(self, data: bytes, addr: Address, now: float, segment_size: int = 0) -> None:
        assert addr == A
        self.got.append((round(now - START, 6), data, segment_size))

    def datagrams(self) -> list[bytes]:
        return [d[i : i + (n or len(d))] for _, d, n in self.got for i in range(0, len(d), n or len(d))]

    def take_ready(self) -> list[object]:
        return []

    def datagrams_to_send(self, now: float) -> list[object]:
        return []

    def next_timeout(self) -> None:
        return None


def wire(seed: int = 1, **conditions: object) -> tuple[Network, Sink, Conditions]:
    net = Network(seed, **conditions)
    host = net.dialler(addr=B)
    sink = Sink(net)
    host.endpoint = sink  # type: ignore[assignment]
    return net, sink, net.link(A, B)


def send(net: Network, count: int, size: int = 100, gap: float = 0.001) -> None:
    for n in range(count):
        net._send(A, B, n.to_bytes(4, "big").ljust(size, b"."))
        net.run_for(gap)
    net.run_for(1.0)


def numbers(sink: Sink) -> list[int]:
    return [int.from_bytes(d[:4], "big") for d in sink.datagrams()]


def test_delay_and_order() -> None:
    net, sink, _ = wire(delay=0.25)
    send(net, 3)
    assert [at for at, _, _ in sink.got] == [0.25, 0.251, 0.252]
    assert numbers(sink) == [0, 1, 2]


def test_jitter_reorders() -> None:
    net, sink, _ = wire(jitter=0.02)
    send(net, 200)
    assert sorted(numbers(sink)) == list(range(200))
    assert numbers(sink) != list(range(200))


@pytest.mark.parametrize("burst", [1, 3])
def test_loss_is_the_share_that_was_asked_for(burst: int) -> None:
    net, sink, link = wire(loss=0.3, burst=burst)
    send(net, 4000, gap=0.0)
    assert len(sink.datagrams()) + link.lost == 4000
    assert link.lost == pytest.approx(1200, rel=0.1)


def test_corruption_flips_one_bit() -> None:
    net, sink, _ = wire(corrupt=1.0)
    send(net, 50)
    for n, data in enumerate(sink.datagrams()):
        whole = n.to_bytes(4, "big").ljust(100, b".")
        assert sum((a ^ b).bit_count() for a, b in zip(data, whole, strict=True)) == 1
    assert flip_bit(b"\x00", 3) == b"\x08"


def test_duplicates() -> None:
    net, sink, _ = wire(duplicate=0.5)
    send(net, 1000)
    assert len(sink.datagrams()) == pytest.approx(1500, rel=0.1)
    assert set(numbers(sink)) == set(range(1000))


def test_the_nth_datagram_is_dropped_and_a_hook_sees_the_rest() -> None:
    net, sink, link = wire()
    seen: list[int] = []

    def hook(data: bytes, number: int) -> list[bytes]:
        seen.append(number)
        return [] if number == 3 else [data, b"extra"]

    link.drop.add(1)
    link.hook = hook
    send(net, 5)
    assert seen == [0, 2, 3, 4]
    assert len(sink.datagrams()) == 6


def test_bandwidth_and_queue() -> None:
    """10,000 bytes a second: a datagram of 100 takes 10 ms; ten wait, the twelfth finds no room."""
    net, sink, link = wire(delay=0.0, bandwidth=10_000, queue=10)
    for n in range(20):
        net._send(A, B, n.to_bytes(4, "big").ljust(100, b"."))
    net.run_for(1.0)
    assert numbers(sink) == list(range(11))
    assert [at for at, _, _ in sink.got] == pytest.approx([0.01 * (n + 1) for n in range(11)])
    assert link.lost == 9


def test_too_large_for_the_path() -> None:
    net, sink, _ = wire(mtu=99)
    send(net, 3)
    assert sink.got == []


def test_what_arrives_together_is_joined() -> None:
    """Equal sizes, the last maybe shorter, as GRO does."""
    net, sink, _ = wire()
    for size in (100, 100, 60, 100, 200, 200):
        net._send(A, B, bytes(size))
    net.run_for(1.0)
    assert [(len(d), n) for _, d, n in sink.got] == [(260, 100), (100, 0), (400, 200)]


def test_one_seed_one_history() -> None:
    histories = []
    for _ in range(2):
        net, sink, _ = wire(seed=9, loss=0.3, jitter=0.01, duplicate=0.1)
        send(net, 100)
        histories.append(sink.got)
    assert histories[0] == histories[1]


def test_a_condition_that_never_holds_fails() -> None:
    net, _, _ = wire()
    with pytest.raises(AssertionError, match="not within"):
        net.run(lambda: False, limit=1.0)
