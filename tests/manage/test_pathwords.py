"""A path in words: what is there is said, what is not is not made up."""

from __future__ import annotations

from stpctl.pathwords import describe
from stpd.status import PathStatus


def test_over_tls_no_packets_are_claimed() -> None:
    found = describe(
        PathStatus(
            session="ab" * 16, node="edge-1", carrier="tls", address="192.0.2.1:5", rtt_ms=21.5, now_ms=1000
        )
    )
    text = "\n".join(found)
    assert text.startswith("edge-1: TLS on TCP, asked by 192.0.2.1:5, up 1 s")
    assert "Round trip: 21.50 ms by ping" in text
    assert "Limited by the carrier." in text
    for word in ("Congestion", "Loss:", "CIDs", "phase"):
        assert word not in text


def test_trouble_is_said() -> None:
    text = "\n".join(
        describe(
            PathStatus(
                session="ab" * 16,
                carrier="udp",
                dialling=True,
                address="hub",
                datagram_bytes=1200,
                black_holes=1,
                migrations=2,
                packets_lost=7,
                packets_spurious=3,
                pto_count=2,
                failed_opens=4,
                limited_by="flow credit",
                datagrams_dropped=5,
                trace_until_ms=-1,
            )
        )
    )
    for words in (
        "made smaller 1 time in a black hole",
        "the path changed 2 times",
        "7 packets",
        "3 were only late",
        "The peer is silent: 2 probes unanswered",
        "the peer takes no more yet",
        "0 refused, 5 dropped here",
        "4 packets did not open",
        "written as long as it lives",
        "not measured yet",
    ):
        assert words in text


def test_what_a_peer_says_cannot_move_the_cursor() -> None:
    text = "\n".join(describe(PathStatus(session="ab" * 16, node="x\x1b[2J", carrier="udp", address="a\x07")))
    assert "\x1b" not in text
    assert "\x07" not in text
