"""What the hub remembers of enrolment: join tokens, and the nodes that came of them.

Two JSON files, written as a whole and synced before a method returns. Methods may be called from worker
threads; those that change something block for the disk.

(1) A token's secret is not in the file: only its SHA-256, compared in constant time.
(2) A token is judged by this machine's clock, never by the joiner's.
(3) A name belongs to the key that enrolled it. The same key may ask again, another may not, until the name is
    forgotten.
(4) A revocation outlives the node's entry: it is kept until the certificate would have ended, and a year on.
(5) What an upstream revokes counts as if it were revoked here, at most MAX_REVOKED in all: those that count longest.
(6) A damaged file is an error, never an empty list: an empty one would forget revocations.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import cattrs
from attrs import Factory, define

from stp.core.errors import StpError
from stp.enrol import JoinToken, Refusal, new_token
from stp.identity import write_atomically
from stpd.pki import NODE_LIFETIME, Clock, wall_clock
from stpd.status import KeyStatus, NewKey

ROLES: Final = ("gateway", "device", "app")
MAX_TOKENS: Final = 1000
"""Tokens at once. Ended ones go after TOKEN_MEMORY, or earlier to make room."""
TOKEN_MEMORY: Final = 30 * 86400.0
"""Seconds for which an ended token is still listed, so that a latecomer is told why."""
MAX_TAGS: Final = 16
MAX_TAG: Final = 64
MAX_NODES: Final = 100_000
MAX_REVOKED: Final = 16_384
"""Serials that are remembered as revoked."""
MAX_REASON: Final = 200
"""Characters of an operator's reason."""
RENEWAL_GRACE: Final = NODE_LIFETIME.total_seconds()
"""Seconds after notAfter for which a certificate still renews: one lifetime (protocol §11)."""


class StateFileError(StpError):
    """A file of ours is damaged or cannot be read. The text names it, and what to do."""


class RefusedError(StpError):
    """Enrolment is refused. `refusal` is for the machine, `cause` and `advice` are for a person."""

    def __init__(self, refusal: Refusal, cause: str, advice: str) -> None:
        super().__init__(f"{cause} ({advice})")
        self.refusal = refusal
        self.cause = cause
        self.advice = advice


@define(kw_only=True)
class TokenEntry:
    """One join token as it is kept. Times are Unix seconds."""

    id: str
    role: str
    hash: str
    """SHA-256 of the secret, hexadecimal."""
    uses: int
    """How many may join with it; 0: any number."""
    used: int = 0
    created: float
    expires: float
    """0: never."""
    revoked: bool = False
    tags: list[str] = Factory(list)

    def ended(self, now: float) -> bool:
        spent = self.uses and self.used >= self.uses
        return bool(self.revoked or spent or (self.expires and now >= self.expires))


@define(kw_only=True)
class NodeEntry:
    """One node as it is kept. Times are Unix seconds."""

    node: str
    role: str
    key: str
    """SHA-256 of its public key, hexadecimal."""
    serials: dict[str, float] = Factory(dict)
    """Its certificates that still count: serial (hexadecimal) -> notAfter. The last one is the newest."""
    enrolled_at: float
    renewed_at: float = 0.0
    token: str = ""
    tags: list[str] = Factory(list)
    network: list[str] = Factory(list)
    """The network keys that it was given last, by `network_key_id`; it sends with the first."""
    revoked: bool = False
    reason: str = ""
    """Why it was revoked, in the operator's words."""


@define
class _Tokens:
    version: int = 1
    tokens: list[TokenEntry] = Factory(list)


@define
class _Nodes:
    version: int = 1
    nodes: dict[str, NodeEntry] = Factory(dict)
    revoked: dict[str, float] = Factory(dict)
    """Serial (hexadecimal) -> Unix seconds after which it may be forgotten."""


T = TypeVar("T", _Tokens, _Nodes)


