"""STP: messages between authenticated nodes, and the library that devices import.

    async with stp.connect("stp://gw.local:9000", identity="~/.config/stp/device.pem") as session:
        await session.publish("site-a/kitchen/temp", b"21.5", receipt="custody")
        async for message in session.subscribe("site-a/#"):
            ...

The names below are loaded when they are first used, so that `import stp` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stp.batch import Properties
    from stp.client import Client, connect
    from stp.core.errors import StpError, UsageError
    from stp.identity import Identity, IdentityError
    from stp.lines import Rejected, Unreachable
    from stp.outbox import Refused
    from stp.publisher import MessageTooLarge
    from stp.requests import RequestTimeout
    from stp.statistics import ClientStatistics, Ping
    from stp.subscriber import Message, Subscription
    from stp.topics import TopicError

_HOME: Final = {
    "Client": "stp.client",
    "ClientStatistics": "stp.statistics",
    "Identity": "stp.identity",
    "IdentityError": "stp.identity",
    "Message": "stp.subscriber",
    "MessageTooLarge": "stp.publisher",
    "Ping": "stp.statistics",
    "Properties": "stp.batch",
    "Refused": "stp.outbox",
    "Rejected": "stp.lines",
    "RequestTimeout": "stp.requests",
    "StpError": "stp.core.errors",
    "Subscription": "stp.subscriber",
    "TopicError": "stp.topics",
    "Unreachable": "stp.lines",
    "UsageError": "stp.core.errors",
    "connect": "stp.client",
}

__all__ = [
    "Client",
    "ClientStatistics",
    "Identity",
    "IdentityError",
    "Message",
    "MessageTooLarge",
    "Ping",
    "Properties",
    "Refused",
    "Rejected",
    "RequestTimeout",
    "StpError",
    "Subscription",
    "TopicError",
    "Unreachable",
    "UsageError",
    "connect",
]


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'stp' has no attribute {name!r}") from None
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
