"""stp.core.admission: promises (2) and (3) of its head, and what an address is."""

from __future__ import annotations

import pytest

from stp.core import admission
from stp.core.admission import ADDRESS_BURST, ADDRESS_HALF_OPEN, Admission, address_key


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("192.0.2.1", 1), ("192.0.2.1", 2), True),
        (("192.0.2.1", 1), ("192.0.2.2", 1), False),
        (("2001:db8::1", 1, 0, 0), ("2001:db8::ffff", 2, 0, 0), True),
        (("2001:db8::1", 1, 0, 0), ("2001:db8:0:1::1", 1, 0, 0), False),
        (("::ffff:192.0.2.1", 1, 0, 0), ("192.0.2.1", 7), True),
        (("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth1", 1, 0, 3), True),
        ("pipe-1", "pipe-2", False),
    ],
)
def test_an_address_is_a_32_or_a_64(one: object, other: object, same: bool) -> None:
    assert (address_key(one) == address_key(other)) is same


def admitted(gate: Admission, key: bytes, tries: int, now: float) -> int:
    count = 0
    for _ in range(tries):
        if gate.admit(key, now):
            gate.on_over(key)
            count += 1
    return count


def test_twenty_a_second_after_a_burst_of_five() -> None:
    """Fault 20: 1,000 handshakes a second from one address (R-4-25)."""
    gate = Admission()
    assert admitted(gate, b"a", 100, 1.0) == ADDRESS_BURST
    total = sum(admitted(gate, b"a", 10, 1.0 + n / 100) for n in range(1, 101))
    assert 19 <= total <= 20
    assert admitted(gate, b"b", 100, 2.0) == ADDRESS_BURST


def test_eight_unfinished_per_address() -> None:
    """R-4-25."""
    gate = Admission()
    now = 1.0
    for _ in range(ADDRESS_HALF_OPEN):
        now += 1.0
        assert gate.admit(b"a", now)
    assert not gate.admit(b"a", now + 1.0)
    gate.on_over(b"a")
    assert gate.admit(b"a", now + 1.0)


def test_all_together_are_bounded() -> None:
    """R-4-25."""
    gate = Admission()
    now, count = 0.0, 0
    for n in range(3000):
        now += 0.001
        count += admitted(gate, n.to_bytes(4, "big"), 1, now)
    assert count == pytest.approx(admission.TOTAL_BURST / 2 + 3.0 * admission.TOTAL_RATE, abs=2)


def test_strangers_leave_half_to_those_who_were_here_before() -> None:
    """Promise (3): R-4-25."""
    gate = Admission()
    now = 0.0
    for n in range(3000):
        now += 0.001
        gate.admit(n.to_bytes(4, "big"), now)
    known = [gate.admit(b"node" + bytes((n,)), now, by_token=True) for n in range(100)]
    assert sum(known) == pytest.approx(admission.TOTAL_BURST / 2, abs=1)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise (4)."""
    monkeypatch.setattr(admission, "MAX_KEYS", 20)
    monkeypatch.setattr(admission, "TOTAL_BURST", 1e9)
    gate = Admission()
    gate._total = (1e9, 0.0)
    for n in range(100):
        gate.admit(n.to_bytes(4, "big"), 1.0)  # none of them recovers: the oldest go
    assert len(gate._buckets) == 20
    gate.admit(b"late", 100.0)  # all have recovered
    assert len(gate._buckets) == 1
