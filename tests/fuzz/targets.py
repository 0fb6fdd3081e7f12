"""Every door for untrusted bytes, by name. A target is made when it is needed: some hold a handshake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.fuzz import (
    targets_daemon,
    targets_http,
    targets_identity,
    targets_messages,
    targets_packets,
    targets_sessions,
    targets_streams,
)
from tests.fuzz.engine import Target

TARGETS: Final[dict[str, Callable[[], Target]]] = {
    "headers": targets_packets.headers,
    "hello": targets_packets.hello,
    "frames": targets_packets.frame_codec,
    "datagrams": targets_sessions.datagrams,
    "sealed-up": targets_sessions.sealed_by_client,
    "sealed-down": targets_sessions.sealed_by_server,
    "client-hello": targets_streams.client_hello,
    "tls-stranger": targets_streams.tls_stranger,
    "units-up": targets_streams.units_of_client,
    "units-down": targets_streams.units_of_server,
    "unit-stream": targets_streams.unit_stream,
    "link": targets_sessions.link,
    "tokens": targets_identity.tokens,
    "topics": targets_messages.topics,
    "batches": targets_messages.batches,
    "records": targets_messages.records,
    "lane": targets_messages.lane,
    "control": targets_messages.control,
    "echo": targets_messages.echo,
    "pasted": targets_identity.pasted,
    "bundle": targets_identity.bundle,
    "strangers": targets_identity.strangers,
    "requests": targets_identity.requests,
    "enrolment": targets_http.enrolment,
    "config": targets_daemon.configuration,
    "management": targets_http.management,
    "proxy": targets_http.proxy,
}
