"""Reads a configuration file into `stpd.schema.Config`, or says all that is wrong with it.

(1) All errors are found in one reading; each has the path of the key, what is wrong and what to do.
(2) Nothing is guessed: "false" is no boolean, 10 is no duration, 1.0 is no count, an unknown key is an error.
(3) Relative paths are relative to the file; $CREDENTIALS_DIRECTORY/name is a systemd credential.
(4) A secret beside the file that systemd has loaded under the same name is taken from there.
"""

import os
import re
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, override

from stp.identity import Identity, IdentityError
from stpd import schema
from stpd.checks import check
from stpd.problems import SECRET, BadValueError, Problem, nearest, render, shown
from stpd.schema import (
    BUILT_IN_CLASSES,
    ROLE_DEFAULTS,
    AccessRule,
    ClassConfig,
    Config,
    EnrolConfig,
    HealthConfig,
    LimitsConfig,
    ListenConfig,
    LogConfig,
    ManagementConfig,
    StoreConfig,
    TransportConfig,
    UpstreamConfig,
)

__all__ = [
    "AccessRule",
    "ClassConfig",
    "Config",
    "ConfigError",
    "EnrolConfig",
    "HealthConfig",
    "LimitsConfig",
    "ListenConfig",
    "LogConfig",
    "ManagementConfig",
    "Problem",
    "StoreConfig",
    "TransportConfig",
    "UpstreamConfig",
    "changes",
    "check_config",
    "load",
    "parse",
    "read_duration",
    "read_size",
    "render",
]

EX_CONFIG: Final = 78
"""Exit status for a configuration that cannot be used (sysexits.h)."""
MAX_FILE: Final = 1024 * 1024
"""Bytes of a configuration file."""
CREDENTIALS: Final = "$CREDENTIALS_DIRECTORY/"

SPELLED: Final = {"classes": "class", "upstreams": "upstream", "access": "access"}
"""Attribute of Config -> name of its table in the file, where they differ, and all that repeat."""

DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
DURATION_HINT: Final = 'write a number and a unit, such as "20ms", "5s", "10m", "72h" or "7d"'
SIZE_HINT: Final = 'write a number and a unit, such as "64KiB", "512MiB" or "1GB"'
PATH_HINT: Final = 'write a path, such as "identity.pem"'


class ConfigError(Exception):
    """A configuration cannot be used. `problems` has all of them, warnings too; the text is for people."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        super().__init__(render(file, problems))
        self.file = file
        self.problems = problems


def load(path: str | Path) -> Config:
    """Read a file. Raises ConfigError with every problem there is; the file's warnings are dropped."""
    config, problems = parse(path)
    if config is None or any(not p.warning for p in problems):
        raise ConfigError(str(path), problems)
    return config


def parse(path: str | Path) -> tuple[Config | None, list[Problem]]:
    """Read a file into a configuration and all its problems, warnings included. Never raises.

    None: values are missing or of the wrong kind, and what they would mean together was not looked at.
    """
    path = Path(path)
    try:
        text = _read(path)
        data = tomllib.loads(text)
    except BadValueError as exc:
        return None, [Problem(path="", message=str(exc), hint=exc.hint)]
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError; numbers too long; nested too deep
        hint = "quote text, and close every quote and bracket"
        return None, [Problem(path="", message=f"not TOML: {exc}", hint=hint)]
    base = path.absolute().parent
    try:
        config = _converter(base).structure(_with_defaults(data), Config)
    except cattrs.BaseValidationError as exc:
        return None, _problems_of(exc, "")
    problems = check(config)
    return _finish(config, base), problems


def check_config(path: str | Path) -> list[Problem]:
    """All that is wrong or unwise with a file and with the identity it names. Never raises; reads files."""
    config, problems = parse(path)
    if config is not None:
        problems += _check_identity(config)
    return problems


def _check_identity(config: Config) -> list[Problem]:
    try:
        identity = Identity.load(config.identity)
    except IdentityError as exc:
        message = f"{exc.file}: {exc.cause}" if exc.file else exc.cause
        return [Problem(path="identity", message=message, hint=exc.advice)]
    found = []
    for n, upstream in enumerate(config.upstreams):
        names = [upstream.node, upstream.url.partition("://")[2].rpartition("@")[0]]
        hint = "name the node above it"
        if identity.node in names:
            found.append(
                Problem(path=f"upstream[{n}]", message=f"{identity.node} is this node itself", hint=hint)
            )
        elif not any(names) and identity.upstream is None:
            message, hint = "does not say which node answers there", "write stp://node@host"
            found.append(Problem(path=f"upstream[{n}].url", message=message, hint=hint))
    if config.role == "gateway" and not config.upstreams and identity.upstream is None:
        message = "nothing goes up: neither this file nor the identity names an upstream"
        hint = "join a hub, or add an [[upstream]] table"
        found.append(Problem(path="upstream", message=message, hint=hint, warning=True))
    return found


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise BadValueError(f"larger than {MAX_FILE} bytes", "this is not a configuration")
        return data.decode()
    except FileNotFoundError:
        hint = "name another with --config, or make one with: stpd init"
        raise BadValueError("no such file", hint) from None
    except PermissionError:
        raise BadValueError("not readable by this user", "run as its owner, or change its mode") from None
    except OSError as exc:
        raise BadValueError(exc.strerror or str(exc), "check the path") from None
    except UnicodeDecodeError as exc:
        raise BadValueError(f"not UTF-8 at byte {exc.start}", "save it as UTF-8") from None


