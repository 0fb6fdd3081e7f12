"""The specification is enough: a client that was written from docs/protocol.md alone talks to a real stpd.

(1) Nothing here but the tests' own oracle comes from stp, stpd or stpctl.
(2) Handshake with Retry, hybrid group and exporter keys; HELLO; records kept; live subscription; CLOSE.
(3) The same through loss in both directions.
(4) Who is a stranger hears nothing, and who is not who it should be is not talked to.
(5) Inside TLS on TCP sessions are as §11 says.
"""

from __future__ import annotations

import ast
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
import trio

import stp
from bench.fleet import Fleet, Node
from stp.core.errors import ErrorCode
from stp.core.events import Connected
from tests.carrier_kit import EDGE, HUB, Owner, listening
from tests.identity_kit import shared
from tests.second import frames
from tests.second.client import Client
from tests.second.keys import InitialKeys
from tests.second.session import Session
from tests.second.stream_session import StreamSession
from tests.second.streams import Closed
from tests.second.tls import Bundle

HERE = Path(__file__).parent
ALLOWED = sys.stdlib_module_names | {"cryptography", "OpenSSL", "backports", "compression"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Fleet(tmp_path_factory.mktemp("second") / "fleet") as fleet:
        hub = fleet.hub("hub-1")
        made = fleet.gateway("edge-1", upstream=hub)
        hub.start()
        made.start()
        yield made


class Second(Protocol):
    def __call__(
        self, node: str, seed: int = 0, loss: float = 0.0, token: bytes = b""
    ) -> Client[Session]: ...


@pytest.fixture
def second(gateway: Node) -> Iterator[Second]:
    """Makes clients that lose this part of their datagrams in either direction."""
    made: list[Client[Session]] = []

    def make(node: str, seed: int = 0, loss: float = 0.0, token: bytes = b"") -> Client[Session]:
        dice = random.Random(seed)
        bundle = Bundle(gateway.fleet.device(node, gateway))
        made.append(Client(Session(bundle, token=token, drop=lambda: dice.random() < loss)))
        return made[-1]

    yield make
    for client in made:
        client.session.abandon()


@pytest.mark.parametrize("path", sorted(HERE.glob("*.py")), ids=lambda path: path.name)
def test_it_shares_nothing_with_us(path: Path) -> None:
    """Promise (1). The tests themselves need our library: as the other end."""
    if path.name.startswith("test_"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert name.split(".")[0] in ALLOWED or name.startswith("tests.second."), name


def closed(gateway: Node, node: str) -> list[str]:
    """What the gateway's log says of this node's sessions that ended."""
    return [line for line in gateway.tail(50).splitlines() if '"session_closed"' in line and node in line]


async def exchange(client: Client[Session], gateway: Node, size: int, count: int, rounds: int = 1) -> None:
    """Both ways between the second client and our own library, at the same gateway; all of it, in order.

    A round is less than a lane's window: a live subscriber that does not take more would miss it.
    """
    payload = random.Random(1).randbytes(size)
    identity = gateway.fleet.device("ours", gateway)
    async with stp.connect(gateway.url, identity=identity) as ours, trio.open_nursery() as nursery:
        heard: list[tuple[str, bytes]] = []

        async def listen(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            messages = ours.subscribe("second/#")
            task_status.started()
            async for message in messages:
                heard.append((message.topic, message.payload))  # noqa: PERF401

        await nursery.start(listen)

        def hello() -> None:
            client.start()
            client.subscribe(["ours/#"])
            client.wait_kept(*client.publish([("second/ready", b"")]))

        await trio.to_thread.run_sync(hello)
        for number in range(1, rounds + 1):

            def talk(total: int = number * count) -> None:
                pairs = [("a", payload), ("b", b"")]
                places = [
                    client.publish([(f"second/{n}/{ab}", data) for ab, data in pairs])
                    for n in range(total - count, total)
                ]
                client.wait_kept(*places[-1], timeout=30.0)
                client.until(lambda: len(client.received) == total, timeout=30.0)

            with trio.fail_after(20):
                for n in range((number - 1) * count, number * count):
                    await ours.publish(f"ours/{n}", payload)
            await trio.to_thread.run_sync(talk)
        total = rounds * count
        assert [(m.topic, m.payload) for m in client.received] == [
            (f"ours/{n}", payload) for n in range(total)
        ]
        with trio.fail_after(20):
            while len(heard) < 2 * total:
                await trio.sleep(0.01)
        expected = [(f"second/{n}/{ab}", payload if ab == "a" else b"") for n in range(total) for ab in "ab"]
        assert [pair for pair in heard if pair[0] != "second/ready"] == expected
        nursery.cancel_scope.cancel()


@pytest.mark.real
@pytest.mark.slow
async def test_it_connects_publishes_receives_and_closes(second: Second, gateway: Node) -> None:
    """Promise (2). More than a lane's first window goes either way, so that credit must be given and taken."""
    client = second("second-1")
    session = client.session
    await exchange(client, gateway, size=40_000, count=10, rounds=3)
    assert session.counts["retry"] == 1
    assert session.group == "X25519MLKEM768"
    assert client.sources == {bytes.fromhex(client.hello["store"])}, "R-10-34"
    assert client.hello["node"] == "edge-1"
    assert client.hello["kind"] == "gateway"
    assert set(session._peer_cids) >= {0, 1, 2, 3}
    assert session.token
    client.close()
    with trio.fail_after(5):
        while not (gone := closed(gateway, "second-1")):
            await trio.sleep(0.02)
    assert len(gone) == 1
    assert '"NO_ERROR"' in gone[0]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_it_survives_loss(second: Second, gateway: Node, seed: int) -> None:
    """Promise (3): a tenth of the datagrams is lost in either direction, those of the handshake too."""
    client = second(f"lossy-{seed}", seed, loss=0.1)
    await exchange(client, gateway, size=3000, count=20)
    assert client.session.counts["dropped"] > 5
    client.close()


@pytest.mark.real
def test_a_token_of_an_earlier_session_spares_the_retry_once(second: Second) -> None:
    """R-4-22, R-4-23: a used one counts as none, and draws a Retry."""
    token = b""
    for retries in (1, 0, 1):
        client = second("returning", token=token)
        client.start()
        assert client.session.counts["retry"] == retries
        client.until(lambda client=client: bool(client.session.token))  # type: ignore[misc]
        token = token if retries == 0 else client.session.token
        client.close()


@pytest.mark.real
def test_it_updates_its_keys_and_the_gateway_follows(second: Second) -> None:
    """R-9-2, twice: whitening and numbers go on, both directions move, and records are kept in every phase."""
    client = second("updating")
    client.start()
    for phase in (0, 1, 0):
        client.wait_kept(*client.publish([("second/update", b"x" * 3000)]))
        client.until(client.session.settled)
        assert client.session.phases == (phase, phase)
        with pytest.raises(TimeoutError):
            client.until(lambda: False, timeout=3 * client.session.pto)
        client.session.update_keys()
    assert client.session.counts["not opened"] == 0
    client.close()


@pytest.mark.real
def test_it_moves_to_another_port_and_the_gateway_follows(second: Second) -> None:
    """R-8-6, R-8-7: the same session goes on, validated by an answer from the new port."""
    client = second("moving")
    client.start()
    for challenged in (False, True, True):
        client.wait_kept(*client.publish([("second/move", b"x" * 3000)]))
        client.until(client.session.settled)
        assert bool(client.session.counts["challenges"]) == challenged
        client.session.rebind()
    assert client.session.counts["retry"] == 1
    client.close()


@pytest.mark.real
def test_the_wrong_network_key_meets_silence(second: Second) -> None:
    """Promise (4), R-3-6: not one datagram comes back, for a whole probe timeout and more."""
    client = second("stranger")
    client.session._initial = InitialKeys(client.session._dcid, b"x" * 32)
    with pytest.raises(TimeoutError):
        client.session.connect(timeout=0.7)
    assert client.session.counts["retry"] == 0
    assert client.session.counts["timeouts"] >= 1
    assert client.session.counts["not opened"] == 0
    assert not client.session._init.received.ranges


@pytest.mark.real
def test_a_name_that_is_not_the_certificates_ends_the_dial(second: Second) -> None:
    """Promise (4), R-4-8."""
    client = second("mistaken")
    client.session.bundle.upstream_node = "hub-1"
    with pytest.raises(Closed, match="not hub-1"):
        client.start()
    assert client.session._keys is None


@pytest.mark.real
def test_a_break_of_the_text_closes_with_its_code(second: Second) -> None:
    """R-2-6 at the other end: an ACK of what was never sent draws CLOSE(PROTOCOL)."""
    client = second("liar")
    client.start()
    client.session._data.queue.append(frames.write_ack([(1 << 40, (1 << 40) + 1)]))
    with pytest.raises(Closed) as caught:
        client.until(lambda: False, timeout=5.0)
    assert caught.value.code == 0x0A


# -- TLS on TCP (R-11-1)


@pytest.fixture
def edge(tmp_path: Path) -> Callable[[int], StreamSession]:
    """Dials a TLS listener on this port."""

    def dial(port: int, node: str = HUB) -> StreamSession:
        path = tmp_path / "edge.pem"
        path.write_bytes(shared().bundle(EDGE, upstream=(node, f"stp://127.0.0.1:{port}", 0.0)))
        return StreamSession(Bundle(path), ("127.0.0.1", port))

    return dial


@pytest.mark.real
async def test_a_session_in_tls_gives_back_what_it_is_sent(edge: Callable[..., StreamSession]) -> None:
    """Promise (5). Twice a stream's first window each way, with credit; hello, session id and CLOSE agree."""
    owner = Owner(echo=True)
    sent = random.Random(2).randbytes(1 << 20)
    async with listening(owner) as (_, port):
        session = edge(port)

        def talk() -> bytes:
            session.connect()
            stream = session.streams.open_stream()
            session.streams.write(stream, sent)
            came = bytearray()
            deadline = time.monotonic() + 20
            while len(came) < len(sent) and time.monotonic() < deadline:
                session.step(0.1)
                for number in session.streams.incoming:
                    came += session.streams.take(number, 1 << 20)
            session.close()
            return bytes(came)

        assert await trio.to_thread.run_sync(talk) == sent
        closed = await owner.closed()
        assert (closed.code, closed.by_peer) == (ErrorCode.NO_ERROR, True)
        (ours,) = owner.sessions
        assert ours.peer is not None
        assert (ours.peer.node, ours.id) == (EDGE, session.id)


@pytest.mark.real
async def test_in_tls_another_name_ends_the_dial(edge: Callable[..., StreamSession]) -> None:
    """Promise (4), R-4-8: its Finished never leaves, so the listener never believes in it."""
    owner = Owner()
    async with listening(owner) as (_, port):
        session = edge(port, "hub-2")
        with pytest.raises(Closed, match="not hub-2"):
            await trio.to_thread.run_sync(session.connect)
        session.abandon()
        assert not owner.of(Connected)