def _load(path: Path, kind: type[T]) -> T:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return kind()
    except OSError as exc:
        raise StateFileError(f"{path}: {exc.strerror} (run as its owner)") from exc
    try:
        found: Any = json.loads(text)
        if found["version"] == 1 and found.keys() == attrs.fields_dict(kind).keys():
            return cattrs.structure(found, kind)
    except (ValueError, KeyError, TypeError, AttributeError, cattrs.BaseValidationError) as exc:
        raise StateFileError(f"{path}: damaged (restore it from a backup)") from exc
    raise StateFileError(f"{path}: not a file of this version (upgrade stpd, or restore it from a backup)")


def _save(path: Path, content: _Tokens | _Nodes) -> None:
    write_atomically(path, json.dumps(attrs.asdict(content), indent=1).encode() + b"\n")


class JoinTokens:
    """The join tokens of one hub. Raises StateFileError when it cannot be loaded."""

    def __init__(self, path: str | Path, ca_der: bytes, clock: Clock = wall_clock) -> None:
        self._path = Path(path)
        self._ca_der = ca_der
        self._clock = clock
        self._lock = threading.Lock()
        self._content = _load(self._path, _Tokens)

    def create(self, role: str, uses: int, ttl_s: float, tags: list[str] | None = None) -> NewKey:
        """Make a token for `uses` nodes (0: any number) and `ttl_s` seconds (0: for ever).

        Raises ValueError with a text for people, OSError where it cannot be saved.
        """
        tags = tags or []
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
        if not 0 <= uses <= MAX_NODES or not 0 <= ttl_s < 100 * 366 * 86400:
            raise ValueError("uses and ttl must not be negative, nor beyond reason")
        if len(tags) > MAX_TAGS or any(not 0 < len(tag) <= MAX_TAG or not tag.isprintable() for tag in tags):
            raise ValueError(f"at most {MAX_TAGS} tags of 1 to {MAX_TAG} printable characters")
        token = new_token(self._ca_der)
        now = self._clock()
        entry = TokenEntry(
            id=token.id,
            role=role,
            hash=hashlib.sha256(token.secret).hexdigest(),
            uses=uses,
            created=now,
            expires=now + ttl_s if ttl_s else 0.0,
            tags=list(tags),
        )
        with self._lock:
            kept = [e for e in self._content.tokens if not (e.ended(now) and now - e.created > TOKEN_MEMORY)]
            if len(kept) >= MAX_TOKENS:
                kept = [e for e in kept if not e.ended(now)]
            if len(kept) >= MAX_TOKENS:
                raise ValueError(f"{MAX_TOKENS} tokens are open: revoke some first")
            self._replace([*kept, entry])
        return NewKey(id=entry.id, token=token.encode(), expires_ms=int(entry.expires * 1000))

    def check(self, token: JoinToken) -> TokenEntry:
        """The entry of a token that is good at this moment, (1), (2). Raises RefusedError."""
        digest = hashlib.sha256(token.secret).hexdigest()
        with self._lock:
            entry = next((e for e in self._content.tokens if e.id == token.id), None)
        if entry is None or not hmac.compare_digest(entry.hash, digest):
            raise RefusedError(
                Refusal.TOKEN_UNKNOWN, "this hub has not issued this token", "make one: stpctl keys create"
            )
        return entry

    def check_open(self, entry: TokenEntry) -> None:
        """Raises RefusedError where the token has ended, and says by what."""
        advice = "make a new one: stpctl keys create"
        if entry.revoked:
            raise RefusedError(Refusal.TOKEN_REVOKED, "the token has been revoked", advice)
        if entry.expires and self._clock() >= entry.expires:
            raise RefusedError(Refusal.TOKEN_EXPIRED, "the token has expired", advice)
        if entry.uses and entry.used >= entry.uses:
            raise RefusedError(
                Refusal.TOKEN_USED, f"the token has been used {entry.used} times, as allowed", advice
            )

    def spend(self, token_id: str) -> None:
        """Count one use."""
        with self._lock:
            tokens = [
                attrs.evolve(e, used=e.used + 1) if e.id == token_id else e for e in self._content.tokens
            ]
            self._replace(tokens)

    def revoke(self, token_id: str) -> bool:
        """End a token; False where there is none of that id. Nodes that joined with it stay."""
        with self._lock:
            if all(e.id != token_id for e in self._content.tokens):
                return False
            tokens = [attrs.evolve(e, revoked=True) if e.id == token_id else e for e in self._content.tokens]
            self._replace(tokens)
        return True

    def list(self) -> list[KeyStatus]:
        """All that are remembered, the newest last, without their secrets."""
        with self._lock:
            tokens = self._content.tokens
        return [
            KeyStatus(
                id=e.id,
                role=e.role,
                uses=e.uses,
                used=e.used,
                created_ms=int(e.created * 1000),
                expires_ms=int(e.expires * 1000),
                revoked=e.revoked,
                tags=[*e.tags],
            )
            for e in tokens
        ]

    def _replace(self, tokens: Iterable[TokenEntry]) -> None:
        """On disk first: what could not be written did not happen."""
        content = _Tokens(tokens=[*tokens])
        _save(self._path, content)
        self._content = content


