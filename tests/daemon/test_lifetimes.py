"""Sessions end with certificates: at notAfter, and when the hub revokes them (R-9-5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from stp.control import Revoked
from stp.core.errors import ErrorCode, HandshakeRefused
from stp.core.events import SessionClosed
from stp.core.handshake import PeerIdentity
from stp.lifetimes import CLOCK_CHECK, Expiry, renew_in
from stp.link import LinkClosed
from stpd.keys import MAX_REVOKED, NodeRegistry
from stpd.lifetimes import Lifetimes
from tests.daemon.world import Client, Keeper, World
from tests.sim import Network

YEAR = 365 * 86400.0


class Clocks:
    """A machine's clocks, and what the kernel says of them."""

    def __init__(self) -> None:
        self.wall, self.boot, self.synchronised = 0.0, 5.0, True

    def expiry(self) -> Expiry:
        return Expiry(synchronised=lambda: self.synchronised, clock=lambda: self.wall, boot=lambda: self.boot)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds


class Watched(Client):
    """A client that says how its sessions ended."""

    def __init__(self, world: World, name: str, keeper: Keeper) -> None:
        super().__init__(world, name, keeper)
        self.ends: list[tuple[object, str]] = []
        world.clients.append(self)

    def _take(self, events: list[object]) -> None:
        self.ends += [(one.code, one.reason) for one in events if isinstance(one, LinkClosed)]
        super()._take(events)

    def on_event(self, event: object) -> None:
        """Nothing but the end counts."""

    @property
    def up(self) -> bool:
        return self.link is not None and self.link.peer is not None


async def test_fault_25_a_session_ends_at_the_peers_not_after(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """lifetimes (1): within the second in which the next look is due, on the boot clock."""
    async with World(tmp_path, seed=1) as world:
        hub = await world.hub()
        device = Watched(world, "sensor-1", hub)
        await world.run(lambda: device.up and bool(hub.sessions.peers), limit=5)
        (peer,) = hub.sessions.peers.values()
        assert peer.session.peer is not None
        clocks = Clocks()
        clocks.wall = peer.session.peer.not_after.timestamp() - 100
        lifetimes = Lifetimes(
            NodeRegistry(tmp_path / "nodes.json"), clocks.expiry(), now=lambda: world.net.now
        )
        lifetimes.check(hub.sessions.peers.values())
        clocks.pass_(99)
        lifetimes.check(hub.sessions.peers.values())
        assert not device.ends
        clocks.pass_(1.01)
        lifetimes.check(hub.sessions.peers.values())
        await world.run(lambda: bool(device.ends), limit=1)
        assert device.ends == [(ErrorCode.EXPIRED, "the certificate of sensor-1 has expired")]
        assert lifetimes.expired == 1


@pytest.mark.parametrize("step", [-30 * 86400.0, 30 * 86400.0])
async def test_fault_41_steps_of_the_wall_clock_end_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock, step: float
) -> None:
    """lifetimes (1), a hundred times to and fro; nor do they keep what is over."""
    async with World(tmp_path, seed=2) as world:
        hub = await world.hub()
        device = Watched(world, "sensor-1", hub)
        await world.run(lambda: device.up and bool(hub.sessions.peers), limit=5)
        (peer,) = hub.sessions.peers.values()
        assert peer.session.peer is not None
        clocks = Clocks()
        clocks.wall = peer.session.peer.not_after.timestamp() - 1000
        expiry = clocks.expiry()
        for n in range(100):
            assert not expiry.over(peer.link)
            clocks.wall += step * (-1) ** n
            clocks.boot += 9
        clocks.wall = 0.0
        clocks.boot += 100
        assert expiry.over(peer.link)


