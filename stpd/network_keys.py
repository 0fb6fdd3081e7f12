"""The network key, and how a fleet changes it without a gap (protocol §3, R-3-6). Command: `stpd network-key`.

A node accepts the two keys it holds and sends with the first. So a change has three steps, each on the hub that has
the CA, each followed by `stpctl reload` there and by renewals everywhere else:

    add     a new key, second:  all nodes learn to accept it
    use     it becomes first:   all nodes learn to send with it
    drop    the old one goes

(1) A step that would cut off a node is refused, and names it; who knows better says `force`.
(2) Which keys a node has is what the registry noted when it last enrolled or renewed; nothing is asked on the wire.
(3) The file is replaced as a whole or not at all. Keys are named by a fingerprint and never shown.

Blocking code for a command line.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

from attrs import define

from stp.identity import (
    LABEL_NETWORK_KEY,
    MAX_NETWORK_KEYS,
    NETWORK_KEY_SIZE,
    Identity,
    IdentityError,
    network_key_id,
    network_key_pem,
    write_atomically,
)
from stp.pinned import EX_CANTCREAT, EX_NOPERM, EX_USAGE, EnrolError
from stpd.config import Config, ConfigError, load
from stpd.keys import NodeEntry, NodeRegistry, StateFileError
from stpd.pki import wall_clock

REGISTRY: Final = "nodes.json"
"""In the state directory."""
NAMED: Final = 5
"""Nodes that a refusal names; of the others it says how many."""


@define
class NetworkKeys:
    """The keys of a fleet as its hub has them, and who else has them."""

    ids: list[str]
    """The first is used to send."""
    senders: list[list[str]]
    """By key: nodes that send with it."""
    holders: list[list[str]]
    """By key: nodes that accept it, the former included."""
    unknown: list[str]
    """Nodes that have none of these keys, or enrolled before this was noted."""


def show(config_path: str | Path) -> NetworkKeys:
    """Raises EnrolError."""
    identity, registry, _ = _open(config_path)
    return _found(identity.network_keys, registry)


def add(config_path: str | Path) -> NetworkKeys:
    """Step one: a new key that everybody is to accept. Raises EnrolError."""
    identity, registry, file = _open(config_path)
    keys = identity.network_keys
    if len(keys) >= MAX_NETWORK_KEYS:
        raise EnrolError(
            "there are two network keys already",
            "finish the change that is under way: use, then drop",
            EX_USAGE,
        )
    return _write(file, (*keys, secrets.token_bytes(NETWORK_KEY_SIZE)), registry)


def use(config_path: str | Path, *, force: bool = False) -> NetworkKeys:
    """Step two: the second key becomes the first. Raises EnrolError, also where a gateway would not hear it (1)."""
    identity, registry, file = _open(config_path)
    first, second = _two(identity)
    wanted = network_key_id(second)
    deaf = [n.node for n in _counted(registry) if n.role == "gateway" and wanted not in n.network]
    if deaf and not force:
        raise EnrolError(
            f"{_names(deaf)} would not hear who sends with the new key",
            "have them renew first (stpd renew --force), or say --force",
            EX_NOPERM,
        )
    return _write(file, (second, first), registry)


def drop(config_path: str | Path, *, force: bool = False) -> NetworkKeys:
    """Step three: the second key goes. Raises EnrolError, also where a node still sends with it (1)."""
    identity, registry, file = _open(config_path)
    first, _ = _two(identity)
    wanted = network_key_id(first)
    late = [n.node for n in _counted(registry) if n.network[:1] != [wanted]]
    if late and not force:
        raise EnrolError(
            f"{_names(late)} would be cut off, still sending with the old key",
            "have them renew first (stpd renew --force, stp renew), or say --force",
            EX_NOPERM,
        )
    return _write(file, (first,), registry)


def replace_keys(file: Path, keys: str) -> None:
    """Put the PEM blocks `keys` into `file` in the place of the network keys it has. Raises OSError."""
    text = file.read_text(encoding="ascii")
    begin, end = f"-----BEGIN {LABEL_NETWORK_KEY}-----", f"-----END {LABEL_NETWORK_KEY}-----\n"
    kept, *blocks = text.split(begin)
    rest = "".join(block.partition(end)[2] for block in blocks)
    write_atomically(file, (kept + keys + rest).encode("ascii"))


def key_file(config: Config) -> Path | None:
    """The file of an identity that holds its network keys; None where there are none. Raises OSError."""
    mark = f"-----BEGIN {LABEL_NETWORK_KEY}-----".encode("ascii")
    return next((path for path in config.identity if mark in path.read_bytes()), None)


def _open(config_path: str | Path) -> tuple[Identity, NodeRegistry, Path]:
    try:
        config = load(config_path)
        identity = Identity.load(config.identity)
        registry = NodeRegistry(Path(config.state_dir) / REGISTRY)
        file = key_file(config)
    except ConfigError as exc:
        raise EnrolError(
            f"{config_path}: {exc.problems[0].message}",
            f"look it over: stpd check --config {config_path}",
            EX_USAGE,
        ) from exc
    except IdentityError as exc:
        raise EnrolError(f"{exc.file}: {exc.cause}", exc.advice, EX_USAGE) from exc
    except StateFileError as exc:
        raise EnrolError(str(exc), "nothing was changed", EX_USAGE) from exc
    except OSError as exc:
        raise _cannot(exc) from exc
    if config.enrol.ca is None:
        raise EnrolError(
            "this node has no CA and gets its network keys from above",
            "say it on the hub that has it",
            EX_USAGE,
        )
    if file is None:
        raise EnrolError("this fleet has no network key", "name a file with one in `identity`", EX_USAGE)
    return identity, registry, file


def _two(identity: Identity) -> tuple[bytes, bytes]:
    if len(identity.network_keys) != MAX_NETWORK_KEYS:
        raise EnrolError("there is one network key only", "begin with: stpd network-key add", EX_USAGE)
    return identity.network_keys[0], identity.network_keys[1]


def _counted(registry: NodeRegistry) -> list[NodeEntry]:
    """Nodes that can come: not revoked, and with a certificate that has not lapsed."""
    now = wall_clock()
    return [n for n in registry.nodes() if not n.revoked and max(n.serials.values(), default=0.0) > now]


def _found(keys: tuple[bytes, ...], registry: NodeRegistry) -> NetworkKeys:
    ids = [network_key_id(key) for key in keys]
    nodes = _counted(registry)
    return NetworkKeys(
        ids=ids,
        senders=[[n.node for n in nodes if n.network[:1] == [key]] for key in ids],
        holders=[[n.node for n in nodes if key in n.network] for key in ids],
        unknown=[n.node for n in nodes if not set(ids) & set(n.network)],
    )


def _write(file: Path, keys: tuple[bytes, ...], registry: NodeRegistry) -> NetworkKeys:
    try:
        replace_keys(file, "".join(map(network_key_pem, keys)))
    except OSError as exc:
        raise _cannot(exc) from exc
    return _found(keys, registry)


def _names(nodes: list[str]) -> str:
    named = ", ".join(nodes[:NAMED])
    return named if len(nodes) <= NAMED else f"{named} and {len(nodes) - NAMED} more"


def _cannot(exc: OSError) -> EnrolError:
    what = f"{exc.filename}: " if exc.filename else ""
    return EnrolError(f"{what}{exc.strerror}", "run as the owner of the identity", EX_CANTCREAT)
