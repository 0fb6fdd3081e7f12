"""Who this node is: key, certificate chain, anchors, network keys, and the time certificates are judged by.

One PEM bundle, or several files read as one: the private key, the leaf (the certificate that matches it),
intermediates, anchors (self-signed), up to two ``STP NETWORK KEY`` blocks (32 bytes; the first is used to
send) and at most one ``STP UPSTREAM`` block (JSON: node, url, time). Unknown blocks are ignored.

(1) Whatever is wrong with a bundle is an IdentityError: it names the file, the cause and what to do.
(2) The verification time is never below the floor, so a machine that starts in 1970 accepts certificates made
    since (protocol §4); nor above the own notAfter - 1 s where the kernel calls its clock unsynchronised.
(3) The floor only rises, and it counts up to the own notAfter - 1 s: no peer's clock locks this node out.
(4) Secrets do not appear in repr().
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from attrs import define, field
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from OpenSSL import SSL

from stp.core.errors import StpError
from stp.core.handshake import (
    UNREADABLE,
    TlsCredentials,
    TlsSettings,
    fully_parsed,
    identity_of,
    make_context,
)

BUILD_TIME: Final = 1_793_491_200.0
"""Unix seconds, 2026-11-01: no clock that shows less is right. Moved forward with each release."""

DEFAULT_PORT: Final = 9000
TLS_PORT: Final = 8443
UNIX_SCHEME: Final = "stp+unix://"
"""UDP port of protocol §1."""

ENROL_PORT: Final = 8443
"""TCP port of enrolment, protocol §11."""

NETWORK_KEY_SIZE: Final = 32
MAX_NETWORK_KEYS: Final = 2
MAX_BUNDLE: Final = 256 * 1024
"""Bytes of one identity file. A bundle is a few kilobytes."""

SERVER_CONTEXT_LIFE: Final = 60.0
"""Seconds a listener's context serves before its verification time is set anew."""

FLOOR_WRITE_STEP: Final = 3600.0
"""Seconds the floor must have moved before it is written again: flash wears, and an hour decides nothing."""

LABEL_NETWORK_KEY: Final = "STP NETWORK KEY"
LABEL_UPSTREAM: Final = "STP UPSTREAM"

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,64})-----[ \t]*\r?\n(.*?)-----END \1-----", re.DOTALL)
_NODE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_SYNCHRONISED_MARK: Final = "/run/systemd/timesync/synchronized"
_STA_UNSYNC: Final = 0x0040
_TIME_ERROR: Final = 5
_AT_HWCAP: Final = 16
_HWCAP_AES: Final = 1 << 3
"""Of aarch64."""


class IdentityError(StpError):
    """An identity cannot be used. `cause` says why, `advice` what to do, `file` where (may be empty)."""

    def __init__(self, cause: str, advice: str, file: str = "") -> None:
        super().__init__(f"{file}: {cause} ({advice})" if file else f"{cause} ({advice})")
        self.cause = cause
        self.advice = advice
        self.file = file


@define
class Upstream:
    """Where enrolment told this node to dial."""

    node: str
    url: str
    time: float = 0.0
    """Unix seconds at the hub when it issued the certificate; 0 where it did not say."""


@define
class Address:
    """A dialling target, from `stp://[node@]host[:port]` or `stp+unix:///path`."""

    node: str
    host: str
    port: int = DEFAULT_PORT
    path: str = ""
    """Of a Unix socket; `host` and `port` mean nothing then."""
    tls: int = TLS_PORT
    """TCP port for TLS, where UDP does not get through; 0: do not try."""

    @property
    def where(self) -> str:
        """As people write it."""
        return self.path or f"{self.host}:{self.port}"


@define
class Identity:
    """A loaded bundle. Make one with `load` or `parse`."""

    domain: str
    node: str
    credentials: TlsCredentials = field(repr=False)
    network_keys: tuple[bytes, ...] = field(repr=False)
    upstream: Upstream | None
    not_before: datetime
    not_after: datetime
    serial: int
    files: tuple[str, ...] = ()

    @classmethod
    def local(cls, domain: str, node: str) -> Identity:
        """For a Unix socket, where the daemon says who we are: no key, no certificate, no end."""
        nothing = TlsCredentials((b"",), b"", ())
        begin = datetime.min.replace(year=1970, tzinfo=UTC)
        return cls(domain, node, nothing, (), None, begin, datetime.max.replace(tzinfo=UTC), 0)

    @property
    def leaf_der(self) -> bytes:
        return self.credentials.chain_der[0]

    @property
    def issued(self) -> float:
        """Unix seconds before which this identity did not exist: a lower bound of the true time."""
        return max(self.not_before.timestamp(), self.upstream.time if self.upstream else 0.0)

    @classmethod
    def load(cls, paths: str | Path | Sequence[str | Path]) -> Identity:
        """Read one bundle from one or several files. Blocking. Raises IdentityError (1)."""
        if isinstance(paths, str | Path):
            paths = [paths]
        files = tuple(str(path) for path in paths)
        if not files:
            raise IdentityError("no identity file is named", "set `identity` in the configuration")
        return cls.parse([(file, _read_bundle(file)) for file in files])

    @classmethod
    def parse(cls, bundle: Sequence[tuple[str, bytes]]) -> Identity:
        """Make an identity from (file name, PEM bytes) pairs. Raises IdentityError (1)."""
        parts = _Parts()
        for file, data in bundle:
            parts.add(file, data)
        return parts.identity(tuple(file for file, _ in bundle))


