"""A client of the management API, for tests that look at the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
import trio

from tests.manage.daemon_double import client_context, dial, operator_bundle


class Asker:
    """A client that keeps its connection."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT)

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        lines = [("host", "x"), *headers.items()]
        if body:
            lines.append(("content-length", str(len(body))))
        await self.stream.send_all(self.http.send(h11.Request(method=method, target=path, headers=lines)))
        if body:
            await self.stream.send_all(self.http.send(h11.Data(data=body)))
        await self.stream.send_all(self.http.send(h11.EndOfMessage()))

    async def event(self) -> Any:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(bytes(await self.stream.receive_some(65536)))
        return event

    async def answer(self) -> tuple[int, Any]:
        head = await self.event()
        assert isinstance(head, h11.Response), head
        body = b""
        while isinstance(event := await self.event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
        return head.status_code, json.loads(body)

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        await self.send(method, path, body)
        return await self.answer()


async def connect(port: int, directory: Path, bundle: bytes = b"") -> Asker:
    raw = await dial(port)
    stream = trio.SSLStream(
        raw, client_context(bundle or operator_bundle(), directory), https_compatible=True
    )
    await stream.do_handshake()
    return Asker(stream)


async def until(true: Callable[[], bool]) -> None:
    """Let the server do what it has been given cause for; five seconds at most."""
    with trio.fail_after(5):
        while not true():
            await trio.sleep(0.001)


async def lines(client: Asker) -> Any:
    """The lines of an event stream, one by one; empty ones left out."""
    held = b""
    while isinstance(event := await client.event(), h11.Data):
        *whole, held = (held + event.data).split(b"\n")
        for line in whole:
            if line:
                yield json.loads(line)
    assert isinstance(event, h11.EndOfMessage)


async def watch(client: Asker) -> None:
    await client.send("GET", "/v1/events")
    head = await client.event()
    assert head.status_code == 200
    await client.event()  # the first, empty line: the watcher stands
