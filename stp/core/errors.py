"""Error codes and exceptions of STP (protocol §9).

An exception says who is to blame: `UsageError` the caller, `ProtocolError` the peer (the session closes with
its code), `PacketError` nobody we could name (the packet is dropped in silence and counted).
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ErrorCode(IntEnum):
    """Codes of CLOSE frames, u16 on the wire (protocol §9)."""

    NO_ERROR = 0x00
    FLOW = 0x03
    LIMIT = 0x04
    PROTOCOL = 0x0A
    KEY_UPDATE = 0x0E
    AEAD_LIMIT = 0x0F
    RESTARTING = 0x10
    GOING_AWAY = 0x11
    REPLACED = 0x12
    PATH = 0x13
    AUTH = 0x20
    EXPIRED = 0x21
    REVOKED = 0x22

    @classmethod
    def of(cls, value: int) -> ErrorCode:
        """The code of that value; one that we do not know counts as PROTOCOL."""
        try:
            return cls(value)
        except ValueError:
            return cls.PROTOCOL


class LocalCause(StrEnum):
    """Why a session ended without a word from the peer. Never on the wire."""

    IDLE_TIMEOUT = "idle timeout"
    HANDSHAKE_TIMEOUT = "handshake timeout"
    DEAD_PEER = "peer does not answer"
    RESET_BY_PEER = "peer has lost the session"
    CONNECTION_LOST = "connection lost"
    """The stream that carried the session broke or ended without CLOSE."""


class StpError(Exception):
    """The root of everything that stp raises on purpose."""


class UsageError(StpError):
    """The caller asked for what the state forbids. Nothing was sent."""


class ProtocolError(StpError):
    """The peer broke STP. The session closes with `code`; the process lives on."""

    code: ErrorCode = ErrorCode.PROTOCOL

    def __init__(self, message: str, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class FrameEncodingError(ProtocolError):
    """Bytes that are no frame, hello or parameter list."""


class FlowError(ProtocolError):
    """More bytes than the credit allows (protocol §7, R-7-5)."""

    code = ErrorCode.FLOW


class LimitError(ProtocolError):
    """A limit of the protocol, not of credit, was exceeded."""

    code = ErrorCode.LIMIT


class PacketError(StpError):
    """A packet that is short, foreign or does not open: dropped without answer, log line or state (R-2-7)."""


class HandshakeRefused(StpError):  # noqa: N818 - it is the answer of a side, not a fault
    """One of the two sides refuses the other; the handshake is over (protocol §4)."""

    def __init__(self, reason: str, code: ErrorCode = ErrorCode.AUTH, *, by_peer: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.by_peer = by_peer


class SessionClosedError(StpError):
    """The session is no longer there."""

    def __init__(self, code: ErrorCode | LocalCause, reason: str = "", by_peer: bool = False) -> None:
        name = code.name if isinstance(code, ErrorCode) else code.value
        super().__init__(f"session closed: {name}{': ' + reason if reason else ''}")
        self.code = code
        self.reason = reason
        self.by_peer = by_peer


class MessageError(StpError):
    """A topic, batch or record that breaks the rules of protocol §10."""


class CorruptError(MessageError):
    """A batch or record whose bytes were damaged or do not add up."""