async def test_fault_61_nobody_ends_a_session_by_a_clock_that_is_not_known_to_be_right(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """lifetimes (2): a machine in 1970, or far too late, learns the time, and then the expiry is right."""
    async with World(tmp_path, seed=3) as world:
        hub = await world.hub()
        device = Watched(world, "sensor-1", hub)
        await world.run(lambda: device.up and bool(hub.sessions.peers), limit=5)
        (peer,) = hub.sessions.peers.values()
        assert peer.session.peer is not None
        end = peer.session.peer.not_after.timestamp()
        for wrong in (0.0, end + YEAR):
            clocks = Clocks()
            clocks.synchronised, clocks.wall, peer.link.ends_at = False, wrong, None
            expiry = clocks.expiry()
            assert not expiry.over(peer.link)
            assert expiry.left(peer.link) is None
            clocks.pass_(CLOCK_CHECK)
            clocks.synchronised, clocks.wall = True, end - 50
            assert expiry.left(peer.link) == pytest.approx(50)
            clocks.pass_(50.01)
            assert expiry.over(peer.link)


async def test_fault_25_a_revoked_certificate_ends_its_sessions(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """Here, and at a gateway below that is told; another node's session lives on. lifetimes (1), (2)."""
    async with World(tmp_path, seed=4, loss=0.02) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub)
        registries = [NodeRegistry(tmp_path / f"{name}.json", lambda: 0.0) for name in ("hub", "edge")]
        ends = [Lifetimes(one, Clocks().expiry(), now=lambda: world.net.now) for one in registries]
        assert edge.uplink is not None
        edge.uplink._on_revoked = lambda serials: registries[1].learn(serials)
        good, bad = Watched(world, "sensor-1", edge), Watched(world, "sensor-2", edge)
        await world.run(lambda: good.up and bad.up and len(edge.sessions.peers) == 3, limit=10)
        serial = _serial_of(edge, "sensor-2")
        registries[0].enrol("sensor-2", "device", key="k", serial=serial, not_after=YEAR)
        assert registries[0].revoke("sensor-2", "stolen") == [serial]

        def look() -> bool:
            for lifetimes, keeper in zip(ends, (hub, edge), strict=True):
                lifetimes.check(keeper.sessions.peers.values())
            return bool(bad.ends)

        took = await world.run(look, limit=5)
        assert took < 2.0
        assert bad.ends == [(ErrorCode.REVOKED, "the certificate of sensor-2 was revoked")]
        assert not good.ends
        assert [one.revoked for one in ends] == [0, 1]
        registries[1].save()
        assert NodeRegistry(tmp_path / "edge.json").is_revoked(serial), "the gateway keeps it"


def _serial_of(keeper: Keeper, node: str) -> int:
    (found,) = [one.session.peer for one in keeper.sessions.peers.values() if one.node == node]
    assert found is not None
    return found.serial


async def test_a_keeper_that_connects_is_told_the_whole_list_and_then_only_what_is_new(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """lifetimes (2), (3): 700 serials are three records; a fresh session beside the present one is told nothing."""
    async with World(tmp_path, seed=5) as world:
        hub = await world.hub()
        registry = NodeRegistry(tmp_path / "nodes.json", lambda: 0.0)
        for n in range(700):
            registry.learn({(1 << 150) + n: 1000 + n})
        lifetimes = Lifetimes(registry, Clocks().expiry(), now=lambda: world.net.now)
        edge = await world.gateway("edge-1", hub)
        told: list[dict[int, int]] = []
        assert edge.uplink is not None
        edge.uplink._on_revoked = told.append

        def heard(count: int) -> bool:
            lifetimes.check(hub.sessions.peers.values())
            return sum(map(len, told)) >= count

        await world.run(lambda: heard(700), limit=5)
        assert [len(part) for part in told] == [256, 256, 188]
        registry.learn({7: 2000})
        await world.run(lambda: heard(701), limit=5)
        assert told[-1] == {7: 2000}
        moved: list[bool] = []

        async def move() -> None:
            assert edge.uplink is not None
            moved.append(await edge.uplink.dial_beside())

        world.nursery.start_soon(move)
        await world.run(lambda: bool(moved), limit=5)
        for _ in range(100):
            heard(0)
            await world.step()
        assert moved == [True]
        assert len(told) == 4


async def test_who_is_below_revokes_nobody(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    """A list that comes from below is not taken."""
    async with World(tmp_path, seed=6) as world:
        hub = await world.hub()
        device = Watched(world, "sensor-1", hub)
        await world.run(lambda: device.up, limit=5)
        assert device.link is not None
        device.link.send(Revoked({1: 2**40}))
        await world.run_for(0.5)
        assert device.up
        assert not device.ends


def test_what_is_revoked_is_bounded_and_forgotten_in_time(tmp_path: Path) -> None:
    """keys (4), (5): those that count longest stay; what no longer counts goes."""
    now = 0.0
    registry = NodeRegistry(tmp_path / "nodes.json", lambda: now)
    assert registry.learn({n: n for n in range(1, MAX_REVOKED + 101)})
    assert len(registry.revoked_since(-1)) == MAX_REVOKED
    assert not registry.is_revoked(100)
    assert registry.is_revoked(101)
    assert not registry.learn({101: 101}), "known"
    now = 1000.0
    assert registry.learn({5: 2000})
    assert not registry.is_revoked(999)
    assert registry.is_revoked(1001)
    assert registry.unsaved
    registry.save()
    assert NodeRegistry(tmp_path / "nodes.json").revoked_since(-1) == registry.revoked_since(-1)


def test_a_registry_that_was_changed_on_disk_is_read_again(tmp_path: Path) -> None:
    """On reload; what this process learned is not forgotten."""
    registry = NodeRegistry(tmp_path / "nodes.json", lambda: 0.0)
    registry.learn({7: 100})
    other = NodeRegistry(tmp_path / "nodes.json", lambda: 0.0)
    other.enrol("edge-1", "gateway", key="k", serial=9, not_after=50.0)
    other.revoke("edge-1")
    before = registry.generation
    registry.reread()
    assert registry.is_revoked(9)
    assert registry.is_revoked(7)
    assert registry.generation == before + 1
    assert list(registry.revoked_since(before)) == [9]


def test_fault_24_a_revoked_certificate_is_refused_as_such() -> None:
    """The handshake's refusal has a code of its own, and the dialling side hears it."""

    def authorise(peer: PeerIdentity) -> str | None:
        raise HandshakeRefused("this certificate was revoked", ErrorCode.REVOKED)

    net = Network(7)
    hub, edge = net.listener(authorise=authorise), net.dialler()
    session = edge.connect(hub)
    net.run(lambda: edge.closed(session) is not None, limit=10)
    closed = edge.closed(session)
    assert isinstance(closed, SessionClosed)
    assert (closed.code, closed.by_peer) == (ErrorCode.REVOKED, True)
    assert hub.refusals[0][2] == "this certificate was revoked"


def test_a_session_is_renewed_by_age_or_before_the_peers_certificate_ends() -> None:
    """R-9-4: 24 h ± 10 %; sooner where the peer's certificate ends sooner."""
    assert [renew_in(100.0, None, chance) for chance in (0.0, 0.5, 1.0)] == pytest.approx([90, 100, 110])
    assert renew_in(100.0, 50.0, 0.0) == pytest.approx(40)
    assert renew_in(100.0, 50.0, 1.0) == pytest.approx(45)
    assert renew_in(100.0, 5.0, 0.5) == pytest.approx(100), "it was tried"
    assert renew_in(100.0, -YEAR, 0.5) == pytest.approx(100)