@define
class _Parts:
    """What the files of one bundle held, in order."""

    keys: list[tuple[str, PrivateKeyTypes]] = field(factory=list, repr=False)
    certificates: list[tuple[str, x509.Certificate]] = field(factory=list)
    network_keys: list[bytes] = field(factory=list, repr=False)
    upstream: Upstream | None = None

    def add(self, file: str, data: bytes) -> None:
        for match in _BLOCK.finditer(data):
            label = match[1].decode("ascii")
            if label == "CERTIFICATE":
                self.certificates.append((file, _certificate(file, match[0])))
            elif label.endswith("PRIVATE KEY"):
                self.keys.append((file, _private_key(file, match[0])))
            elif label == LABEL_NETWORK_KEY:
                self.network_keys.append(_network_key(file, match[2]))
            elif label == LABEL_UPSTREAM:
                self.upstream = _upstream(file, match[2])

    def identity(self, files: tuple[str, ...]) -> Identity:
        where = files[0]
        if len(self.keys) != 1:
            found = "no private key" if not self.keys else f"{len(self.keys)} private keys"
            raise IdentityError(f"{found} found, one is needed", "join again, or name the right files", where)
        if len(self.network_keys) > MAX_NETWORK_KEYS:
            raise IdentityError(
                "more than two network keys", "keep the new one first and the old one second", where
            )
        key_file, key = self.keys[0]
        leaf_file, leaf = self._leaf(key_file, key)
        leaf_der = _der(leaf)
        try:
            domain, node = identity_of(leaf_der)
        except StpError as exc:
            raise IdentityError(
                f"the certificate names no node: {exc}", "it needs a URI SAN stp://<domain>/<node>", leaf_file
            ) from exc
        anchors = [_der(certificate) for _, certificate in self.certificates if _self_signed(certificate)]
        if not anchors:
            raise IdentityError(
                "no anchor (CA certificate) found", "add the CA's certificate to the bundle", where
            )
        chain = [leaf_der]
        chain += [
            der
            for der in (_der(certificate) for _, certificate in self.certificates)
            if der != leaf_der and der not in anchors
        ]
        key_der = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Identity(
            domain=domain,
            node=node,
            credentials=TlsCredentials(tuple(chain), key_der, tuple(anchors)),
            network_keys=tuple(self.network_keys),
            upstream=self.upstream,
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            serial=leaf.serial_number,
            files=files,
        )

    def _leaf(self, key_file: str, key: PrivateKeyTypes) -> tuple[str, x509.Certificate]:
        own = _spki(key.public_key())
        for file, certificate in self.certificates:
            if _spki(certificate.public_key()) == own:
                return file, certificate
        raise IdentityError(
            "no certificate matches the private key",
            "key and certificate come from different enrolments: join again",
            key_file,
        )


def _read_bundle(file: str) -> bytes:
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_BUNDLE + 1)
    except FileNotFoundError as exc:
        raise IdentityError(
            "no such file", "join first: stpd join TOKEN --hub HOST, or stp join", file
        ) from exc
    except PermissionError as exc:
        raise IdentityError(
            "not readable by this user", "run as its owner, or use LoadCredential", file
        ) from exc
    except OSError as exc:
        raise IdentityError(exc.strerror or str(exc), "check the path", file) from exc
    if len(data) > MAX_BUNDLE:
        raise IdentityError(f"larger than {MAX_BUNDLE} bytes", "this is not an identity bundle", file)
    return data


def _certificate(file: str, pem: bytes) -> x509.Certificate:
    try:
        return fully_parsed(x509.load_pem_x509_certificate(pem))
    except UNREADABLE as exc:
        raise IdentityError(
            "a certificate in it is damaged", "restore the file, or join again", file
        ) from exc


