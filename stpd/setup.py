"""From nothing to a running fleet: `stpd init hub`, `stpd join`, `stpd renew`.

Blocking code for a command line.

(1) Nothing that exists is overwritten; only `renew` replaces an identity, as a whole or not at all.
(2) Private files have mode 0600 from the moment they exist.
(3) The configuration is written last: a directory with one is complete.
(4) Every failure is an EnrolError: one line of cause, one of what to do, an exit code.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from attrs import define
from cryptography import x509

from stp import enrol
from stp.identity import (
    ENROL_PORT,
    LABEL_NETWORK_KEY,
    NETWORK_KEY_SIZE,
    Identity,
    IdentityError,
    check_node_name,
    network_key_pem,
    parse_url,
    write_atomically,
)
from stp.pinned import EX_CANTCREAT, EX_UNAVAILABLE, EX_USAGE, EnrolError
from stpd import network_keys, templates
from stpd.checks import split_address
from stpd.config import Config, ConfigError, load
from stpd.pki import NODE_LIFETIME, CertificateAuthority, PkiError, certificate_pem, private_pem, wall_clock

IDENTITY: Final = "identity.pem"
NETWORK_KEY: Final = "network.key"
OPERATOR: Final = "operator.pem"
CONTEXT: Final = "context.json"
HUB_CONFIG: Final = "hub.toml"
GATEWAY_CONFIG: Final = "gateway.toml"
STATE: Final = "state"

RENEW_BEFORE: Final = NODE_LIFETIME.total_seconds() / 3
"""Seconds before notAfter from which `renew` renews without being forced."""


@define(kw_only=True)
class Addresses:
    """Where the new node listens, "host:port" each."""

    udp: str = "0.0.0.0:9000"
    enrol: str = "0.0.0.0:8443"
    management: str = "127.0.0.1:9443"
    health: str = "127.0.0.1:8080"

    def check(self) -> None:
        """Raises EnrolError."""
        for name, text in (
            ("listen", self.udp),
            ("enrol", self.enrol),
            ("management", self.management),
            ("health", self.health),
        ):
            try:
                if text:
                    split_address(text)
            except ValueError as exc:
                raise EnrolError(
                    f"--{name}: {exc}", "write host:port, such as 0.0.0.0:9000", EX_USAGE
                ) from exc


@define
class Done:
    """What was made, and what to do next: three lines."""

    directory: Path
    config: Path
    next_steps: list[str]


def init_hub(
    name: str,
    directory: str | Path,
    *,
    domain: str = "stp.internal",
    operator: str = "admin",
    addresses: Addresses | None = None,
    state: str = STATE,
    context: bool = True,
) -> Done:
    """Make a CA, the first hub of `domain`, an operator for stpctl, a configuration. Raises EnrolError."""
    directory, addresses = Path(directory), addresses or Addresses()
    _check_name(name, "--name")
    _check_name(domain, "--domain")
    _check_name(operator, "--operator")
    addresses.check()
    mine = (HUB_CONFIG, IDENTITY, NETWORK_KEY, OPERATOR, CONTEXT, "ca.pem", "ca.key")
    saved = _context_path(name) if context else None
    _check_free([directory / file for file in mine] + ([saved] if saved else []))
    authority = CertificateAuthority.create(domain)
    try:
        _make_directory(directory, state)
        authority.save(directory)
        key = enrol.new_key()
        leaf = authority.issue(key.public_key(), domain, name, answers=True)
        write_atomically(directory / IDENTITY, _bundle(private_pem(key), [leaf], authority))
        network_key = network_key_pem(secrets.token_bytes(NETWORK_KEY_SIZE))
        write_atomically(directory / NETWORK_KEY, network_key.encode())
        key = enrol.new_key()
        leaf = authority.issue_operator(key.public_key(), domain, operator, "operator")
        write_atomically(directory / OPERATOR, _bundle(private_pem(key), [leaf], authority))
        found = (
            json.dumps(_context(name, addresses.management, directory / OPERATOR), indent=1).encode() + b"\n"
        )
        write_atomically(directory / CONTEXT, found)
        if saved is not None:
            saved.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(saved, found)
        _write_config(directory / HUB_CONFIG, templates.HUB, name, addresses, state=state)
    except OSError as exc:
        raise _cannot_write(exc) from exc
    enrol_port = split_address(addresses.enrol)[1] if addresses.enrol else ENROL_PORT
    host = f"HOST:{enrol_port}" if enrol_port != ENROL_PORT else "HOST"
    steps = [
        f"start it here:             stpd run --config {directory / HUB_CONFIG}",
        "let a machine in:          stpctl keys create --role gateway --uses 1 --ttl 1h",
        f"and on that machine say:   stpd join TOKEN --hub {host} --name edge-1 --dir DIR",
    ]
    return Done(directory, directory / HUB_CONFIG, steps)


def join_gateway(
    token: str,
    hub: str,
    name: str,
    directory: str | Path,
    *,
    addresses: Addresses | None = None,
    state: str = STATE,
) -> Done:
    """Enrol this machine as a gateway and write its configuration. Raises EnrolError.

    After a lost answer, ask again: the same key is used, and the token is not charged twice.
    """
    directory, addresses = Path(directory), addresses or Addresses()
    enrol.JoinToken.decode(token)
    _check_name(name, "--name")
    addresses.check()
    host, port = enrol.parse_host(hub)
    path, config = directory / IDENTITY, directory / GATEWAY_CONFIG
    _check_free([path, config])
    try:
        _make_directory(directory, state)
    except OSError as exc:
        raise _cannot_write(exc) from exc
    pending = directory / f"{IDENTITY}.joining"
    key = enrol.pending_key(pending)
    grant = enrol.join(token, hub, name, key, kind="gateway")
    forward = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        # (3) the identity first: if the disk fills now, the same token and key are good for another try
        write_atomically(path, grant.bundle(enrol.key_pem(key)))
        _write_config(
            config,
            templates.GATEWAY,
            name,
            addresses,
            state=state,
            forward=forward,
            upstream=grant.upstream.url,
        )
        pending.unlink(missing_ok=True)
    except OSError as exc:
        path.unlink(missing_ok=True)
        raise _cannot_write(exc) from exc
    steps = [
        f"start it here:  stpd run --config {config}",
        f"see it on {grant.upstream.node}:  stpctl edges list",
        "let a device join here:  stp join TOKEN --host THIS-HOST --name sensor-1",
    ]
    return Done(directory, config, steps)


@define
class Renewal:
    """What `renew` did."""

    file: Path
    not_after: datetime
    renewed: bool
    """False: it was not due."""


def renew(config_path: str | Path, *, host: str | None = None, force: bool = False) -> Renewal:
    """Renew a daemon's certificate if it is due (or `force`): at the own CA, else at the node above.

    Works after notAfter, too, for one lifetime. Raises EnrolError; the old identity then stands.
    """
    config = _load_config(config_path)
    file = _bundle_file(config.identity)
    try:
        identity = Identity.load(config.identity)
    except IdentityError as exc:
        raise EnrolError(str(exc.file or file) + f": {exc.cause}", exc.advice, EX_USAGE) from exc
    if not force and identity.not_after.timestamp() - wall_clock() > RENEW_BEFORE:
        return Renewal(file, identity.not_after, False)
    if config.enrol.ca is not None:
        fresh = _renew_here(config.enrol.ca, identity, file)
    else:
        fresh = _renew_above(config, identity, file, host)
    return Renewal(file, fresh.not_after, True)


def _renew_here(ca: Path, identity: Identity, file: Path) -> Identity:
    """The hub signs for itself."""
    try:
        authority = CertificateAuthority.load(ca)
    except PkiError as exc:
        raise EnrolError(str(exc), "check enrol.ca in the configuration", EX_UNAVAILABLE) from exc
    key = enrol.new_key()
    leaf = authority.issue(key.public_key(), identity.domain, identity.node, answers=True)
    return _replace(file, _bundle(private_pem(key), [leaf], authority) + _kept_blocks(file))


def _renew_above(config: Config, identity: Identity, file: Path, host: str | None) -> Identity:
    target = host or config.enrol.forward
    if not target and config.upstreams:
        try:
            target = parse_url(config.upstreams[0].url, identity.upstream).host
        except IdentityError as exc:
            raise EnrolError(exc.cause, exc.advice, EX_USAGE) from exc
        target = f"[{target}]" if ":" in target else target
    target = target or enrol.renewal_host(identity.upstream)
    pending = file.with_name(f"{file.name}.renewing")
    key = enrol.pending_key(pending)
    grant = enrol.renew(identity, target, key)
    _take_network_keys(config, file, grant)
    fresh = _replace(
        file, grant.bundle(enrol.key_pem(key)) + (_kept_blocks(file) if not grant.network_key else b"")
    )
    pending.unlink(missing_ok=True)
    return fresh


def _take_network_keys(config: Config, bundle: Path, grant: enrol.Grant) -> None:
    """Network keys that stand in a file of their own are renewed there; in the bundle they come with the rest."""
    try:
        file = network_keys.key_file(config)
        if file is None or file == bundle:
            return
        if grant.network_key:
            network_keys.replace_keys(file, grant.network_key)
        grant.network_key = ""
    except OSError as exc:
        raise _cannot_write(exc) from exc


def _replace(file: Path, content: bytes) -> Identity:
    try:
        write_atomically(file, content)
    except OSError as exc:
        raise _cannot_write(exc) from exc
    return Identity.parse([(str(file), content)])


def _kept_blocks(file: Path) -> bytes:
    """Network keys that stand in the bundle itself and must outlive its certificate."""
    text = file.read_text(encoding="ascii", errors="replace")
    begin, end = f"-----BEGIN {LABEL_NETWORK_KEY}-----", f"-----END {LABEL_NETWORK_KEY}-----"
    found = [block.partition(end)[0] for block in text.split(begin)[1:]]
    return "".join(f"{begin}{block}{end}\n" for block in found).encode()


def _bundle_file(paths: Sequence[Path]) -> Path:
    """The one file of an identity that holds the private key."""
    for path in paths:
        try:
            if b"PRIVATE KEY-----" in path.read_bytes():
                return path
        except OSError as exc:
            raise EnrolError(
                f"{path}: {exc.strerror}", "run as the owner of the identity", EX_UNAVAILABLE
            ) from exc
    raise EnrolError(
        "no identity file holds a private key", "check `identity` in the configuration", EX_USAGE
    )


def _load_config(path: str | Path) -> Config:
    try:
        return load(path)
    except ConfigError as exc:
        advice = f"mend it, then look it over: stpd check --config {path}"
        first = next((p for p in exc.problems if not p.warning), exc.problems[0])
        cause = f"{path}: {first.path}: {first.message}" if first.path else f"{path}: {first.message}"
        raise EnrolError(cause, advice, EX_USAGE) from exc


def _check_name(name: str, option: str) -> None:
    try:
        check_node_name(name)
    except IdentityError as exc:
        raise EnrolError(f"{option}: {exc.cause}", exc.advice, EX_USAGE) from exc


def _check_free(paths: Sequence[Path]) -> None:
    """(1)"""
    for path in paths:
        if path.exists():
            raise EnrolError(
                f"{path} is there already",
                "nothing was changed: move it away, or choose another",
                EX_CANTCREAT,
            )


def _make_directory(directory: Path, state: str) -> None:
    """An absolute state directory is somebody else's to make: systemd's, with another owner."""
    directory.mkdir(
        parents=True, exist_ok=True, mode=0o755
    )  # its secrets are 0600 each; the rest may be read
    if not os.path.isabs(state):
        (directory / state).mkdir(parents=True, exist_ok=True, mode=0o700)


def _write_config(path: Path, template: str, name: str, addresses: Addresses, **more: str) -> None:
    text = template.format(
        node=name,
        udp=addresses.udp,
        enrol=addresses.enrol,
        management=addresses.management,
        health=addresses.health,
        **more,
    )
    write_atomically(path, text.encode(), 0o644)


def _bundle(key_pem: bytes, chain: list[x509.Certificate], authority: CertificateAuthority) -> bytes:
    return key_pem + "".join([*map(certificate_pem, chain), authority.pem]).encode()


def _context(name: str, management: str, bundle: Path) -> dict[str, str]:
    """What stpctl needs to know of a node."""
    host, port = split_address(management or Addresses().management)
    host = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    shown = f"[{host}]" if ":" in host else host
    return {
        "name": name,
        "url": f"https://{shown}:{port}",
        "node": name,
        "certificate": str(bundle.absolute()),
    }


def _context_path(name: str) -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "stpctl" / "contexts" / f"{name}.json"


def _cannot_write(exc: OSError) -> EnrolError:
    what = f"{exc.filename}: " if exc.filename else ""
    return EnrolError(f"{what}{exc.strerror}", "check the directory, its owner and its space", EX_CANTCREAT)


def days_left(not_after: datetime) -> int:
    return int((not_after - datetime.now(UTC)).total_seconds() // 86400)
