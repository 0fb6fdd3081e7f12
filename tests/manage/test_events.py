"""Promises of stpd.events, and of the stream that the management API makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from stpd import api
from stpd.events import MAX_WATCHERS
from tests.identity_kit import DOMAIN
from tests.manage.asker import Asker, connect, lines, until, watch
from tests.manage.daemon_double import Double, opened, operator_bundle, server_context, serving


async def test_events_arrive_in_order(tmp_path: Path) -> None:
    double = Double()
    async with serving(double) as (_, port):
        client = await connect(port, tmp_path, operator_bundle("viewer"))
        await watch(client)
        for n in range(3):
            double.bus.publish("session.open", f"number {n}", node="edge-1", n=n)
        seen = lines(client)
        for n in range(3):
            event = await anext(seen)
            assert (event["kind"], event["text"], event["fields"]) == (
                "session.open",
                f"number {n}",
                {"n": n},
            )
        await seen.aclose()
        await client.stream.aclose()
        await until(lambda: not double.bus.statistics().watchers)


async def test_a_slow_watcher_misses_some_and_is_told(tmp_path: Path) -> None:
    """api (6), events (2)."""
    double = Double()
    double.bus.queue_limit = 4
    async with serving(double) as (_, port):
        client = await connect(port, tmp_path)
        await watch(client)
        seen = lines(client)
        for n in range(10):  # at one go: the watcher cannot take any meanwhile
            double.bus.publish("session.open", str(n))
        assert [(await anext(seen))["text"] for _ in range(4)] == ["0", "1", "2", "3"]
        gap = await anext(seen)
        assert (gap["kind"], gap["fields"]) == ("dropped", {"count": 6})
        double.bus.publish("session.open", "10")
        assert (await anext(seen))["text"] == "10"
        await seen.aclose()


async def test_a_gap_is_told_where_it_is() -> None:
    """events (2): in place, with the number."""
    double = Double()
    double.bus.queue_limit = 2
    watcher = double.events()
    for n in range(5):
        double.bus.publish("session.open", str(n))
    got = [await watcher.receive() for _ in range(3)]
    assert [e.kind for e in got] == ["session.open", "session.open", "dropped"]
    assert got[2].fields == {"count": 3}
    double.bus.publish("session.open", "5")
    assert (await watcher.receive()).text == "5"
    assert double.bus.statistics().dropped == 3
    watcher.close()
    watcher.close()
    assert double.bus.statistics().watchers == 0


async def test_watchers_are_bounded(tmp_path: Path) -> None:
    double = Double()
    watchers = [double.events() for _ in range(MAX_WATCHERS)]
    async with serving(double) as (_, port):
        client = await connect(port, tmp_path)
        status, answer = await client.ask("GET", "/v1/events")
        assert (status, answer["error"]["code"]) == (503, "busy")
        watchers[0].close()
        await watch(client)


async def test_shutting_down_ends_event_streams_properly(tmp_path: Path) -> None:
    """The client sees the end of the answer, not a broken line."""
    got: list[Any] = []

    async def read(client: Asker, task_status: Any) -> None:
        await watch(client)
        task_status.started()
        got.extend([event async for event in lines(client)])
        got.append("ended")

    async with trio.open_nursery() as nursery:
        server = api.ManagementServer(managed=Double(), context=server_context, domain=DOMAIN)
        serving_scope = trio.CancelScope()

        async def serve(task_status: Any) -> None:
            with serving_scope:
                await server.serve("127.0.0.1", 0, task_status=task_status)

        address = await nursery.start(serve)
        client = await connect(int(address.rpartition(":")[2]), tmp_path)
        await nursery.start(read, client)
        serving_scope.cancel()
    assert got == ["ended"]
    await trio.aclose_forcefully(opened.pop())


async def test_a_quiet_stream_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "EVENT_HEARTBEAT", 0.02)
    async with serving(Double()) as (_, port):
        client = await connect(port, tmp_path)
        await watch(client)
        with trio.fail_after(5):
            assert (await client.event()).data == b"\n"
