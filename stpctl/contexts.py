"""Which daemon is meant: one small JSON file each in ~/.config/stpctl/contexts.

The one meant is, in this order: --context, $STPCTL_CONTEXT, what `stpctl context use` chose, the only one there is.
A name with a slash is the path of a file.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from stpctl.errors import CONFIG, CommandError

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_FILE: Final = 64 * 1024
DEFAULT_PORT: Final = 9443
MAKE_ONE: Final = "stpd init makes one; copy its context.json here, or name a file: --context ./context.json"


@dataclass
class Context:
    """A daemon's address and whom to trust and be there."""

    name: str
    url: str
    """https://host:port"""
    node: str
    """The name that the daemon's certificate must bear."""
    certificate: str
    """Path of a PEM bundle: the operator's key and certificate, and the anchors."""

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or DEFAULT_PORT

    def shown(self) -> dict[str, str]:
        return asdict(self)


def directory() -> Path:
    """Where contexts stand; XDG_CONFIG_HOME is honoured."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "stpctl"


def names() -> list[str]:
    """All contexts by name."""
    try:
        return sorted(p.stem for p in (directory() / "contexts").glob("*.json"))
    except OSError:
        return []


def chosen(wanted: str | None) -> str:
    """The name or path of the context that is meant. Raises CommandError."""
    name = wanted or os.environ.get("STPCTL_CONTEXT") or _current()
    if name:
        return name
    known = names()
    if len(known) == 1:
        return known[0]
    if known:
        listed = ", ".join(known)
        raise CommandError(
            f"there are {len(known)} contexts and none is chosen: {listed}", "stpctl context use NAME", CONFIG
        )
    raise CommandError(f"there is no context in {directory() / 'contexts'}", MAKE_ONE, CONFIG)


def _current() -> str:
    try:
        return (directory() / "current").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def use(name: str) -> None:
    """Choose a context for the commands that follow. Raises CommandError."""
    load(name)
    if "/" in name:
        name = str(Path(name).absolute())
    path = directory() / "current"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".current.{os.getpid()}")
        fresh.write_text(name + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as exc:
        raise CommandError(f"cannot write {path}: {exc.strerror}", "check owner and space", CONFIG) from None


def load(name: str) -> Context:
    """Read a context by name or path. Raises CommandError."""
    path = Path(name).expanduser() if "/" in name else directory() / "contexts" / f"{name}.json"
    if "/" not in name and not NAME.fullmatch(name):
        raise CommandError(f"{name!r} is not the name of a context", "stpctl context list", CONFIG)
    try:
        with path.open("rb") as stream:
            data = json.loads(stream.read(MAX_FILE))
    except FileNotFoundError:
        known = ", ".join(names())
        advice = f"known: {known}" if known else MAKE_ONE
        raise CommandError(f"there is no context {name}: no file {path}", advice, CONFIG) from None
    except OSError as exc:
        raise CommandError(f"{path}: {exc.strerror}", "check the path and its owner", CONFIG) from None
    except ValueError:
        raise CommandError(f"{path} is not JSON", MAKE_ONE, CONFIG) from None
    return _checked(path, name, data)


def _checked(path: Path, name: str, data: object) -> Context:
    keys = ("url", "node", "certificate")
    if not isinstance(data, dict) or not all(isinstance(data.get(k), str) and data[k] for k in keys):
        raise CommandError(f"{path} needs {', '.join(keys)}", MAKE_ONE, CONFIG)
    try:
        url = urlsplit(data["url"])
        good = url.scheme == "https" and bool(url.hostname) and url.port != 0 and url.path in ("", "/")
    except ValueError:
        good = False
    if not good:
        raise CommandError(
            f"{path}: {data['url']!r} is not an address", 'write "https://127.0.0.1:9443"', CONFIG
        )
    certificate = path.parent / Path(data["certificate"]).expanduser()
    return Context(
        name=str(data.get("name") or Path(name).stem),
        url=data["url"],
        node=data["node"],
        certificate=str(certificate),
    )
