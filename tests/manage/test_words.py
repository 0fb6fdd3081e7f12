"""Status shapes, and the words stpctl finds for them."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs
import pytest

from stpctl.render import clean, count_of, instant, pairs, size, span, table
from stpctl.sentences import describe, lag
from stpd import status
from stpd.status import (
    BufferStatus,
    DaemonStatus,
    EdgeStatus,
    EventRecord,
    LaneLag,
    NewKey,
    QuarantinedRecord,
    ReaderStatus,
    UpstreamStatus,
    from_dict,
    to_dict,
)

NOW = 1_800_000_000_000  # 2027-01-15 08:00 UTC
SHAPES = [cls for cls in vars(status).values() if isinstance(cls, type) and attrs.has(cls)]


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def filled(cls: type) -> Any:
    """An object with a telling value in every field."""
    values: dict[str, Any] = {}
    for n, f in enumerate(attrs.fields(cls)):
        kind = str(getattr(f.type, "__name__", f.type))
        if f.type in (int, float, bool, str):
            values[f.name] = f.type(n + 1)
        elif attrs.has(f.type):
            values[f.name] = filled(f.type)
        elif kind == "list":
            item = f.type.__args__[0]
            values[f.name] = [filled(item)] if attrs.has(item) else ["x"]
        else:
            values[f.name] = {"x": 1}
    return cls(**values)


@pytest.mark.parametrize("cls", SHAPES, ids=lambda cls: cls.__name__)
def test_every_shape_survives_json(cls: type) -> None:
    value = filled(cls)
    assert from_dict(cls, json.loads(json.dumps(to_dict(value)))) == value


@pytest.mark.parametrize("cls", SHAPES, ids=lambda cls: cls.__name__)
def test_neighbouring_versions_understand_each_other(cls: type) -> None:
    """status (2): keys that are new here, or not yet there."""
    data = to_dict(filled(cls))
    required = [f.name for f in attrs.fields(cls) if f.default is attrs.NOTHING]
    assert isinstance(from_dict(cls, {k: data[k] for k in required} | {"from_tomorrow": 1}), cls)


@pytest.mark.parametrize("data", [None, [], "x", 3, {"id": "x"}])
def test_what_is_no_shape_is_a_value_error(data: object) -> None:
    with pytest.raises(ValueError, match="NewKey"):
        from_dict(NewKey, data)


def test_a_new_key_hides_in_repr() -> None:
    assert "hunter2" not in repr(NewKey(id="1", token="hunter2"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.02, "20 ms"),
        (1, "1 s"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (11_520, "3 h 12 min"),
        (90_000, "1 d 1 h"),
        (-5, "0 ms"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_600, "1.00 MB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_instants_have_a_date_where_it_is_another_day() -> None:
    assert instant(NOW - 1000, NOW) == "07:59:59"
    assert instant(NOW - 86_400_000, NOW) == "2027-01-14 08:00"
    assert instant(0, NOW) == "never"


def test_counts_have_their_plural() -> None:
    assert [count_of(n, "message") for n in (0, 1, 2000)] == ["0 messages", "1 message", "2,000 messages"]


def test_tables_align_and_numbers_stand_right() -> None:
    text = table(["name", "n"], [("a", 5), ("bcd", 1000)])
    assert text.splitlines() == ["NAME     N", "a        5", "bcd   1000"]
    assert table(["name", "n"], []) == "NAME  N"
    assert pairs([("a", 1), ("long", "x")]) == "a     1\nlong  x"


@pytest.mark.parametrize("bad", ["\x1b[2J", "a\nb", "\x9b31m", "\u202eevil"])
def test_names_cannot_drive_the_terminal(bad: str) -> None:
    """render (1)."""
    shown = clean(bad) + table(["x"], [(bad,)]) + pairs([("x", bad)])
    shown += "".join(describe(DaemonStatus(node=bad, role="hub", reasons=[bad], now_ms=NOW)))
    shown += lag(EdgeStatus(node=bad, reported_messages=1, reported_cause=bad), NOW)
    assert not any(ord(c) in (0x1B, 0x9B, 0x202E) for c in shown)
    assert "a\nb" not in shown


# Sentences ---------------------------------------------------------------------------------------------


def daemon(**more: Any) -> DaemonStatus:
    values: dict[str, Any] = {
        "role": "gateway",
        "node": "edge-1",
        "domain": "example.net",
        "version": "0.1.0",
        "ready": True,
        "now_ms": NOW,
        "started_ms": NOW - 11_520_000,
        "sessions": 12,
        "buffer": BufferStatus(used_bytes=12_300_000, budget_bytes=10**9, oldest_age_s=300),
        "upstreams": [UpstreamStatus(node="hub-1", state="connected", since_ms=NOW - 60_000, rtt_ms=12.34)],
        "certificate_not_after_ms": NOW + 30 * 86_400_000,
    }
    return DaemonStatus(**values | more)


def test_a_good_day() -> None:
    assert describe(daemon()) == [
        "Gateway edge-1 (example.net): ready, up 3 h 12 min, 12 sessions, stpd 0.1.0.",
        "Uplink hub-1: connected since 07:59:00, round trip 12.3 ms; level.",
        "Buffer: 12.3 MB of 1.00 GB used (1 %), the oldest message 5 min old.",
        "Ledger: every message is accounted for.",
    ]


def test_an_uplink_that_is_away() -> None:
    away = UpstreamStatus(
        node="hub-1",
        state="waiting",
        since_ms=NOW - 600_000,
        behind_messages=1234,
        behind_bytes=1_200_000,
        behind_since_ms=NOW - 590_000,
        oldest_age_s=595,
        last_error="no answer",
        next_attempt_ms=NOW + 12_000,
    )
    assert describe(daemon(upstreams=[away]))[1] == (
        "Uplink hub-1: waiting since 07:50:00; behind by 1,234 messages (1.20 MB), the oldest 9 min 55 s old, "
        "since 07:50:10; because: no answer; next attempt in 12 s."
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"upstreams": []}, "No uplink is configured: nothing goes up from here."),
        (
            {"draining": True},
            "Gateway edge-1 (example.net): draining, up 3 h 12 min, 12 sessions, stpd 0.1.0.",
        ),
        ({"unexplained": 5}, "Ledger: 5 messages are UNEXPLAINED: stpctl ledger show."),
        (
            {"edges": 4, "edges_connected": 3, "edges_behind": 1},
            "Edges: 3 of 4 connected; 1 behind: stpctl edges lag.",
        ),
        ({"readers": 2}, "Readers: 2, all level."),
        ({"readers": 2, "readers_behind": 1}, "Readers: 2; 1 behind: stpctl readers list."),
        ({"reasons": ["no commit for 12 s"]}, "Attention: no commit for 12 s."),
        ({"certificate_not_after_ms": NOW + 86_400_000}, "The certificate ends in 1 d: stpd renew."),
        ({"certificate_not_after_ms": NOW - 1}, "The certificate has ENDED: stpd renew."),
        ({"clock_synchronised": False}, "The clock is not synchronised."),
        ({"log_drops": 1}, "The log lost 1 line: whoever reads it is too slow."),
        (
            {
                "buffer": BufferStatus(
                    used_bytes=10,
                    budget_bytes=10,
                    full=True,
                    full_since_ms=NOW - 60_000,
                    full_cause="hub-1 is away",
                ),
                "reasons": ["the store is full: hub-1 is away"],
            },
            "The store is FULL since 07:59:00: publishers are held back, nothing kept is lost: hub-1 is away.",
        ),
        (
            {
                "buffer": BufferStatus(
                    quarantined_records=2,
                    quarantined=[QuarantinedRecord(lane=3, reason="corrupt", peer="edge-9")],
                )
            },
            "Quarantine: 2 records, the newest from edge-9 (corrupt): stpctl buffer show.",
        ),
    ],
)
def test_what_is_out_of_order_has_its_line(change: dict[str, Any], line: str) -> None:
    """The line is there, and the same thing is not said twice."""
    told = describe(daemon(**change))
    assert line in told
    assert not any(line not in one and "Attention" in one for one in told)
    assert line not in describe(daemon())


def test_lag_of_an_edge_that_is_away() -> None:
    away = EdgeStatus(
        node="edge-2",
        last_seen_ms=NOW - 7_200_000,
        behind_messages=12,
        behind_bytes=3400,
        oldest_age_s=61,
        reported_messages=9,
        reported_bytes=900,
        reported_oldest_age_s=2,
        reported_ms=NOW - 7_200_000,
        reported_cause="the link was slow",
    )
    assert lag(away, NOW) == (
        "edge-2: away since 06:00:00, down: behind by 12 messages (3.40 kB), the oldest 1 min 1 s old; "
        "up: behind by 9 messages (900 B), the oldest 2 s old (as it said at 06:00:00), because the link was slow."
    )
    assert lag(EdgeStatus(node="edge-1", connected=True), NOW) == "edge-1: connected, level."


def test_defaults_of_shapes_are_not_shared() -> None:
    one, two = ReaderStatus(name="a"), ReaderStatus(name="b")
    one.lanes.append(LaneLag(lane=1))
    assert two.lanes == []
    assert EventRecord(time_ms=1, kind="x").fields == {}
