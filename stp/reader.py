"""A subscription with a session of its own: durable, or starting in the past (protocol §10).

A lane does not say for which subscription a record is. Where every record counts it must be known, so such a
subscription shares its session with no other.
"""

from __future__ import annotations

import os
from typing import Final

import trio

from stp.control import Subscribe
from stp.dialler import Dialler
from stp.lines import Owner
from stp.link import Link, LinkEvent, RecordReceived, SubscribedReceived
from stp.outbox import Refused
from stp.subscriber import Inbox, Replier, Subscription

KEEPALIVE: Final = 5.0
"""Seconds of silence until it asks whether the keeper lives: who only listens hears of a restart in no other way."""


class Reader:
    """Runs one subscription's session."""

    def __init__(self, dialler: Dialler, replier: Replier, wanted: Subscribe, *, manual: bool) -> None:
        self.wanted = wanted
        self._connection = dialler.connection(
            os.urandom(16),
            Owner(
                up=self._on_up,
                event=self._on_event,
                down=self._on_down,
                idle=self._on_idle,
                move=self._on_move,
            ),
            keepalive=KEEPALIVE,
        )
        self.inbox = Inbox(replier, self._connection.wake, once=True)
        self.subscription = Subscription(wanted, self.inbox, manual, self._close)
        self.inbox.add(self.subscription)
        self._over, self._done = trio.Event(), trio.Event()

    async def run(self) -> None:
        """Until the subscription is closed. What the keeper or a handshake refuses, the iterator raises."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._dial)
                await self._over.wait()
                await self._connection.aclose()
                nursery.cancel_scope.cancel()
        finally:
            self._done.set()

    async def aclose(self) -> None:
        """Close the subscription, and wait until `run` has said goodbye to the keeper."""
        await self.subscription.aclose()
        await self._done.wait()

    async def _dial(self) -> None:
        await self._connection.run()
        rejected = self._connection.rejected
        if rejected is not None:
            self.subscription.fail(Refused(0, str(rejected), " ".join(self.wanted.filters)))

    def _close(self, subscription: Subscription) -> None:
        self.inbox.remove(subscription)
        self._over.set()

    def _on_up(self, link: Link) -> None:
        self.inbox.attach(link)

    def _on_move(self, link: Link) -> None:
        self.inbox.move(link)

    def _on_down(self) -> None:
        self.inbox.detach()

    def _on_event(self, link: Link, event: LinkEvent) -> None:
        if isinstance(event, RecordReceived):
            self.inbox.on_record(event, link)
        elif isinstance(event, SubscribedReceived):
            self.inbox.on_subscribed(event.subscribed)

    def _on_idle(self) -> None:
        self.inbox.flush(trio.current_time())