def _with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Lay the file over the defaults of its role, and its classes over the built-in ones of the same name."""
    role = data.get("role", "gateway")
    merged = dict(data)
    for key, value in (ROLE_DEFAULTS.get(role, {}) if isinstance(role, str) else {}).items():
        if key not in data:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(data[key], dict):
            merged[key] = value | data[key]
    built_in = {c.name: attrs.asdict(c) for c in BUILT_IN_CLASSES}
    for known in built_in.values():
        known |= {key: f"{known[key]}s" for key in ("ttl", "linger")} | {"filters": list(known["filters"])}
    classes = data.get("class")
    if isinstance(classes, list):
        merged["class"] = [
            built_in.get(c["name"], {}) | c if isinstance(c, dict) and isinstance(c.get("name"), str) else c
            for c in classes
        ]
    return merged


def _finish(config: Config, base: Path) -> Config:
    """Fill in what follows from other values."""
    if config.store.path is None:
        config.store.path = config.state_dir / "store"
    config.identity = tuple(_loaded(base / p, base) for p in config.identity)
    if config.enrol.ca is not None and _loaded(config.enrol.ca / "ca.key", base).parent != config.enrol.ca:
        config.enrol.ca = _loaded(config.enrol.ca / "ca.key", base).parent
    if config.classes is not BUILT_IN_CLASSES:
        own = {c.name: c for c in config.classes}
        known = [c.name for c in BUILT_IN_CLASSES]
        new = [c for c in config.classes if c.name not in known]
        config.classes = (*new, *(own.get(c.name, c) for c in BUILT_IN_CLASSES))
    return config


def _loaded(path: Path, base: Path) -> Path:
    """A secret beside the configuration, as systemd loaded it for us: the file itself is root's alone (4)."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory or path.parent.resolve() != base.resolve():
        return path
    credential = Path(directory) / path.name
    return credential if credential.exists() else path


# Reading values ----------------------------------------------------------------------------------------


def read_duration(value: Any) -> float:
    """Seconds from "1h30m", "5s", "20ms"; a bare number only if it is 0. Raises BadValueError."""
    if value in (0, "0") and not isinstance(value, bool):
        return 0.0
    if not isinstance(value, str):
        raise BadValueError(f"{shown(value)} is not a duration", DURATION_HINT)
    text = value.replace(" ", "")
    parts = re.findall(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h|d)", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise BadValueError(f"{shown(value)} is not a duration", DURATION_HINT)
    return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)


def read_size(value: Any) -> int:
    """Bytes from "512MiB", "1.5GB", "100B"; a bare number only if it is 0. Raises BadValueError."""
    if value in (0, "0") and not isinstance(value, bool):
        return 0
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]+)", value) if isinstance(value, str) else None
    if match is None:
        raise BadValueError(f"{shown(value)} is not a size", SIZE_HINT)
    number, unit = match.groups()
    if unit not in SIZE_UNITS:
        near = [u for u in SIZE_UNITS if u.lower() == unit.lower() or u.lower() == unit.lower() + "b"]
        hint = f'did you mean "{number}{near[-1]}"?' if near else SIZE_HINT
        raise BadValueError(f"{shown(value)} is not a size: unknown unit {unit}", hint)
    return int(float(number) * SIZE_UNITS[unit])


