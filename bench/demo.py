"""`make demo`: one hub, one gateway, three devices, a file on its way, and a hub that dies in the middle.

Everything is real: the commands, the processes, the readings of this host, the SIGKILL. The subscriber counts by
itself, from numbers that the devices put into their messages; the ledger is asked afterwards whether it agrees.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from bench import readings
from bench.demo_check import Bulk, Counter, Tally
from bench.demo_fleet import BIN, Failed, Fleet, free_ports
from stp.client import Client, Message, connect
from stp.core.errors import StpError

SENSORS: Final[dict[str, Callable[[], readings.Reading]]] = {
    "load": readings.load,
    "memory": readings.memory,
    "disk": readings.disk,
}
SECONDS_LIVE: Final = 5
SECONDS_DEAD: Final = 5
SECONDS_AFTER_MOST: Final = 12
DRAIN_TIMEOUT: Final = 20.0
"""Seconds in which everything that was sent must have arrived at the end."""
LOOK_EVERY: Final = 0.5
CHUNK: Final = 64 * 1024
CHUNKS_A_SECOND: Final = 20
MAX_FILE: Final = 24 * 1024 * 1024
"""Bytes of the file that are sent at most: the demo is to end within a minute."""
COLUMNS: Final = "{:>3}   {:<22}{:<21}{:<21}{:<15}{:>8}   {}"
COLOURS: Final = {"up": 32, "dead": 31, "back": 32}


class Demo:
    """The story, and what it knows."""

    def __init__(self, home: Path) -> None:
        self.fleet = Fleet(home)
        self.home = home
        hub, hub_enrol, hub_api, hub_web, edge, edge_enrol, edge_api, edge_web = free_ports(8)
        self.hub = f"--listen 127.0.0.1:{hub} --enrol 127.0.0.1:{hub_enrol}"
        self.hub += f" --management 127.0.0.1:{hub_api} --health 127.0.0.1:{hub_web}"
        self.edge = f"--listen 127.0.0.1:{edge} --enrol 127.0.0.1:{edge_enrol}"
        self.edge += f" --management 127.0.0.1:{edge_api} --health 127.0.0.1:{edge_web}"
        self.hub_url, self.edge_url = f"stp://hub@127.0.0.1:{hub}", f"stp://edge@127.0.0.1:{edge}"
        self.hub_enrol, self.edge_enrol, self.edge_api = hub_enrol, edge_enrol, edge_api
        self.fleet.health = {"hub": hub_web, "edge": edge_web}
        self.tally = Tally({f"{name}/reading": Counter() for name in SENSORS})
        self.bulk = Bulk(chosen_file(), MAX_FILE, CHUNK)
        self.publishing = True
        self.sending_file = trio.Event()
        self.seconds = 0
        self.hub_state = "up"

    # -- the fleet

    async def build(self) -> None:
        run = self.fleet.command
        await run(
            f"stpd init hub --name hub --dir hub --no-context {self.hub}",
            shown="stpd init hub --name hub --dir hub",
        )
        await self.fleet.start("hub", "stpd run --config hub/hub.toml")
        token = await self._token("gateway", 1)
        await run(
            f"stpd join {token} --hub 127.0.0.1:{self.hub_enrol} --name edge --dir edge {self.edge}",
            shown=f"stpd join {token[:14]}… --hub 127.0.0.1:{self.hub_enrol} --name edge --dir edge",
        )
        context = json.loads((self.home / "hub" / "context.json").read_text())
        context |= {"name": "edge", "node": "edge", "url": f"https://127.0.0.1:{self.edge_api}"}
        (self.home / "edge" / "context.json").write_text(json.dumps(context))
        await self.fleet.start("edge", "stpd run --config edge/gateway.toml")
        device, application = await self._token("device", 0), await self._token("app", 1)
        await self._join(device, "load", self.edge_enrol)
        async with trio.open_nursery() as nursery:
            for name in ("memory", "disk", "camera"):
                nursery.start_soon(self._join, device, name, self.edge_enrol)
            nursery.start_soon(self._join, application, "desk", self.hub_enrol)

    async def _token(self, role: str, uses: int) -> str:
        line = f"stpctl --context hub/context.json keys create --role {role} --uses {uses}"
        return (await self.fleet.command(line, shown=f"stpctl keys create --role {role}")).strip()

    async def _join(self, token: str, name: str, port: int) -> None:
        await self.fleet.command(
            f"stp join {token} --host 127.0.0.1:{port} --name {name} --out {name}.pem",
            shown=f"stp join {token[:14]}… --host 127.0.0.1:{port} --name {name}",
        )

    # -- devices, which speak to the gateway

    async def sensor(self, name: str, read: Callable[[], readings.Reading]) -> None:
        """One reading a second, numbered; and an answer to whoever asks."""
        topic = f"{name}/reading"
        async with (
            connect(self.edge_url, identity=self.home / f"{name}.pem") as session,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._answer, session, name)
            while self.publishing:
                text, figures = read()
                number = self.tally.counters[topic].next()
                await session.publish(
                    topic, json.dumps({"n": number, "text": text, **figures}).encode(), receipt="kept"
                )
                await trio.sleep(1.0)
            nursery.cancel_scope.cancel()

    async def _answer(self, session: Client, name: str) -> None:
        async for question in session.subscribe(f"cmd/edge/{name}/#"):
            await question.reply(f"{os.uname().nodename}, {os.uname().release}, up {uptime()}".encode())

    async def camera(self) -> None:
        """One real file, in pieces."""
        async with connect(self.edge_url, identity=self.home / "camera.pem") as session:
            await self.sending_file.wait()
            for piece in self.bulk.pieces():
                await session.publish(f"camera/bulk/{self.bulk.path.name}", piece)
                await trio.sleep(1 / CHUNKS_A_SECOND)
            await session.drain(DRAIN_TIMEOUT)

    # -- the application, which speaks to the hub

    async def desk(self, session: Client) -> None:
        """A durable subscription: what it misses while the hub is dead waits for it there, or at the edge."""
        async for message in session.subscribe(
            "+/reading", "camera/bulk/#", durable="desk", start="earliest"
        ):
            self.take(message)

    def take(self, message: Message) -> None:
        if message.topic in self.tally.counters:
            reading = json.loads(message.payload)
            self.tally.counters[message.topic].arrived(reading["n"], reading["text"])
        else:
            self.bulk.arrived(message.payload)

    # -- what people see

    def head(self) -> None:
        print()
        print(bold(COLUMNS.format("", "arrived at the desk:", "", "", "", "waiting", "").rstrip()))
        print(bold(COLUMNS.format("s", *SENSORS, "file", "at edge", "hub")))

    async def show(self, seconds: int, *, until: Callable[[], bool] = lambda: False) -> None:
        """A row a second, for so long or until it is so."""
        for _ in range(seconds):
            if until():
                return
            began = trio.current_time()
            waiting = await self.waiting()
            self.seconds += 1
            cells = [counter.cell() for counter in self.tally.counters.values()]
            state = coloured(self.hub_state, COLOURS[self.hub_state])
            print(COLUMNS.format(self.seconds, *cells, self.bulk.cell(), waiting, state), flush=True)
            await trio.sleep_until(began + 1.0)

    async def waiting(self) -> str:
        upstreams = await self.fleet.ask("stpctl --context edge/context.json upstreams list")
        return str(upstreams[0]["behind_messages"]) if upstreams else "?"

    async def stpctl(self, node: str, words: str) -> None:
        print()
        print(await self.fleet.command(f"stpctl --context {node}/context.json {words}"), end="", flush=True)

    async def story(self, session: Client) -> None:
        self.head()
        await self.show(SECONDS_LIVE)
        await self.stpctl("hub", "sessions list")
        print("\nThe hub dies, in the middle of a file. The gateway keeps what comes.")
        self.sending_file.set()
        self.head()
        await self.show(2)
        self.fleet.kill("hub")
        self.hub_state = "dead"
        await self.show(SECONDS_DEAD)
        await self.stpctl("edge", "buffer show")
        print()
        await self.fleet.start("hub", "stpd run --config hub/hub.toml")
        self.hub_state = "back"
        self.head()
        await self.show(SECONDS_AFTER_MOST, until=lambda: self.bulk.complete() and not self.tally.behind())
        await self.show(2)
        await self.question(session)

    async def question(self, session: Client) -> None:
        """A command down to a device behind the gateway, and its answer."""
        print("\nA question goes down to a device, its answer comes back up.")
        asked = trio.current_time()
        reply = await session.request("cmd/edge/load/who", b"who are you?", timeout=10.0)
        took = (trio.current_time() - asked) * 1000
        print(f"  cmd/edge/load/who  who are you?  →  {reply.payload.decode()}   ({took:.0f} ms)")

    async def finish(self) -> int:
        """Stop sending, wait for the rest, ask the ledgers. The number of things that are wrong."""
        self.publishing = False
        for _ in range(int(DRAIN_TIMEOUT / LOOK_EVERY)):
            await trio.sleep(LOOK_EVERY)
            if self.tally.complete() and self.bulk.complete():
                break
        await trio.sleep(LOOK_EVERY)  # a repeat would still come
        await self.stpctl("edge", "status")
        await self.stpctl("hub", "ledger show")
        unexplained = 0
        for node in ("edge", "hub"):
            ledger = await self.fleet.ask(f"stpctl --context {node}/context.json ledger show")
            unexplained += abs(ledger["unexplained"]) if ledger else 1
        print()
        for topic, counter in self.tally.counters.items():
            print(f"  {topic:<16} sent {counter.sent:>4}   arrived {len(counter.seen):>4}")
        file = self.bulk
        print(f"  {file.path.name:<16} sent {file.sent:>4}   arrived {len(file.seen):>4}   {file.verdict()}")
        lost, doubled, reordered = self.tally.totals(self.bulk)
        print(
            f"\n{bold(f'lost {lost} duplicated {doubled} reordered {reordered} unexplained {unexplained}')}"
        )
        return lost + doubled + reordered + unexplained + (not self.bulk.intact())

    def what_to_try(self) -> None:
        print(f"\nIt stays up until Ctrl-C. In another terminal:\n  cd {self.home}; export PATH={BIN}:$PATH")
        for line in (
            "stpctl --context hub/context.json status",
            "stpctl --context edge/context.json sessions list -w",
            "stpctl --context hub/context.json events -f",
            "stp sub -i desk.pem '+/reading'",
            "stp request -i desk.pem cmd/edge/load/who hello",
        ):
            print(f"  {line}")


async def run(home: Path, keep: bool) -> int:
    """The whole story. The exit status."""
    demo = Demo(home)
    try:
        await demo.build()
        async with trio.open_nursery() as nursery:
            for name, read in SENSORS.items():
                nursery.start_soon(demo.sensor, name, read)
            nursery.start_soon(demo.camera)
            async with connect(demo.hub_url, identity=home / "desk.pem") as session:
                nursery.start_soon(demo.desk, session)
                await demo.story(session)
                wrong = await demo.finish()
                if keep:
                    demo.publishing = True
                    for name, read in SENSORS.items():
                        nursery.start_soon(demo.sensor, name, read)
                    demo.what_to_try()
                    await trio.sleep_forever()
                nursery.cancel_scope.cancel()
        return 1 if wrong else 0
    finally:
        demo.fleet.stop()


def chosen_file() -> Path:
    """A real file of some megabytes that is on every machine with this environment."""
    import cryptography.hazmat.bindings._rust as rust

    return Path(str(rust.__file__))


def uptime() -> str:
    hours, rest = divmod(int(float(Path("/proc/uptime").read_text().split()[0])), 3600)
    return f"{hours} h {rest // 60} min"


def coloured(text: str, code: int) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


def bold(text: str) -> str:
    return coloured(text, 1)


def causes(error: BaseException) -> list[BaseException]:
    """What is inside nurseries' groups."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for one in error.exceptions for cause in causes(one)]
    return [error]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="stay up afterwards, until Ctrl-C")
    keep = parser.parse_args().keep
    logging.getLogger("stp.client").setLevel(logging.CRITICAL)  # that the hub is gone is no news here
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # trio knows what to do then
    home = Path(tempfile.mkdtemp(prefix="stpd-demo-"))
    print(f"A fleet in {home}, gone when this ends.\n")
    try:
        return trio.run(run, home, keep)
    except BaseException as error:
        found = causes(error)
        if any(isinstance(one, KeyboardInterrupt) for one in found):
            print("\nstopped")
            return 130
        if any(not isinstance(one, Failed | StpError) for one in found):
            raise
        print(f"\ndemo: {found[0]}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
