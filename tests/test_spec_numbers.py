"""The limits of docs/protocol.md are those of the code: where one changes, the other does.

Each row: the rule, the words of it that hold the number, and what the code says.
"""

from __future__ import annotations

import re

import pytest

from stp import batch, control, lanes, link, records, topics
from stp.carriers import door, streams
from stp.core import (
    acks,
    admission,
    congestion,
    crypto_stream,
    flow,
    frames,
    handshake,
    initspace,
    keys,
    packet,
    packetizer,
    params,
    path,
    phases,
    recovery,
    resets,
    session,
    sizing,
    streamset,
    tokens,
    units,
)
from stp.core import streams as core_streams
from stpd import enrol
from stpd.store import base
from tests.test_spec import text

MIB = 1 << 20
DAY = 86_400.0

NUMBERS = [
    ("R-2-5", "window of 8,192 bits", packet.PN_WINDOW, 8192),
    ("R-2-6", "every 256 to 131,072", (packetizer.MIN_SKIP, packetizer.MAX_SKIP), (256, 131_072)),
    ("R-2-9", "at least 21 bytes", packet.MIN_RESET, 21),
    ("R-4-1", "at most 1,024 bytes", params.MAX_HELLO, 1024),
    ("R-4-1", "at most 16 KiB", (handshake.MAX_HANDSHAKE, crypto_stream.MAX_CRYPTO), (16 * 1024, 16 * 1024)),
    ("R-4-5", "at most 16 early", session.MAX_EARLY, 16),
    ("R-4-13", "padded to 1,200", packet.INIT_DATAGRAM, 1200),
    ("R-4-14", "1 to 256 bytes", packet.MAX_TOKEN, 256),
    ("R-4-17", "at most 64 bytes", initspace.MAX_CLOSE_REASON, 64),
    ("R-4-17", "3 PTO after", initspace.LINGER_PTOS, 3),
    ("R-4-18", "initial PTO is 300 ms", initspace.INITIAL_PTO, 0.3),
    ("R-4-18", "max(1 s, 2 RTT)", initspace.MAX_PTO, 1.0),
    ("R-4-18", "end after 10 s", initspace.HANDSHAKE_DEADLINE, 10.0),
    ("R-4-20", "at most three times", initspace.AMPLIFICATION, 3),
    ("R-4-24", "at most 65,536", tokens.MAX_USED, 65_536),
    ("### 4.4", "| 10 s | 24 h, once |", (tokens.RETRY_LIFETIME, tokens.NODE_LIFETIME), (10.0, DAY)),
    (
        "### 4.5",
        "20 handshakes a second, burst 5, 8 half-open",
        (admission.ADDRESS_RATE, admission.ADDRESS_BURST, admission.ADDRESS_HALF_OPEN),
        (20.0, 5.0, 8),
    ),
    (
        "### 4.5",
        "200 handshakes a second per core, 256 half-open",
        (admission.TOTAL_RATE, admission.HALF_OPEN),
        (200.0, 256),
    ),
    ("R-5-1", "n is at most 64", frames.MAX_ACK_RANGES, 64),
    ("R-5-4", "at most 4 active", path.ACTIVE_CIDS, 4),
    ("R-6-1", "max(1 s, PTO)", recovery.MAX_PROBE_INTERVAL, 1.0),
    ("R-6-4", "every second packet", acks.ACK_EVERY, 2),
    ("### 4.1", "max_ack_delay_ms, u16 | 25", acks.MAX_ACK_DELAY, 0.025),
    ("### 4.1", "u32 | 100", streamset.MAX_STREAMS, 100),
    (
        "R-6-5",
        "clamp(pacing rate × 2 ms, 2, 54)",
        (congestion.BURST_TIME, congestion.MIN_BURST_PACKETS, congestion.MAX_BURST_PACKETS),
        (0.002, 2, 54),
    ),
    ("R-6-5", "a quarter of the window", congestion.BURST_SHARE, 4),
    ("R-6-7", "start at 1,200 bytes", sizing.BASE_DATAGRAM, 1200),
    ("## 7.", "| stream 0 | 64 KiB |", flow.CONTROL_WINDOW, 64 * 1024),
    ("## 7.", "to 6 MiB", flow.MAX_WINDOW, 6 * MIB),
    ("R-7-4", "within 30 s", link.RECORD_TIMEOUT, 30.0),
    ("R-7-6", "at most 1,000 reassembly gaps", core_streams.MAX_GAPS, 1000),
    ("R-7-6", "100 streams", streamset.MAX_STREAMS, 100),
    ("R-7-6", "200 unacknowledged", path.MAX_RETIRING, 200),
    ("R-8-2", "one per 100 ms", resets.RESET_INTERVAL, 0.1),
    ("R-8-6", "at most 3 ×", path.AMPLIFICATION, 3),
    ("R-8-8", "max(6 PTO, 5 s)", (path.DEAD_PTOS, path.DEAD_TIME), (6, 5.0)),
    ("R-8-9", "PING after 25 s", path.KEEPALIVE, 25.0),
    ("R-8-9", "between 15 s and 110 s", (path.KEEPALIVE_LEAST, path.KEEPALIVE_MOST), (15.0, 110.0)),
    ("R-8-9", "Three unanswered", path.MAX_UNANSWERED, 3),
    (
        "R-9-1",
        "2^20 packets, 2^36 bytes or one hour",
        (phases.UPDATE_PACKETS, phases.UPDATE_BYTES, phases.UPDATE_SECONDS),
        (1 << 20, 1 << 36, 3600.0),
    ),
    ("R-9-2", "kept for 3", phases.KEEP_PTOS, 3),
    ("R-9-3", "2^23 packets", keys.AES_GCM_SEAL_LIMIT, 1 << 23),
    ("R-9-3", "2^52 (AES-GCM)", keys.AES_GCM_FAIL_LIMIT, 1 << 52),
    ("R-9-3", "2^36 (ChaCha20)", keys.CHACHA_FAIL_LIMIT, 1 << 36),
    ("R-9-3", "last 64", packetizer.CLOSE_RESERVE, 64),
    ("R-9-6", "for 3 PTO", session.CLOSE_PTOS, 3),
    ("R-10-1", "at most 512 bytes", topics.MAX_TOPIC, 512),
    ("### 10.1", "| 1 | command | 64 |", link.LANE_WEIGHTS[1], 64),
    ("### 10.1", "| 2 | event | 32 |", link.LANE_WEIGHTS[2], 32),
    ("### 10.1", "| 3 | telemetry | 16 |", link.LANE_WEIGHTS[3], 16),
    ("### 10.1", "| 4 | bulk | 4 |", link.LANE_WEIGHTS[4], 4),
    ("R-10-3", "one unidirectional stream", lanes.OPENING_BYTES, 2),
    ("R-10-8", "at most 4 MiB", batch.MAX_OPENED, 4 * MIB),
    ("R-10-9", "at most 1 MiB", batch.MAX_MESSAGE, MIB),
    ("R-10-9", "1,113,088", batch.MAX_BATCH, 1_113_088),
    ("R-10-9", "1,114,112", records.MAX_RECORD, 1_114_112),
    ("### 10.3", "u8 hops (≤ 8)", records.MAX_HOPS, 8),
    ("R-10-19", "7 days", base.FORGET_AFTER, 7 * DAY),
    ("R-10-24", "1,024 ranges", base.MAX_RANGES, 1024),
    ("R-10-28", "at most 3 s", link.INTRODUCE_TIMEOUT, 3.0),
    ("R-10-32", "16 KiB", control.MAX_CONTROL, 16 * 1024),
    ("R-11-1", "1 to 65,536 bytes", units.MAX_UNIT, 65_536),
    ("R-11-2", "32 KiB", streams.NOTSENT_LOWAT, 32 * 1024),
    ("R-11-3", "5 s for a started", units.UNIT_TIMEOUT, 5.0),
    ("R-11-3", "64 unauthenticated", door.MAX_UNPROVEN, 64),
    ("R-11-3", "8 per", door.MAX_PER_ADDRESS, 8),
    ("R-11-8", "at most 64 KiB", enrol.MAX_BODY, 64 * 1024),
    ("R-11-8", "5 tries a minute", enrol.TRIES_PER_MINUTE, 5),
]


def said(where: str) -> str:
    """What the text says there, on one line: a rule, or a section down to the next heading."""
    if where.startswith("#"):
        found = re.search(rf"^{re.escape(where)}[ .].*?(?=^##)", text(), re.MULTILINE | re.DOTALL)
    else:
        found = re.search(rf"^\* \*\*{where}\*\*.*?(?=^\S|^$)", text(), re.MULTILINE | re.DOTALL)
    assert found is not None, where
    return " ".join(found[0].split())


@pytest.mark.parametrize(
    ("where", "words", "code", "number"), NUMBERS, ids=[f"{w} {s}" for w, s, _, _ in NUMBERS]
)
def test_text_and_code_name_the_same_number(where: str, words: str, code: object, number: object) -> None:
    assert words in said(where)
    assert code == number