def _text(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise BadValueError(f"{shown(value)} is not text", "put it in quotes")
    return value


def _count(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadValueError(f"{shown(value)} is not a whole number", "write digits without quotes")
    if value < 0:
        raise BadValueError(f"{value} is negative", "write 0 or more")
    return value


def _choice(value: Any, target: Any) -> str:
    allowed = typing.get_args(target)
    if isinstance(value, str) and value in allowed:
        return value
    listed = "allowed: " + ", ".join(f'"{a}"' for a in allowed)
    guess = nearest(value, allowed) if isinstance(value, str) else ""
    raise BadValueError(f"{shown(value)} is not allowed here", f"{guess} {listed}".strip())


def _path_hook(base: Path) -> Callable[[Any, Any], Path]:
    def read(value: Any, _: Any) -> Path:
        if not isinstance(value, str) or not value or "\0" in value or "-----BEGIN" in value:
            raise BadValueError(f"{shown(value)} is not a path", PATH_HINT)
        if value.startswith(CREDENTIALS):
            directory = os.environ.get("CREDENTIALS_DIRECTORY")
            if not directory:
                raise BadValueError(
                    "there is no $CREDENTIALS_DIRECTORY",
                    "it exists only under systemd with LoadCredential=; name a file for use by hand",
                )
            return Path(directory) / value.removeprefix(CREDENTIALS)
        return base / Path(value).expanduser()

    return read


def _origin(hint: Any) -> object:
    return typing.get_origin(hint)


def _converter(base: Path) -> cattrs.Converter:
    """A converter for one file, strict in all scalars (2)."""
    conv = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    conv.register_structure_hook(str, _text)
    conv.register_structure_hook(int, _count)
    conv.register_structure_hook(Path, _path_hook(base))
    conv.register_structure_hook_func(lambda t: t == Path | None, lambda v, _: _path_hook(base)(v, _))
    conv.register_structure_hook_func(lambda t: t == str | None, _text)
    conv.register_structure_hook_func(lambda t: _origin(t) is Literal, _choice)
    conv.register_structure_hook_func(lambda t: t == schema.Seconds, lambda v, _: read_duration(v))
    conv.register_structure_hook_func(lambda t: t == schema.Size, lambda v, _: read_size(v))
    conv.register_structure_hook_func(lambda t: t == schema.Rate, _count)

    def tuples(target: Any) -> Callable[[Any, Any], tuple[Any, ...]]:
        item = typing.get_args(target)[0]
        list_of_items: Any = list.__class_getitem__(item)

        def read(value: Any, _: Any) -> tuple[Any, ...]:
            if isinstance(value, str) and not attrs.has(item):
                value = [value]
            if not isinstance(value, list):
                what = "[[double brackets]]" if attrs.has(item) else 'a list, such as ["a", "b"]'
                raise BadValueError(f"{shown(value)} is not a list", f"write {what}")
            return tuple(conv.structure(value, list_of_items))

        return read

    conv.register_structure_hook_factory(lambda t: _origin(t) is tuple, tuples)

    def tables(target: Any) -> Callable[[Any, Any], Any]:
        names = {
            f.name: override(rename=SPELLED[f.name])
            for f in attrs.fields(target)
            if target is Config and f.name in SPELLED
        }
        inner = make_dict_structure_fn(target, conv, **names)  # type: ignore[arg-type]

        def read(value: Any, cls: Any) -> Any:
            if not isinstance(value, dict):
                raise BadValueError(f"{shown(value)} is not a table", "write its keys below a [heading]")
            return inner(value, cls)

        return read

    conv.register_structure_hook_factory(attrs.has, tables)
    return conv


# Problems ----------------------------------------------------------------------------------------------


def _problems_of(exc: BaseException, path: str) -> list[Problem]:
    """Flatten what cattrs found into problems with paths."""
    if isinstance(exc, cattrs.BaseValidationError):
        return [p for inner in exc.exceptions for p in _problems_of(inner, path + _step(inner, path))]
    if isinstance(exc, cattrs.ForbiddenExtraKeysError):
        known = [_spelled(exc.cl, f.name) for f in attrs.fields(exc.cl)]
        return [_unknown_key(path, key, known) for key in sorted(exc.extra_fields)]
    if isinstance(exc, KeyError):
        return [Problem(path=path, message="is missing", hint="every such table needs it")]
    hint = exc.hint if isinstance(exc, BadValueError) else ""
    message = str(exc) if isinstance(exc, BadValueError) else "cannot be read"
    return [Problem(path=path, message=message, hint=hint)]


def _unknown_key(path: str, key: str, known: list[str]) -> Problem:
    """An unknown key. Its name is shown unless it may be a secret pasted into the wrong place."""
    name = "?" if SECRET.search(key) else key[:60]
    guess = nearest(key, known)
    where = f"{path}.{name}" if path else name
    listed = "known here: " + ", ".join(known)
    return Problem(path=where, message="unknown key", hint=guess or listed)


def _spelled(cls: type, name: str) -> str:
    return SPELLED.get(name, name) if cls is Config else name


def _step(exc: BaseException, path: str) -> str:
    """The part of the path that cattrs noted on an exception."""
    for note in getattr(exc, "__notes__", ()):
        if isinstance(note, cattrs.IterableValidationNote):
            return f"[{note.index}]"
        if isinstance(note, cattrs.AttributeValidationNote):
            return f".{note.name}" if path else SPELLED.get(note.name, note.name)
    return ""


# Differences -------------------------------------------------------------------------------------------

AT_ONCE: Final = ("access", "log.level", "identity", "transport.rehandshake")
"""What a reload puts in force; everything else needs a restart."""


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Paths of keys that differ, as (those a reload puts in force, those that need a restart)."""
    before, after = _flat(old, ""), _flat(new, "")
    differ = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    now = [key for key in differ if key.startswith(AT_ONCE)]
    return now, [key for key in differ if key not in now]


def _flat(value: Any, path: str) -> dict[str, Any]:
    if not attrs.has(type(value)):
        return {path: value}
    found: dict[str, Any] = {}
    for f in attrs.fields(type(value)):
        name = _spelled(type(value), f.name)
        found |= _flat(getattr(value, f.name), f"{path}.{name}" if path else name)
    return found
