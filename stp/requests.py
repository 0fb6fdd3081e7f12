"""Request and reply over publish and subscribe: a reply topic of our own and a correlation id (protocol §10).

(1) One inbox per process, `$inbox/<node>/<random>/#`, subscribed before the first request leaves.
(2) A reply that comes after its deadline is counted, and given to nobody.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Final, Literal, Protocol

import trio
from attrs import Factory, define

from stp.batch import Properties
from stp.core.errors import StpError
from stp.subscriber import Message, Subscription

REQUEST_TIMEOUT: Final = 10.0
"""Seconds."""


class Session(Protocol):
    """What a request needs of the client."""

    @property
    def state(self) -> str: ...
    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        receipt: Literal["kept"],
        ttl: float,
        properties: Properties,
    ) -> None: ...
    def subscribe(self, *filters: str) -> Subscription: ...
    def run_in_background(self, function: Callable[..., Awaitable[None]], *args: object) -> None: ...


class RequestTimeout(StpError, TimeoutError):  # noqa: N818 - read as a sentence
    """No reply came in time. Whether the request was carried out is not known."""


@define(eq=False)
class _Pending:
    answered: trio.Event = Factory(trio.Event)
    reply: Message | None = None


class Requests:
    """The requests of one client that wait for their reply (R-10-42)."""

    def __init__(self, client: Session, node: str) -> None:
        self.late = 0
        """Replies that came after their deadline, or that nobody asked for."""
        self._client = client
        self._topic = f"$inbox/{node}/{os.urandom(8).hex()}"
        self._pending: dict[bytes, _Pending] = {}
        self._count = 0
        self._inbox: Subscription | None = None

    async def ask(self, topic: str, payload: bytes, timeout: float) -> Message:
        """Publish, and wait for the reply. Raises RequestTimeout, Refused."""
        self._count += 1
        key = self._count.to_bytes(8, "big")
        pending = self._pending[key] = _Pending()
        properties = Properties(
            reply_topic=f"{self._topic}/{self._count}", correlation_id=key, freshness_ms=round(timeout * 1000)
        )
        try:
            with trio.move_on_after(timeout):
                await self._subscribed()
                await self._client.publish(topic, payload, receipt="kept", ttl=timeout, properties=properties)
                await pending.answered.wait()
        finally:
            del self._pending[key]
        if pending.reply is None:
            raise RequestTimeout(f"no reply to {topic} within {timeout:g} s; {self._client.state}")
        return pending.reply

    async def _subscribed(self) -> None:
        if self._inbox is None:
            self._inbox = self._client.subscribe(f"{self._topic}/#")
            self._client.run_in_background(self._read, self._inbox)
        await self._inbox.confirmed.wait()
        error = self._inbox.error
        if error is not None:
            self._inbox = None  # the next request tries again
            raise error

    async def _read(self, inbox: Subscription) -> None:
        try:
            async for message in inbox:
                key = message.properties.correlation_id if message.properties is not None else None
                pending = self._pending.get(key or b"")
                if pending is None:
                    self.late += 1
                else:
                    pending.reply = message
                    pending.answered.set()
        except StpError:
            pass  # the keeper ended it: each request is told by `inbox.error`