def _private_key(file: str, pem: bytes) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError as exc:
        raise IdentityError("the private key is encrypted", "store it in the clear, mode 0600", file) from exc
    except UNREADABLE as exc:
        raise IdentityError("the private key is damaged", "restore the file, or join again", file) from exc


def _block(file: str, what: str, body: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error as exc:
        raise IdentityError(
            f"the {what} block is not base64", "restore the file, or join again", file
        ) from exc


def _network_key(file: str, body: bytes) -> bytes:
    key = _block(file, LABEL_NETWORK_KEY, body)
    if len(key) != NETWORK_KEY_SIZE:
        raise IdentityError(f"a network key of {len(key)} bytes", "it must have 32 bytes", file)
    return key


def _upstream(file: str, body: bytes) -> Upstream:
    try:
        found = json.loads(_block(file, LABEL_UPSTREAM, body))
        return Upstream(node=str(found["node"]), url=str(found["url"]), time=float(found.get("time", 0.0)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise IdentityError("the upstream block is damaged", "restore the file, or join again", file) from exc


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _spki(key: object) -> bytes:
    spki: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return spki


def _self_signed(certificate: x509.Certificate) -> bool:
    if certificate.issuer != certificate.subject:
        return False
    try:
        certificate.verify_directly_issued_by(certificate)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True


def pem_block(label: str, data: bytes) -> str:
    """One PEM block with lines of 64 characters (RFC 7468 §2)."""
    text = base64.b64encode(data).decode("ascii")
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


def network_key_pem(key: bytes) -> str:
    return pem_block(LABEL_NETWORK_KEY, key)


def network_key_id(key: bytes) -> str:
    """What a network key is called where it may be seen: eight hexadecimal digits."""
    return hashlib.sha256(b"stp1 network key id" + key).hexdigest()[:8]


def upstream_pem(upstream: Upstream) -> str:
    found = {"node": upstream.node, "url": upstream.url, "time": upstream.time}
    return pem_block(LABEL_UPSTREAM, json.dumps(found).encode())


def check_node_name(name: str) -> None:
    """Lower-case letters, digits, dot, dash and underscore, at most 63, first and last a letter or digit.

    Narrower than what a certificate may say: names stand in topics, URLs and file names.
    Raises IdentityError.
    """
    if not _NODE_NAME.fullmatch(name):
        raise IdentityError(
            f"{name!r} is not a node name",
            "use at most 63 of a-z 0-9 . _ - and begin and end with a letter or digit",
        )


def unix_path(url: str) -> str:
    """The path of `stp+unix:///path`; "" for any other URL."""
    path = url.removeprefix(UNIX_SCHEME)
    return path if path != url and path.startswith("/") else ""


def parse_url(url: str, upstream: Upstream | None = None) -> Address:
    """Read `stp://[node@]host[:port][?tls=port]`; the node defaults to that of `upstream`. Raises IdentityError."""
    advice = "write stp://[node@]host[:port][?tls=port], or stp+unix:///path/of/socket; tls=0 is UDP only"
    path = unix_path(url)
    if path:
        return Address("", "", 0, path)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise IdentityError(f"{url!r} is not an address: {exc}", advice) from exc
    if parts.scheme != "stp" or not host:
        raise IdentityError(f"{url!r} is not an stp:// address", advice)
    name, _, tls = parts.query.partition("=")
    good = not parts.query or (name == "tls" and tls.isdecimal() and len(tls) <= 5 and int(tls) < 65_536)
    if not good:
        raise IdentityError(f"{url!r} asks for {parts.query!r}, which means nothing", advice)
    if parts.path not in ("", "/") or parts.fragment or parts.password is not None:
        raise IdentityError(f"{url!r} has more than a node, a host and a port", advice)
    node = parts.username or (upstream.node if upstream else "")
    if not node:
        raise IdentityError(f"{url!r} does not say which node answers there", "write stp://node@host")
    return Address(node, host, port or DEFAULT_PORT, tls=int(tls) if parts.query else TLS_PORT)


def write_atomically(path: str | Path, data: bytes, mode: int = 0o600, *, sync: bool = True) -> None:
    """Replace a file as a whole, with `mode`. Blocking. Raises OSError; then the old file stands.

    `sync` False: for what may be lost in a power cut, and would only wear the flash.
    """
    path = Path(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with 0600
    try:
        with os.fdopen(fd, "wb") as stream:
            os.fchmod(fd, mode)
            stream.write(data)
            stream.flush()
            if sync:
                os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if not sync:
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2) up to `status`; the rest, and its growth, are room we do not read."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def kernel_synchronised() -> bool:
    """Whether something disciplines the system clock. False where nobody can say.

    The shipped units forbid adjtimex(2) with the rest of the clock calls; there the mark of systemd-timesyncd
    decides. False costs little: it only keeps the verification time below the own notAfter.
    """
    if os.path.exists(_SYNCHRONISED_MARK):
        return True
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return False
    timex = _Timex()
    state = adjtimex(ctypes.byref(timex))
    return state not in (-1, _TIME_ERROR) and not timex.status & _STA_UNSYNC


def cpu_has_aes() -> bool:
    """Whether the CPU has AES instructions; True where the kernel does not say (R-3-4).

    ARM is asked by the auxiliary vector, for units with ProcSubset=pid see no /proc/cpuinfo; without it, x86 has
    them.
    """
    if platform.machine() == "aarch64":
        try:
            getauxval = ctypes.CDLL(None).getauxval
        except (OSError, AttributeError):
            return True
        getauxval.restype = ctypes.c_ulong
        return bool(getauxval(_AT_HWCAP) & _HWCAP_AES)
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return True
    return re.search(r"^(?:flags|Features)\s*:.*\baes\b", text, re.MULTILINE) is not None


def verification_time(*, clock: float, floor: float, synchronised: bool, not_after: float) -> datetime:
    """The time certificates are judged by (protocol §4); (2), (3). All in Unix seconds (R-4-10)."""
    latest = not_after - 1.0
    now = max(clock, min(floor, latest))
    if not synchronised:
        now = min(now, latest)
    return datetime.fromtimestamp(now, UTC)


class TimeFloor:
    """The latest time known to have passed: the package's build, or a hub's time heard and kept in a file.

    R-4-10.
    """

    def __init__(self, path: str | Path | None = None, *, build_time: float = BUILD_TIME) -> None:
        self._path = Path(path) if path is not None else None
        self._build_time = build_time
        self._written = self._read()
        self._heard = self._written
        self.write_errors = 0
        """Times the file could not be written. The floor then holds in memory only."""

    def _read(self) -> float:
        if self._path is None:
            return 0.0
        try:
            found = float(self._path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0.0
        return found if math.isfinite(found) else 0.0

    @property
    def seconds(self) -> float:
        """Unix seconds; never falls."""
        return max(self._build_time, self._heard)

    def heard(self, unix_s: float) -> None:
        """An authenticated upstream says what time it is.

        Written, and waited for, at most once per hour of progress.
        """
        if not math.isfinite(unix_s) or unix_s <= self._heard:
            return
        self._heard = unix_s
        if self._path is None or unix_s - self._written < FLOOR_WRITE_STEP:
            return
        try:
            write_atomically(self._path, f"{unix_s:.0f}\n".encode("ascii"))
        except OSError:
            self.write_errors += 1
        else:
            self._written = unix_s


class ContextCache:
    """Hands out TLS contexts whose verification time is right: fresh for a dial, kept 60 s for a listener."""

    def __init__(
        self,
        identity: Identity,
        floor: TimeFloor,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        synchronised: Callable[[], bool] = kernel_synchronised,
        aes_preferred: bool | None = None,
    ) -> None:
        self.identity = identity
        self.floor = floor
        self._clock = clock
        self._monotonic = monotonic
        self._synchronised = synchronised
        self._aes_preferred = cpu_has_aes() if aes_preferred is None else aes_preferred
        self._server: SSL.Context | None = None
        self._server_until = 0.0

    def leaf_der(self) -> bytes:
        """The own certificate as of now; after `replace` the new one."""
        return self.identity.leaf_der

    def verification_time(self) -> datetime:
        return verification_time(
            clock=self._clock(),
            floor=max(self.floor.seconds, self.identity.issued),
            synchronised=self._synchronised(),
            not_after=self.identity.not_after.timestamp(),
        )

    def tls(self, server: bool) -> SSL.Context:
        """A context for one handshake; what `EndpointConfig.tls` asks for."""
        if not server:
            return self._make(server=False)
        now = self._monotonic()
        if self._server is None or now >= self._server_until:
            self._server = self._make(server=True)
            self._server_until = now + SERVER_CONTEXT_LIFE
        return self._server

    def replace(self, identity: Identity) -> None:
        """Use another identity from the next handshake on. Sessions that stand are not touched."""
        self.identity = identity
        self._server = None

    def _make(self, *, server: bool) -> SSL.Context:
        settings = TlsSettings(self.identity.credentials, self.verification_time(), self._aes_preferred)
        return make_context(settings, server)