class NodeRegistry:
    """Which node has which role, and which certificates are revoked.

    Raises StateFileError when it cannot be loaded. `role_of` and `is_revoked` are two dictionary look-ups:
    they may be asked in every handshake.
    """

    def __init__(self, path: str | Path, clock: Clock = wall_clock) -> None:
        self._path = Path(path)
        self._clock = clock
        self._lock = threading.Lock()
        self._content = _load(self._path, _Nodes)
        self.generation = 0
        """Grows with every change of what is revoked."""
        self.unsaved = False
        """Something that was learned is in memory only."""
        self._added: list[tuple[int, str]] = []
        """(generation, serial) of what was revoked since the start."""

    def role_of(self, node: str) -> str | None:
        """The role it was enrolled with; None where it was not enrolled here."""
        entry = self._content.nodes.get(node)
        return entry.role if entry is not None else None

    def is_revoked(self, serial: int) -> bool:
        return f"{serial:x}" in self._content.revoked

    def get(self, node: str) -> NodeEntry | None:
        return self._content.nodes.get(node)

    def nodes(self) -> list[NodeEntry]:
        return list(self._content.nodes.values())

    def check_name(self, node: str, key: str) -> NodeEntry | None:
        """The entry of a node that comes again with its own key, None for a new name; (3).

        Raises RefusedError.
        """
        entry = self._content.nodes.get(node)
        if entry is None:
            if len(self._content.nodes) >= MAX_NODES:
                raise RefusedError(
                    Refusal.UNAVAILABLE, f"{MAX_NODES} nodes are enrolled", "forget some first"
                )
            return None
        if entry.revoked:
            raise RefusedError(Refusal.NODE_REVOKED, f"{node} is revoked", "join under another name")
        if not hmac.compare_digest(entry.key, key):
            raise RefusedError(
                Refusal.NAME_TAKEN,
                f"the name {node} belongs to another key",
                "choose another --name, or have the operator forget that node",
            )
        return entry

    def enrol(
        self,
        node: str,
        role: str,
        *,
        key: str,
        serial: int,
        not_after: float,
        token: str = "",
        tags: list[str] | None = None,
        network: list[str] | None = None,
    ) -> None:
        """Note a certificate that is about to be handed out. Raises OSError; then it must not be."""
        now = self._clock()
        with self._lock:
            old = self._content.nodes.get(node)
            serials = {s: end for s, end in old.serials.items() if end + RENEWAL_GRACE > now} if old else {}
            serials[f"{serial:x}"] = not_after
            entry = NodeEntry(
                node=node,
                role=role,
                key=key,
                serials=serials,
                enrolled_at=old.enrolled_at if old else now,
                renewed_at=now if old else 0.0,
                token=token or (old.token if old else ""),
                tags=list(tags if tags is not None else old.tags if old else ()),
                network=list(network or ()),
            )
            self._save({**self._content.nodes, node: entry}, self._content.revoked)

    def revoke(self, node: str, reason: str = "") -> list[int]:
        """Revoke all certificates of a node and its name; the serials, [] where there is no such node."""
        with self._lock:
            entry = self._content.nodes.get(node)
            if entry is None:
                return []
            fresh = attrs.evolve(entry, revoked=True, reason=reason[:MAX_REASON])
            self._save({**self._content.nodes, node: fresh}, self._with_revoked(entry))
        return [int(serial, 16) for serial in entry.serials]

    def forget(self, node: str) -> list[int]:
        """Free a name for another key. Its certificates are revoked; returns their serials."""
        with self._lock:
            entry = self._content.nodes.get(node)
            if entry is None:
                return []
            nodes = {name: e for name, e in self._content.nodes.items() if name != node}
            self._save(nodes, self._with_revoked(entry))
        return [int(serial, 16) for serial in entry.serials]

    def revoked_since(self, generation: int) -> dict[int, int]:
        """Serial -> Unix seconds until which it counts: what was revoked after that generation; -1: all there is."""
        revoked = self._content.revoked
        if generation < 0:
            return {int(serial, 16): int(until) for serial, until in revoked.items()}
        fresh = (serial for at, serial in self._added if at > generation)
        return {int(serial, 16): int(revoked[serial]) for serial in fresh if serial in revoked}

    def learn(self, serials: dict[int, int]) -> bool:
        """Revoked at the hub (5); False where all of it was known. In memory; `save` writes it."""
        with self._lock:
            now, known = self._clock(), self._content.revoked
            fresh = {f"{s:x}": float(until) for s, until in serials.items() if until > now}
            fresh = {serial: until for serial, until in fresh.items() if until > known.get(serial, 0.0)}
            if not fresh:
                return False
            self._take(_Nodes(nodes=self._content.nodes, revoked=_longest(known | fresh, now)))
            self.unsaved = True
        return True

    def save(self) -> None:
        """Write what was learned. Blocking. Raises OSError; what was learned stays in force."""
        with self._lock:
            _save(self._path, self._content)
            self.unsaved = False

    def reread(self) -> None:
        """Take the file as it is now, where somebody changed it; nothing learned or revoked is forgotten.

        Blocking. Raises StateFileError; then nothing has changed.
        """
        with self._lock:
            found = _load(self._path, _Nodes)
            revoked = _longest(self._content.revoked | found.revoked, self._clock())
            self._take(_Nodes(nodes=found.nodes, revoked=revoked))

    def _with_revoked(self, entry: NodeEntry) -> dict[str, float]:
        fresh = {serial: end + RENEWAL_GRACE for serial, end in entry.serials.items()}
        return _longest(self._content.revoked | fresh, self._clock())

    def _save(self, nodes: dict[str, NodeEntry], revoked: dict[str, float]) -> None:
        """On disk first: what could not be written did not happen."""
        content = _Nodes(nodes=nodes, revoked=revoked)
        _save(self._path, content)
        self.unsaved = False
        self._take(content)

    def _take(self, content: _Nodes) -> None:
        fresh = content.revoked.keys() - self._content.revoked.keys()
        self._content = content
        if fresh:
            self.generation += 1
            self._added = [*self._added, *((self.generation, serial) for serial in fresh)][-MAX_REVOKED:]


def _longest(revoked: dict[str, float], now: float) -> dict[str, float]:
    """Those that still count, the longest MAX_REVOKED of them (5)."""
    kept = {serial: until for serial, until in revoked.items() if until > now}
    if len(kept) > MAX_REVOKED:
        kept = dict(sorted(kept.items(), key=lambda one: one[1], reverse=True)[:MAX_REVOKED])
    return kept
