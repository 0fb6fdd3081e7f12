"""Who a program of this machine is to the daemon it reaches by a Unix socket: asked before anything else (R-11-5).

The daemon takes the name from what the kernel says of us; its hello tells it (protocol §4.1, types 6 and 7). So a
local program needs no identity, and `connect` can go on as with any other.
"""

from __future__ import annotations

import random
from typing import Final

import trio

from stp.carriers.unix import UnixCarrier
from stp.connection import BACKOFF_CEILING, BACKOFF_FLOOR
from stp.core.errors import ErrorCode
from stp.core.events import SessionClosed
from stp.core.verbs import AnySession
from stp.enrol import IdentitySource, load_identity
from stp.identity import Identity, unix_path
from stp.lines import REFUSALS, Rejected, Unreachable

ASK_TIMEOUT: Final = 5.0
"""Seconds for one answer."""


async def identity_for(
    url: str, identity: IdentitySource | None, node: str, seconds: float
) -> tuple[Identity, str]:
    """Who we are at that URL, and the node name that was asked for, or that a Unix socket's daemon gives.

    Raises IdentityError, and what `local_identity` does.
    """
    path = unix_path(url)
    return await local_identity(path, seconds) if path else (load_identity(identity), node)


async def local_identity(path: str, seconds: float) -> tuple[Identity, str]:
    """Our identity there, and the daemon's node name. Asks until it answers.

    Raises Unreachable after so many seconds, Rejected when it will not have us.
    """
    cause, pause = "", BACKOFF_FLOOR
    with trio.move_on_after(seconds):
        while True:
            try:
                found = await _ask(path)
            except OSError as error:
                cause = error.strerror or str(error)
            else:
                if not isinstance(found, SessionClosed):
                    return found
                cause = found.reason or str(found.code)
                if found.code in REFUSALS:
                    assert isinstance(found.code, ErrorCode)
                    raise Rejected(path, found.code, found.reason, found.by_peer)
            await trio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, BACKOFF_CEILING)
    raise Unreachable(path, seconds, cause)


async def _ask(path: str) -> tuple[Identity, str] | SessionClosed:
    """One session, just for the names. Raises OSError."""
    heard = trio.Event()
    ends: list[SessionClosed] = []

    def on_ready(session: AnySession) -> None:
        while (event := session.next_event()) is not None:
            if isinstance(event, SessionClosed):
                ends.append(event)
        heard.set()

    carrier = await UnixCarrier.dial(path, on_ready=on_ready)
    session = carrier.session
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carrier.run)
            with trio.move_on_after(ASK_TIMEOUT):
                await heard.wait()
            nursery.cancel_scope.cancel()
    finally:
        session.close(ErrorCode.NO_ERROR, "", trio.current_time())
        carrier.close()
    if ends and not (session.own and ends[0].code is ErrorCode.NO_ERROR):
        return ends[0]
    if session.own is None or session.peer is None:
        raise OSError(f"{path} does not answer")
    return Identity.local(*session.own), session.peer.node
