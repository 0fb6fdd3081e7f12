"""Makes the connections of one process, and hands them the identity as its files have it now (protocol §9)."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

import trio

from stp.connection import Connection
from stp.control import Hello
from stp.core.errors import StpError
from stp.core.path import KEEPALIVE
from stp.identity import Address, ContextCache, Identity, TimeFloor
from stp.kept_tokens import KeptTokens
from stp.lifetimes import REHANDSHAKE, Expiry
from stp.lines import Owner
from stp.networks import Here, Networks
from stp.qlog import QlogDirectory
from stp.ways import Ways

log: Final = logging.getLogger("stp.client")

SOFTWARE_VERSION: Final = "0.1.0"
"""What HELLO says of this library."""


class Dialler:
    """Makes the connections of one process: one identity, one target, a hello each."""

    def __init__(
        self,
        target: Address,
        identity: Identity,
        network_key: bytes | None,
        *,
        kind: str,
        run: int,
        rehandshake: float = REHANDSHAKE,
        qlog: str | os.PathLike[str] | None = None,
    ) -> None:
        """`network_key`: instead of those of the identity; None: those, as they are at each dial.

        `qlog`: a directory for event logs, None for what STP_QLOG says, if anything.
        """
        self.target = target
        self.identity = identity
        self.run = run
        self._network_keys = identity.network_keys if network_key is None else (network_key,)
        self._own_key = network_key is not None
        self._kind = kind
        self._rehandshake = rehandshake
        self._nonce = os.urandom(16)
        directory = qlog or os.environ.get("STP_QLOG")
        self._qlog = QlogDirectory(directory) if directory else None
        self._contexts = ContextCache(identity, TimeFloor())
        self._stamp = _stamp(identity.files)
        self._expiry = Expiry()
        beside = identity.files[0] if identity.files and os.path.exists(identity.files[0]) else None
        self._tokens = KeptTokens(f"{beside}.tokens" if beside else None)
        self._place = Here(Networks(f"{beside}.networks" if beside else None))

    def close(self) -> None:
        """Write out the event logs. Call it when all connections are closed."""
        if self._qlog is not None:
            self._qlog.close()

    def connection(
        self,
        source: bytes,
        owner: Owner,
        *,
        keepalive: float = KEEPALIVE,
    ) -> Connection:
        """A connection that introduces itself with this source (16 bytes). `run` it to dial.

        `keepalive`: seconds of silence after which it asks whether the keeper lives.
        """
        identity = self.identity
        software = f"stp/{SOFTWARE_VERSION}"
        hello = Hello(identity.domain, identity.node, source, self.run, self._nonce, self._kind, software)
        ways = Ways(
            self.target,
            identity,
            self._contexts,
            network_keys=lambda: self._network_keys,
            keepalive=keepalive,
            qlog=self._qlog,
            tokens=self._tokens,
            place=self._place,
        )
        return Connection(
            ways,
            hello,
            owner,
            prepare=self._take_renewed,
            rehandshake=self._rehandshake,
            expiry=self._expiry,
        )

    async def _take_renewed(self) -> None:
        """Before each dial: take the identity from its files again, if they have changed."""
        stamp = _stamp(self.identity.files)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            found = await trio.to_thread.run_sync(Identity.load, self.identity.files)
        except StpError as error:
            log.warning("the renewed identity cannot be used: %s", error)
            return
        if (found.domain, found.node) != (self.identity.domain, self.identity.node):
            log.warning("the identity's files now name %s/%s; restart to use it", found.domain, found.node)
            return
        self._contexts.replace(found)
        if not self._own_key:
            self._network_keys = found.network_keys


def _stamp(files: tuple[str, ...]) -> tuple[int, ...]:
    """Changes when a file does; nothing of a file that is not there."""
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            found.append(os.stat(file).st_mtime_ns)
    return tuple(found)
