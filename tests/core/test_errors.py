"""stp.core.errors: codes survive the wire, errors say who and why."""

from __future__ import annotations

import pytest

from stp.core import errors
from stp.core.errors import ErrorCode, LocalCause, ProtocolError, SessionClosedError


def test_codes_fit_u16_and_unknown_ones_count_as_protocol() -> None:
    assert all(0 <= code <= 0xFFFF for code in ErrorCode)
    assert ErrorCode.of(0x22) is ErrorCode.REVOKED
    assert ErrorCode.of(0x7777) is ErrorCode.PROTOCOL


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ProtocolError, ErrorCode.PROTOCOL),
        (errors.FrameEncodingError, ErrorCode.PROTOCOL),
        (errors.FlowError, ErrorCode.FLOW),
        (errors.LimitError, ErrorCode.LIMIT),
    ],
)
def test_a_protocol_error_carries_its_code(kind: type[ProtocolError], code: ErrorCode) -> None:
    assert kind("x").code is code
    assert kind("x", ErrorCode.AUTH).code is ErrorCode.AUTH
    assert kind("x").code is code


def test_a_closed_session_says_why() -> None:
    error = SessionClosedError(ErrorCode.GOING_AWAY, "1500", by_peer=True)
    assert str(error) == "session closed: GOING_AWAY: 1500"
    assert (error.code, error.reason, error.by_peer) == (ErrorCode.GOING_AWAY, "1500", True)
    assert str(SessionClosedError(LocalCause.DEAD_PEER)) == "session closed: peer does not answer"


def test_a_refusal_has_a_reason_and_a_code() -> None:
    refusal = errors.HandshakeRefused("no", ErrorCode.REVOKED)
    assert (str(refusal), refusal.reason, refusal.code) == ("no", "no", ErrorCode.REVOKED)
    assert errors.HandshakeRefused("no").code is ErrorCode.AUTH
