"""stpd/network_keys.py: the change of a network key, step by step, with nodes that renew over real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from attrs import define
from click.testing import CliRunner

from stp.enrol import join_device, renew_file
from stp.identity import Identity, network_key_id, network_key_pem
from stp.pinned import EX_NOPERM, EX_USAGE, EnrolError
from stpd import network_keys, setup
from stpd.__main__ import main
from stpd.config import load
from stpd.enrol import EnrolmentDoor
from stpd.issuing import Issuer
from stpd.keys import JoinTokens, NodeRegistry
from stpd.pki import CertificateAuthority
from tests.identity.conftest import in_thread, serve

HOUR = 3600.0


@define
class Hub:
    """What `stpd init hub` made, and its enrolment service, which reads the identity anew for each answer."""

    config: Path
    directory: Path
    tokens: JoinTokens
    registry: NodeRegistry
    host: str

    @property
    def keys(self) -> tuple[bytes, ...]:
        return Identity.load(load(self.config).identity).network_keys

    async def gateway(self, name: str) -> Path:
        token = self.tokens.create("gateway", 1, HOUR).token
        done = await in_thread(
            setup.join_gateway,
            token,
            self.host,
            name,
            self.directory / name,
            addresses=setup.Addresses(udp="127.0.0.1:9001"),
        )
        return done.config

    async def device(self, name: str) -> Path:
        token = self.tokens.create("device", 1, HOUR).token
        return await in_thread(join_device, token, self.host, name, self.directory / f"{name}.pem")


@pytest.fixture
async def hub(tmp_path: Path, nursery: trio.Nursery) -> Hub:
    done = setup.init_hub("hub-1", tmp_path / "hub", context=False)
    config = load(done.config)
    assert config.enrol.ca is not None
    authority = CertificateAuthority.load(config.enrol.ca)
    tokens = JoinTokens(config.state_dir / "keys.json", authority.der)
    registry = NodeRegistry(config.state_dir / network_keys.REGISTRY)
    door = EnrolmentDoor(Issuer(lambda: Identity.load(config.identity), registry, authority, tokens))
    port = await serve(nursery, door)
    return Hub(done.config, tmp_path, tokens, registry, f"127.0.0.1:{port}")


def keys_of(*files: Path) -> tuple[bytes, ...]:
    return Identity.load(files).network_keys


async def test_three_steps_and_everybody_hears_everybody_all_the_time(hub: Hub) -> None:
    """After each step, at each stage of its spreading: whoever dials uses a key that whoever listens accepts."""
    edge = await hub.gateway("edge-1")
    bundle, device = edge.parent / "identity.pem", await hub.device("sensor-1")
    (old,) = hub.keys

    def all_hear() -> None:
        for dialling, listening in ((bundle, hub.keys), (device, keys_of(bundle)), (device, hub.keys)):
            assert keys_of(dialling)[0] in listening

    network_keys.add(hub.config)
    _, new = hub.keys
    assert hub.keys == (old, new)
    all_hear()
    await in_thread(setup.renew, edge, force=True, host=hub.host)
    assert keys_of(bundle) == (old, new)
    all_hear()
    found = network_keys.use(hub.config)
    assert hub.keys == (new, old)
    assert found.ids == [network_key_id(new), network_key_id(old)]
    all_hear()
    await in_thread(renew_file, device, hub.host)
    assert keys_of(device) == (new, old)
    all_hear()
    await in_thread(setup.renew, edge, force=True, host=hub.host)
    all_hear()
    network_keys.drop(hub.config)
    assert hub.keys == (new,)
    all_hear()
    await in_thread(setup.renew, edge, force=True, host=hub.host)
    assert keys_of(bundle) == (new,)
    all_hear()


async def test_a_step_that_would_cut_somebody_off_is_refused_and_names_him(hub: Hub) -> None:
    """Promise (1)."""
    edge = await hub.gateway("edge-1")
    device = await hub.device("sensor-1")
    network_keys.add(hub.config)
    before = hub.keys
    with pytest.raises(EnrolError, match="edge-1 would not hear") as refused:
        network_keys.use(hub.config)
    assert refused.value.exit_code == EX_NOPERM
    assert hub.keys == before
    await in_thread(setup.renew, edge, force=True, host=hub.host)
    network_keys.use(hub.config)  # the device need not know: it only dials
    with pytest.raises(EnrolError, match="edge-1, sensor-1 would be cut off"):
        network_keys.drop(hub.config)
    await in_thread(setup.renew, edge, force=True, host=hub.host)
    with pytest.raises(EnrolError, match=r"^sensor-1 would be cut off"):
        network_keys.drop(hub.config)
    await in_thread(renew_file, device, hub.host)
    assert len(network_keys.drop(hub.config).ids) == 1


async def test_who_cannot_come_any_more_is_not_waited_for(hub: Hub) -> None:
    await hub.gateway("edge-1")
    network_keys.add(hub.config)
    hub.registry.revoke("edge-1")
    network_keys.use(hub.config)
    assert network_keys.drop(hub.config).unknown == []


async def test_force_is_believed(hub: Hub) -> None:
    await hub.gateway("edge-1")
    (old,) = hub.keys
    network_keys.add(hub.config)
    assert network_keys.use(hub.config, force=True).holders == [[], ["edge-1"]]
    assert network_keys.drop(hub.config, force=True).unknown == ["edge-1"]
    assert old not in hub.keys


async def test_many_names_are_counted(hub: Hub) -> None:
    for number in range(7):
        hub.registry.enrol(f"edge-{number}", "gateway", key="k", serial=number, not_after=4e9)
    network_keys.add(hub.config)
    with pytest.raises(EnrolError, match="edge-4 and 2 more would not hear"):
        network_keys.use(hub.config)


async def test_keys_in_a_file_of_their_own_are_renewed_there(hub: Hub) -> None:
    """As under systemd, where the identity comes in several files."""
    edge = await hub.gateway("edge-1")
    bundle, apart = edge.parent / "identity.pem", edge.parent / "network.key"
    apart.write_text("".join(map(network_key_pem, hub.keys)))
    network_keys.replace_keys(bundle, "")
    edge.write_text(edge.read_text().replace('"identity.pem"', '"identity.pem", "network.key"'))
    network_keys.add(hub.config)
    await in_thread(setup.renew, edge, force=True, host=hub.host)
    assert keys_of(bundle) == ()
    assert keys_of(bundle, apart) == hub.keys


async def test_the_command_shows_fingerprints_and_no_keys(hub: Hub) -> None:
    await hub.gateway("edge-1")

    def run(*words: str) -> str:
        done = CliRunner().invoke(main, ["network-key", *words, "--config", str(hub.config)])
        assert done.exit_code == 0, done.output
        for key in hub.keys:
            assert network_key_pem(key).splitlines()[1] not in done.output
            assert key.hex() not in done.output
        return done.output

    (old,) = hub.keys
    assert f"{network_key_id(old)}  the hub sends and accepts it; 1 nodes have it, 1 of them send" in run(
        "show"
    )
    assert "stpd network-key use" in run("add")
    assert "stpd network-key drop" in run("use", "--force")
    assert "1 nodes have none of these" in run("drop", "--force")


@pytest.mark.parametrize(
    ("words", "cause"), [(("use",), "one network key only"), (("drop",), "one network key only")]
)
async def test_steps_out_of_order(hub: Hub, words: tuple[str, ...], cause: str) -> None:
    done = CliRunner().invoke(main, ["network-key", *words, "--config", str(hub.config)])
    assert done.exit_code == EX_USAGE
    assert cause in done.output
    network_keys.add(hub.config)
    with pytest.raises(EnrolError, match="two network keys already"):
        network_keys.add(hub.config)


async def test_a_gateway_has_no_say(hub: Hub) -> None:
    edge = await hub.gateway("edge-1")
    with pytest.raises(EnrolError, match="gets its network keys from above"):
        network_keys.add(edge)
