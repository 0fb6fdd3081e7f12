"""stp.carriers.door: who may stand before 8443 (R-11-3). Simulated time."""

from __future__ import annotations

from stp.carriers.door import MAX_PER_ADDRESS, MAX_UNPROVEN, STALE_AFTER, Door, Place


class Crowd:
    def __init__(self, **options: float) -> None:
        self.door = Door(**options)  # type: ignore[arg-type]
        self.gone: list[str] = []
        self.begin = 1000.0  # the buckets of a new door are not full to the brim

    def come(self, host: str, now: float) -> Place | None:
        return self.door.enter((host, 1), self.begin + now, lambda: self.gone.append(host))


def fast() -> Crowd:
    return Crowd(address_rate=1e6, total_rate=1e6)


def test_an_address_has_its_share_and_no_more() -> None:
    """(1)"""
    crowd = fast()
    places = [crowd.come("192.0.2.1", 0.0) for _ in range(MAX_PER_ADDRESS + 1)]
    assert [place is not None for place in places] == [True] * MAX_PER_ADDRESS + [False]
    assert crowd.door.statistics.refused_address == 1
    assert crowd.come("192.0.2.2", 0.0) is not None
    assert places[0] is not None
    crowd.door.leave(places[0])
    crowd.door.leave(places[0])
    assert crowd.come("192.0.2.1", 0.0) is not None


def test_an_ipv6_address_is_its_slash_64() -> None:
    crowd = fast()
    for n in range(MAX_PER_ADDRESS):
        assert crowd.come(f"2001:db8::{n:x}", 0.0) is not None
    assert crowd.come("2001:db8::ffff", 0.0) is None
    assert crowd.come("2001:db8:0:1::1", 0.0) is not None


def test_whoever_stands_there_longest_makes_way() -> None:
    """(2)"""
    crowd = fast()
    for n in range(MAX_UNPROVEN):
        assert crowd.come(f"192.0.2.{n}", n / 100) is not None
    assert crowd.come("198.51.100.1", STALE_AFTER - 0.01) is None
    assert crowd.door.statistics.refused_full == 1
    assert crowd.come("198.51.100.1", STALE_AFTER) is not None
    assert crowd.gone == ["192.0.2.0"]
    assert crowd.door.statistics.evicted == 1
    assert crowd.door.statistics.waiting == MAX_UNPROVEN


def test_one_that_is_being_served_stays() -> None:
    crowd = fast()
    places = [crowd.come(f"192.0.2.{n}", 0.0) for n in range(MAX_UNPROVEN)]
    for place in places[:2]:
        assert place is not None
        place.make_way = None
    assert crowd.come("198.51.100.1", 60.0) is not None
    assert crowd.gone == ["192.0.2.2"]
    for standing in crowd.door._places:
        standing.make_way = None
    assert crowd.come("198.51.100.2", 60.0) is None


def test_handshakes_a_second_are_limited_as_on_udp() -> None:
    """R-4-25."""
    crowd = Crowd(address_rate=20.0, total_rate=200.0)
    came = 0
    for _ in range(7):
        place = crowd.come("192.0.2.1", 0.0)
        if place is not None:
            came += 1
            crowd.door.leave(place)
    assert came == 5
    assert crowd.door.statistics.refused_rate == 2
    assert crowd.come("192.0.2.1", 1.0) is not None
