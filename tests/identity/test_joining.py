"""Joining and renewing over real sockets: stp/enrol.py against stpd/enrol.py and stpd/issuing.py."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from stp import enrol
from stp.core.handshake import TlsSettings, make_context
from stp.enrol import JoinToken, join, join_device, renew, renew_file
from stp.identity import Identity
from stp.pinned import EX_CANTCREAT, EX_NOPERM, EX_TEMPFAIL, EX_USAGE, EnrolError
from stpd import setup
from stpd.config import load
from stpd.keys import RENEWAL_GRACE
from stpd.pki import NODE_LIFETIME, CertificateAuthority
from tests.identity.conftest import Clock, Site, identity_from, in_thread
from tests.identity_kit import shake

HOUR = 3600.0


def connects(client: Identity, server: Identity) -> tuple[str, str]:
    return shake(*(make_context(TlsSettings(i.credentials), i is server) for i in (client, server)))


async def failing(function: object, *args: object, **options: object) -> EnrolError:
    with pytest.raises(EnrolError) as caught:
        await in_thread(function, *args, **options)  # type: ignore[arg-type]
    for line in (caught.value.cause, caught.value.advice):
        assert line
        assert "\n" not in line
    return caught.value


async def test_a_gateway_joins(site: Site, tmp_path: Path) -> None:
    """R-11-6."""
    made = site.tokens.create("gateway", 1, HOUR, ["site-a"])
    addresses = setup.Addresses(udp="127.0.0.1:9001")
    done = await in_thread(
        setup.join_gateway, made.token, site.host, "edge-1", tmp_path / "gw", addresses=addresses
    )
    config = load(done.config)
    found = Identity.load(config.identity)
    assert (found.domain, found.node) == ("site", "edge-1")
    assert found.network_keys == site.identity.network_keys
    assert found.upstream is not None
    assert (found.upstream.node, found.upstream.url) == ("hub-1", "stp://hub-1@127.0.0.1:9000")
    assert config.upstreams[0].url == found.upstream.url
    assert config.enrol.forward == site.host
    assert stat.S_IMODE((tmp_path / "gw" / "identity.pem").stat().st_mode) == 0o600
    assert len(done.next_steps) == 3
    assert connects(found, site.identity) == ("", "")
    assert connects(site.identity, found) == ("", "")  # a gateway also answers
    entry = site.registry.get("edge-1")
    assert entry is not None
    assert (entry.role, entry.tags) == ("gateway", ["site-a"])
    assert site.tokens.list()[0].used == 1
    assert not (tmp_path / "gw" / "identity.pem.joining").exists()


async def test_a_device_joins_at_a_gateway(site: Site, tmp_path: Path) -> None:
    edge = identity_from(site.authority, "edge-1", answers=True)
    door, host = await site.gateway(edge)
    made = site.tokens.create("device", 1, HOUR)
    path = await in_thread(join_device, made.token, host, "sensor-7", tmp_path / "device.pem")
    found = Identity.load(path)
    assert found.upstream is not None
    assert (found.upstream.node, found.upstream.url) == ("edge-1", "stp://edge-1@127.0.0.1:9000")
    assert door.issuer.registry.role_of("sensor-7") == "device"
    assert site.registry.role_of("sensor-7") == "device"
    assert door.issuer.statistics.forwarded == 1
    assert connects(found, edge) == ("", "")
    wrong, _ = connects(edge, found)  # a device answers nobody
    assert "certificate verify failed" in wrong


async def test_a_device_of_a_role_app(site: Site, tmp_path: Path) -> None:
    made = site.tokens.create("app", 0, HOUR)
    await in_thread(join_device, made.token, site.host, "reader-1", tmp_path / "a.pem")
    assert site.registry.role_of("reader-1") == "app"


async def test_default_place_of_a_device(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = site.tokens.create("device", 1, HOUR)
    path = await in_thread(join_device, made.token, site.host, "sensor-7")
    assert path == tmp_path / "config" / "stp" / "device.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["device.pem"]
    again = await failing(join_device, made.token, site.host, "sensor-8")
    assert (again.exit_code, "there already" in again.cause) == (EX_CANTCREAT, True)


# -- 1970 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("years", [-30, 30])
async def test_fault_61_join_by_a_clock_that_is_far_off(
    nursery: trio.Nursery, tmp_path: Path, years: int
) -> None:
    """Our clock is 30 years from the hub's, either way: nothing of the hub's is valid here, and we join (R-11-7)."""
    there = Clock()
    there.now += years * 365.25 * 86400
    site = await Site.make(tmp_path / "hub", nursery, there).open()
    made = site.tokens.create("device", 1, HOUR)
    path = await in_thread(join_device, made.token, site.host, "sensor-7", tmp_path / "d.pem")
    found = Identity.load(path)
    assert found.upstream is not None
    assert found.upstream.time == there.now  # what the time floor begins with
    there.now += HOUR  # expiry is the hub's to judge
    error = await failing(join_device, made.token, site.host, "sensor-8", tmp_path / "e.pem")
    assert error.refusal == "token-expired"


# -- who is refused, and how -------------------------------------------------------------------------------


async def test_tokens_that_have_ended(site: Site, tmp_path: Path) -> None:
    used = site.tokens.create("device", 1, HOUR)
    await in_thread(join_device, used.token, site.host, "sensor-1", tmp_path / "1.pem")
    revoked = site.tokens.create("device", 1, HOUR)
    site.tokens.revoke(revoked.id)
    unknown = enrol.new_token(site.authority.der).encode()
    cases = {"token-used": used.token, "token-revoked": revoked.token, "token-unknown": unknown}
    for refusal, token in cases.items():
        error = await failing(join_device, token, site.host, "sensor-2", tmp_path / "2.pem")
        assert (error.refusal, error.exit_code) == (refusal, EX_NOPERM)
        assert "stpctl keys create" in error.advice
    assert site.registry.get("sensor-2") is None


async def test_names_that_are_refused(site: Site, tmp_path: Path) -> None:
    made = site.tokens.create("device", 0, HOUR)
    await in_thread(join_device, made.token, site.host, "sensor-1", tmp_path / "1.pem")
    taken = await failing(join_device, made.token, site.host, "sensor-1", tmp_path / "2.pem")
    assert (taken.refusal, taken.exit_code) == ("name-taken", EX_NOPERM)
    hub = await failing(join_device, made.token, site.host, "hub-1", tmp_path / "3.pem")
    assert hub.refusal == "name-taken"
    bad = await failing(join_device, made.token, site.host, "No Name", tmp_path / "4.pem")
    assert (bad.refusal, bad.exit_code) == ("", EX_USAGE)
    site.registry.revoke("sensor-1")
    gone = await failing(join_device, made.token, site.host, "sensor-1", tmp_path / "5.pem")
    assert gone.refusal == "node-revoked"
    site.registry.forget("sensor-1")
    await in_thread(join_device, made.token, site.host, "sensor-1", tmp_path / "6.pem")


async def test_a_token_of_another_role_is_refused_unspent(site: Site, tmp_path: Path) -> None:
    device = site.tokens.create("device", 1, HOUR)
    error = await failing(setup.join_gateway, device.token, site.host, "edge-1", tmp_path / "gw")
    assert (error.refusal, error.cause) == ("token-role", "the token is for the role device")
    gateway = site.tokens.create("gateway", 1, HOUR)
    error = await failing(join_device, gateway.token, site.host, "edge-1", tmp_path / "d.pem")
    assert error.refusal == "token-role"
    assert [key.used for key in site.tokens.list()] == [0, 0]
    assert not (tmp_path / "gw" / "gateway.toml").exists()


async def test_a_lost_answer_costs_nothing(site: Site) -> None:
    """issuing (2): the same token, name and key again; another key does not get the name."""
    made = site.tokens.create("device", 1, HOUR)
    key = enrol.new_key()
    for _ in range(3):
        grant = await in_thread(join, made.token, site.host, "sensor-1", key)
        assert grant.node == "sensor-1"
    assert site.tokens.list()[0].used == 1
    error = await failing(join, made.token, site.host, "sensor-1", enrol.new_key())
    assert error.refusal == "name-taken"
    other = await failing(join, made.token, site.host, "sensor-2", key)
    assert other.refusal == "token-used"


async def test_an_interrupted_join_goes_on_with_its_key(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "d.pem"
    made = site.tokens.create("device", 1, HOUR)
    await failing(join_device, made.token, "127.0.0.1:1", "sensor-1", path)
    pending = tmp_path / "d.pem.joining"
    assert stat.S_IMODE(pending.stat().st_mode) == 0o600
    key = enrol.pending_key(pending)
    await in_thread(join_device, made.token, site.host, "sensor-1", path)
    assert enrol.key_pem(key) in path.read_bytes()
    assert not pending.exists()


async def test_nothing_secret_is_logged(site: Site, tmp_path: Path) -> None:
    """issuing (5)"""
    made = site.tokens.create("device", 1, HOUR)
    with capture_logs() as lines:
        await in_thread(join_device, made.token, site.host, "sensor-1", tmp_path / "1.pem")
        await failing(join_device, made.token, site.host, "sensor-2", tmp_path / "2.pem")
    text = repr(lines)
    token = JoinToken.decode(made.token)
    assert made.token[6:] not in text
    assert token.secret.hex() not in text
    assert token.id in text
    assert [line["event"] for line in lines] == ["enrolled", "enrol_refused"]


async def test_a_hub_that_cannot_write_gives_no_certificate(site: Site, tmp_path: Path) -> None:
    """issuing (1)"""
    made = site.tokens.create("device", 1, HOUR)
    for file in site.directory.iterdir():
        file.unlink()
    site.directory.rmdir()
    error = await failing(join_device, made.token, site.host, "sensor-1", tmp_path / "1.pem")
    assert (error.refusal, error.exit_code) == ("unavailable", EX_TEMPFAIL)
    assert site.registry.role_of("sensor-1") is None
    assert site.door.issuer.statistics.failed == 1


async def test_a_gateway_without_its_hub_says_so(nursery: trio.Nursery, tmp_path: Path) -> None:
    site = Site.make(tmp_path / "hub", nursery)
    site.port = 1  # nobody there
    _, host = await site.gateway(identity_from(site.authority, "edge-1", answers=True))
    made = site.tokens.create("device", 1, HOUR)
    error = await failing(join_device, made.token, host, "sensor-1", tmp_path / "1.pem")
    assert (error.refusal, error.exit_code) == ("unavailable", EX_TEMPFAIL)
    assert "cannot reach its hub" in error.cause


# -- renewal -----------------------------------------------------------------------------------------------


async def joined(site: Site, path: Path, name: str = "sensor-1") -> Identity:
    made = site.tokens.create("device", 1, HOUR)
    return Identity.load(await in_thread(join_device, made.token, site.host, name, path))


async def test_renewal_changes_key_and_certificate(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "d.pem"
    before = await joined(site, path)
    site.clock.now += 300 * 86400
    after = await in_thread(renew_file, path, site.host)
    assert after == Identity.load(path)
    assert after.not_after - before.not_after == timedelta(days=300)
    assert after.credentials.key_der != before.credentials.key_der
    assert after.serial != before.serial
    assert after.network_keys == before.network_keys
    entry = site.registry.get("sensor-1")
    assert entry is not None
    assert list(entry.serials) == [f"{before.serial:x}", f"{after.serial:x}"]


async def test_renewal_through_a_gateway(site: Site, tmp_path: Path) -> None:
    before = await joined(site, tmp_path / "d.pem")
    _, host = await site.gateway(identity_from(site.authority, "edge-1", answers=True))
    after = await in_thread(renew_file, tmp_path / "d.pem", host)
    assert after.serial != before.serial
    assert after.upstream is not None
    assert after.upstream.node == "edge-1"


async def test_renewal_after_a_lapse(site: Site, tmp_path: Path) -> None:
    """issuing (3): up to one lifetime after notAfter, and not a second longer (R-11-6)."""
    before = await joined(site, tmp_path / "d.pem")
    site.clock.now = before.not_after.timestamp() + RENEWAL_GRACE
    after = await in_thread(renew_file, tmp_path / "d.pem", site.host)
    assert after.not_after.timestamp() == pytest.approx(site.clock.now + NODE_LIFETIME.total_seconds(), abs=1)
    site.clock.now = after.not_after.timestamp() + RENEWAL_GRACE + 1
    error = await failing(renew_file, tmp_path / "d.pem", site.host)
    assert error.refusal == "lapsed"
    assert Identity.load(tmp_path / "d.pem") == after  # the old one stands


async def test_a_lost_answer_to_a_renewal(site: Site, tmp_path: Path) -> None:
    """The old certificate still renews when the answer with the new one never came."""
    identity = await joined(site, tmp_path / "d.pem")
    await in_thread(renew, identity, site.host, enrol.new_key())
    await in_thread(renew, identity, site.host, enrol.new_key())


async def test_renewals_that_are_refused(site: Site, tmp_path: Path) -> None:
    identity = await joined(site, tmp_path / "d.pem")
    other = await joined(site, tmp_path / "o.pem", "sensor-2")
    unknown = identity_from(site.authority, "sensor-3", answers=False)
    error = await failing(renew, unknown, site.host, enrol.new_key())
    assert error.refusal == "node-unknown"
    forged = Identity.load(tmp_path / "d.pem")
    forged.credentials.key_der = other.credentials.key_der
    error = await failing(renew, forged, site.host, enrol.new_key())
    assert "not signed" in error.cause
    site.registry.revoke("sensor-1")
    error = await failing(renew, identity, site.host, enrol.new_key())
    assert error.refusal == "node-revoked"
    await in_thread(renew, other, site.host, enrol.new_key())


async def test_a_stranger_with_the_same_names_renews_nothing(
    site: Site, nursery: trio.Nursery, tmp_path: Path
) -> None:
    other = await Site.make(tmp_path / "other", nursery).open()
    identity = await joined(other, tmp_path / "d.pem")
    anchors = identity.credentials.anchors_der
    identity.credentials.anchors_der = (*anchors, site.authority.der)
    error = await failing(renew, identity, site.host, enrol.new_key())
    assert error.refusal == "node-unknown"


async def test_renewal_goes_to_nobody_of_another_fleet(
    site: Site, nursery: trio.Nursery, tmp_path: Path
) -> None:
    other = await Site.make(tmp_path / "other", nursery).open()
    identity = await joined(site, tmp_path / "d.pem")
    error = await failing(renew, identity, other.host, enrol.new_key())
    assert "not of the fleet" in error.cause
    assert other.door.issuer.statistics.refused == 0  # it never saw a request


# -- the daemon's own --------------------------------------------------------------------------------------


async def test_a_gateway_renews_where_it_joined(site: Site, tmp_path: Path) -> None:
    made = site.tokens.create("gateway", 1, HOUR)
    addresses = setup.Addresses(udp="127.0.0.1:9001")
    done = await in_thread(
        setup.join_gateway, made.token, site.host, "edge-1", tmp_path / "gw", addresses=addresses
    )
    idle = await in_thread(setup.renew, done.config)
    assert not idle.renewed
    renewed = await in_thread(setup.renew, done.config, force=True)
    assert renewed.renewed
    found = Identity.load(load(done.config).identity)
    assert found.not_after == renewed.not_after
    assert found.network_keys == site.identity.network_keys
    assert len(found.network_keys) == 1
    assert site.door.issuer.statistics.renewed == 1


def test_a_hub_renews_itself(tmp_path: Path) -> None:
    done = setup.init_hub("hub-1", tmp_path / "hub", context=False)
    config = load(done.config)
    before = Identity.load(config.identity)
    assert not setup.renew(done.config).renewed
    assert setup.renew(done.config, force=True).renewed
    after = Identity.load(config.identity)
    assert (after.node, after.domain, after.network_keys) == (before.node, before.domain, before.network_keys)
    assert after.serial != before.serial
    assert config.enrol.ca is not None
    assert CertificateAuthority.load(config.enrol.ca).der in after.credentials.anchors_der


async def test_the_authority_is_replaced_without_a_gap(site: Site, tmp_path: Path) -> None:
    """Both CAs are trusted first; then the new one signs, for the hub too; nodes follow when they renew."""
    issuer = site.door.issuer
    before = await joined(site, tmp_path / "d.pem")
    new = CertificateAuthority.create("site", site.clock)
    site.identity.credentials.anchors_der = (site.authority.der, new.der)
    both = await in_thread(renew_file, tmp_path / "d.pem", site.host)
    assert set(both.credentials.anchors_der) == {site.authority.der, new.der}
    hub = identity_from(new, "hub-1", answers=True)
    hub.credentials.anchors_der = (new.der, site.authority.der)
    issuer.identity, issuer.authority = lambda: hub, new
    after = await in_thread(renew_file, tmp_path / "d.pem", site.host)
    assert connects(after, hub) == ("", "")
    assert connects(both, hub) == ("", "")  # one that has not renewed since stays
    hub.credentials.anchors_der = (new.der,)
    assert connects(after, hub) == ("", "")
    wrong, _ = connects(before, hub)  # the one that missed all of it is out
    assert "certificate verify failed" in wrong


async def test_asking_again_has_an_end(site: Site) -> None:
    """issuing (2): an hour later, or once the token is revoked, it is no lost answer any more."""
    made = site.tokens.create("device", 1, 10 * HOUR)
    key = enrol.new_key()
    await in_thread(join, made.token, site.host, "sensor-1", key)
    site.clock.now += HOUR - 1
    await in_thread(join, made.token, site.host, "sensor-1", key)
    site.clock.now += 1
    late = await failing(join, made.token, site.host, "sensor-1", key)
    assert late.refusal == "token-used"
    site.clock.now -= HOUR
    site.tokens.revoke(made.id)
    revoked = await failing(join, made.token, site.host, "sensor-1", key)
    assert revoked.refusal == "token-revoked"
