"""stpd/setup.py and stpd/setup_cli.py: what init, join and renew leave behind. Promises at the head of setup.py."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from stp.identity import Identity
from stp.pinned import EX_CANTCREAT, EX_UNAVAILABLE, EX_USAGE, EnrolError
from stpd import setup
from stpd.config import load, parse
from stpd.pki import CertificateAuthority
from stpd.setup_cli import COMMANDS
from tests.identity.conftest import Site, in_thread

PRIVATE = ("identity.pem", "ca.key", "network.key", "operator.pem", "context.json")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: object) -> Result:
    group = click.Group(commands={command.name or "": command for command in COMMANDS})
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def test_init_leaves_a_hub_that_can_start(tmp_path: Path, home: Path) -> None:
    result = run("init", "hub", "--name", "hub-1", "--dir", tmp_path / "hub", "--domain", "site")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) == 4  # what was made, and three lines of what to do next
    config, problems = parse(tmp_path / "hub" / "hub.toml")
    assert problems == []
    assert config is not None
    assert config.role == "hub"
    assert config.state_dir == tmp_path / "hub" / "state"
    assert config.state_dir.is_dir()
    identity = Identity.load(config.identity)
    assert (identity.domain, identity.node, len(identity.network_keys)) == ("site", "hub-1", 1)
    assert config.enrol.ca is not None
    authority = CertificateAuthority.load(config.enrol.ca)
    assert identity.credentials.anchors_der == (authority.der,)
    years = (
        authority.certificate.not_valid_after_utc - authority.certificate.not_valid_before_utc
    ).days / 365.2
    assert years == pytest.approx(10, abs=0.1)


def test_init_denies_by_default(tmp_path: Path, home: Path) -> None:
    """What is allowed is allowed to a role; a node of no role may do nothing."""
    done = setup.init_hub("hub-1", tmp_path / "hub")
    rules = load(done.config).access
    assert {rule.role for rule in rules} == {"gateway", "device", "app"}
    assert all("#" not in rule.publish for rule in rules if rule.role != "gateway")


def test_private_files_are_private(tmp_path: Path, home: Path) -> None:
    """(2)"""
    old = os.umask(0)
    try:
        setup.init_hub("hub-1", tmp_path / "hub")
    finally:
        os.umask(old)
    for name in PRIVATE:
        assert stat.S_IMODE((tmp_path / "hub" / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE((tmp_path / "hub").stat().st_mode) == 0o755, (
        "the configuration may be read; each secret is private by itself"
    )
    assert stat.S_IMODE((tmp_path / "hub" / "state").stat().st_mode) == 0o700
    assert {p.name for p in (tmp_path / "hub").iterdir()} == {*PRIVATE, "ca.pem", "hub.toml", "state"}


def test_the_operator_gets_a_certificate_and_a_context(tmp_path: Path, home: Path) -> None:
    setup.init_hub("hub-1", tmp_path / "hub", domain="site", operator="ann")
    context = json.loads((home / "stpctl" / "contexts" / "hub-1.json").read_text())
    assert context == json.loads((tmp_path / "hub" / "context.json").read_text())
    assert context["url"] == "https://127.0.0.1:9443"
    assert context["node"] == context["name"] == "hub-1"
    bundle = Path(context["certificate"])
    leaf, anchor = x509.load_pem_x509_certificates(bundle.read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "stp-operator://site/ann?role=operator"
    ]
    leaf.verify_directly_issued_by(anchor)
    tls = ssl.create_default_context(cafile=str(bundle))  # what stpctl does with it
    tls.load_cert_chain(bundle)


def test_nothing_is_overwritten(tmp_path: Path, home: Path) -> None:
    """(1): not by a second init, not where one file of ours is left, not in the home."""
    assert run("init", "hub", "--name", "hub-1", "--dir", tmp_path / "a").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    result = run("init", "hub", "--name", "hub-1", "--dir", tmp_path / "a")
    assert result.exit_code == EX_CANTCREAT
    assert result.stderr.startswith("stpd: ")
    assert "there already" in result.stderr
    assert len(result.stderr.splitlines()) == 2
    assert before == {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ca.key").write_text("precious")
    assert run("init", "hub", "--name", "hub-2", "--dir", tmp_path / "b").exit_code == EX_CANTCREAT
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["ca.key"]
    assert (
        run("init", "hub", "--name", "hub-1", "--dir", tmp_path / "c").exit_code == EX_CANTCREAT
    )  # its context
    assert run("init", "hub", "--name", "hub-1", "--dir", tmp_path / "c", "--no-context").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--name", "Hub One"),
        ("--name", "hub-1", "--domain", "a/b"),
        ("--name", "hub-1", "--operator", ""),
        ("--name", "hub-1", "--listen", "nonsense"),
    ],
)
def test_bad_options_leave_nothing(tmp_path: Path, home: Path, options: tuple[str, ...]) -> None:
    result = run("init", "hub", "--dir", tmp_path / "hub", *options)
    assert result.exit_code == EX_USAGE
    assert options[-2] in result.stderr
    assert not (tmp_path / "hub").exists()
    assert not home.exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, home: Path) -> None:
    (tmp_path / "file").touch()
    result = run("init", "hub", "--name", "hub-1", "--dir", tmp_path / "file" / "hub")
    assert result.exit_code == EX_CANTCREAT
    assert str(tmp_path / "file") in result.stderr


def test_the_shipped_units_find_what_init_leaves(tmp_path: Path, home: Path) -> None:
    """All files of the configuration lie beside it, so credentials with the same names do."""
    state = "/var/lib/stpd-hub"
    done = setup.init_hub("hub-1", tmp_path / "etc", state=state)
    unit = (Path(__file__).parents[2] / "systemd" / "stpd-hub.service").read_text()
    assert "StateDirectory=stpd-hub" in unit
    for line in unit.splitlines():
        if line.startswith("LoadCredential="):
            name, _, source = line.removeprefix("LoadCredential=").partition(":")
            assert source == f"/etc/stpd/{name}"
            assert (tmp_path / "etc" / name).is_file()
    config = load(done.config)
    assert str(config.state_dir) == state
    assert not Path(state).exists()
    assert all(path.parent == tmp_path / "etc" for path in config.identity)


async def test_join_on_the_command_line(site: Site, tmp_path: Path) -> None:
    made = site.tokens.create("gateway", 1, 3600.0)
    where = ("--hub", site.host, "--dir", tmp_path / "gw", "--listen", "127.0.0.1:9001")
    result = await in_thread(run, "join", made.token, "--name", "edge-1", *where)
    assert result.exit_code == 0, result.output
    assert f"Joined as edge-1 in {tmp_path / 'gw'}. Next:" in result.output  # the hub's log stands there too
    _, problems = parse(tmp_path / "gw" / "gateway.toml")
    assert problems == []
    again = await in_thread(run, "join", made.token, "--name", "edge-1", *where)
    assert again.exit_code == EX_CANTCREAT
    marker = tmp_path / "marker"
    idle = ("renew", "--config", tmp_path / "gw" / "gateway.toml", "--then", f"touch {marker}")
    assert "not due" in (await in_thread(run, *idle)).output
    assert not marker.exists()
    assert "renewed" in (await in_thread(run, *idle, "--force")).output
    assert marker.exists()


def test_join_says_what_is_wrong(tmp_path: Path) -> None:
    result = run("join", "nonsense", "--hub", "h", "--name", "edge-1", "--dir", tmp_path / "gw")
    assert (result.exit_code, "must begin with stpj1." in result.stderr) == (EX_USAGE, True)
    assert not (tmp_path / "gw").exists()


def test_renew_says_what_is_wrong(tmp_path: Path, home: Path) -> None:
    missing = run("renew", "--config", tmp_path / "none.toml")
    assert (missing.exit_code, "none.toml" in missing.stderr) == (EX_USAGE, True)
    done = setup.init_hub("hub-1", tmp_path / "hub")
    (tmp_path / "hub" / "ca.key").unlink()
    lost = run("renew", "--config", done.config, "--force")
    assert (lost.exit_code, "ca.key" in lost.stderr) == (EX_UNAVAILABLE, True)
    before = (tmp_path / "hub" / "identity.pem").read_bytes()
    (tmp_path / "hub" / "identity.pem").write_bytes(before.replace(b"PRIVATE KEY", b"PUBLIC KEY"))
    keyless = run("renew", "--config", done.config)
    assert (keyless.exit_code, "no identity file holds a private key" in keyless.stderr) == (EX_USAGE, True)
    (tmp_path / "hub" / "identity.pem").unlink()
    with pytest.raises(EnrolError, match="No such file"):
        setup.renew(done.config)


@pytest.mark.real
def test_the_commands_start_without_a_daemon(tmp_path: Path) -> None:
    """As a process of its own: what a person runs first."""
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "stpd", "init", "hub", "--name", "hub-1", "--dir", str(tmp_path / "hub")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "stpd run --config" in done.stdout
