"""What the values of a configuration mean together: names, filters, addresses, sums.

Works on a configuration as the file has it, before `stpd.config` puts the classes in order, so that paths in
problems are those of the file.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

from stp.core.sizing import BASE_DATAGRAM, MAX_DATAGRAM
from stp.topics import TopicError, check_filter
from stpd.problems import Problem, nearest, shown
from stpd.schema import BUILT_IN_CLASSES, MAX_CLASSES, MIB, ClassConfig, Config, UpstreamConfig

PROBE_LONGEST: Final = 300.0
"""Seconds."""
DEFAULT_PORT: Final = 9000
"""UDP port of protocol §1."""
MIN_BUDGET: Final = 16 * MIB
"""Bytes: less would not hold one burst and the room that clearing up needs."""
MAX_LINGER: Final = 1.0
"""Seconds a publisher may be told to wait for more."""
PLACEHOLDER: Final = "{node}"
SAMPLE_NODE: Final = "x" * 63
"""Stands for {node} where a filter is checked: the longest name there is."""

CLASS_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
RULE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
NODE_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
NODE_PATTERN: Final = re.compile(r"[a-z0-9._*?-]{1,63}")
ROLE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
MAX_SOCKET_PATH: Final = 107
"""Bytes (unix(7))."""
LOOPBACK: Final = ("127.", "::1", "localhost")
WILDCARD: Final = ("0.0.0.0", "::", "")

Problems = Iterator[Problem]


def check(config: Config) -> list[Problem]:
    """All that is wrong or unwise with good values in a bad place. Pure; never raises."""
    parts: Sequence[Callable[[Config], Problems]] = (
        _identity,
        _listen,
        _transport,
        _enrol,
        _store,
        _limits,
        _classes,
        _upstreams,
        _access,
    )
    return [problem for part in parts for problem in part(config)]


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port", "[v6]:port" or ":port" (every address). Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^\[\]:/\s@]*)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"{shown(text)} is not an address")
    return match[1] or match[2] or "::", int(match[3])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host.startswith(LOOPBACK)


def _identity(config: Config) -> Problems:
    if not config.identity:
        yield Problem(path="identity", message="names no file", hint='write identity = "identity.pem"')


# Addresses ---------------------------------------------------------------------------------------------


def _address(path: str, text: str) -> Problems:
    try:
        split_address(text)
    except ValueError as exc:
        hint = 'write "host:port", such as "0.0.0.0:9000" or "[::]:9000"'
        yield Problem(path=path, message=str(exc), hint=hint)


def _listen(config: Config) -> Problems:
    for n, text in enumerate(config.listen.udp):
        yield from _address(f"listen.udp[{n}]", text)
        if text in config.listen.udp[:n]:
            yield Problem(
                path=f"listen.udp[{n}]", message=f"{shown(text)} stands there twice", hint="drop one"
            )
    yield from _streams(config)
    taken: dict[str, str] = {}
    tcp = {
        "enrol.listen": config.enrol.listen,
        "management.listen": config.management.listen,
        "health.listen": config.health.listen,
    }
    for path, text in tcp.items():
        if not text:
            continue
        yield from _address(path, text)
        if text in taken and not text.endswith(":0"):
            yield Problem(
                path=path, message=f"{taken[text]} has the same address", hint="give each one its own port"
            )
        taken[text] = path
    if config.health.listen and not list(_address("", config.health.listen)):
        host, _ = split_address(config.health.listen)
        if not is_loopback(host):
            yield Problem(
                path="health.listen",
                message="everybody who can reach this address can read the metrics",
                hint="keep it on 127.0.0.1, or let a firewall decide who may",
                warning=True,
            )
    if not config.listen.udp and config.role == "hub":
        yield Problem(
            path="listen.udp", message="a hub that listens nowhere", hint='write udp = ["0.0.0.0:9000"]'
        )


def _streams(config: Config) -> Problems:
    """TLS and the Unix socket."""
    listen = config.listen
    for n, text in enumerate(listen.tls):
        path = f"listen.tls[{n}]"
        yield from _address(path, text)
        others = {"management.listen": config.management.listen, "health.listen": config.health.listen}
        others |= {f"listen.tls[{m}]": other for m, other in enumerate(listen.tls[:n])}
        for name, other in others.items():
            if text == other and not text.endswith(":0"):
                hint = "give each one its own port; enrol.listen alone may share it"
                yield Problem(path=path, message=f"{name} has the same address", hint=hint)
    local = listen.unix
    if not local.path:
        return
    if not local.path.startswith("/") or len(local.path.encode()) > MAX_SOCKET_PATH:
        hint = f'write an absolute path of at most {MAX_SOCKET_PATH} bytes, such as "/run/stpd/stp.sock"'
        yield Problem(path="listen.unix.path", message=f"{shown(local.path)} is no place for it", hint=hint)
    if not re.fullmatch(r"0?[0-7]{3}", local.mode):
        hint = 'write "0660" for user and group, "0666" for everybody on this machine'
        yield Problem(path="listen.unix.mode", message=f"{shown(local.mode)} is no mode", hint=hint)
    for n, rule in enumerate(local.map):
        if not NODE_NAME.fullmatch(rule.node.replace("{user}", "user")):
            hint = "node names are at most 63 of a-z 0-9 . _ -; {user} stands for the user's name"
            yield Problem(
                path=f"listen.unix.map[{n}].node", message=f"{shown(rule.node)} is no name", hint=hint
            )


def _transport(config: Config) -> Problems:
    size = config.transport.max_datagram
    if not BASE_DATAGRAM <= size <= MAX_DATAGRAM:
        hint = f"write {BASE_DATAGRAM} to {MAX_DATAGRAM}; 1472 suits Ethernet, 8972 its jumbo frames"
        yield Problem(path="transport.max_datagram", message=f"{size} bytes are no packet size", hint=hint)
    for key in ("probe", "stable"):
        seconds = getattr(config.transport, key)
        if not 1 <= seconds <= PROBE_LONGEST:
            hint = f"write 1s to {PROBE_LONGEST:g}s"
            yield Problem(
                path=f"transport.{key}", message=f"{seconds:g} s are too few or too many", hint=hint
            )


def _enrol(config: Config) -> Problems:
    enrol = config.enrol
    if enrol.forward:
        try:
            host, port = split_address(enrol.forward)
        except ValueError as exc:
            host, port = "", 0
            yield Problem(path="enrol.forward", message=str(exc), hint='write "hub.example.net:8443"')
        else:
            if host in WILDCARD or not port:
                hint = "name the hub's host and the port of its enrolment service"
                yield Problem(path="enrol.forward", message="nobody can be reached there", hint=hint)
    if enrol.ca and enrol.forward:
        hint = "keep `ca` to sign here, or `forward` to have the hub sign"
        yield Problem(path="enrol", message="both `ca` and `forward` are set", hint=hint)
    if enrol.listen and not enrol.ca and not enrol.forward:
        hint = 'set ca = "." (a directory with ca.pem and ca.key) or forward = "hub:8443"'
        yield Problem(path="enrol.listen", message="listens, but nobody could sign", hint=hint)


# Sums --------------------------------------------------------------------------------------------------


def _store(config: Config) -> Problems:
    store = config.store
    if store.budget < MIN_BUDGET:
        yield Problem(path="store.budget", message="too small to work with", hint='at least "16MiB"')
    if 2 * store.reserve > store.budget:
        hint = "the reserve is part of the budget, at most half of it; a thirtieth will do"
        yield Problem(path="store.reserve", message="leaves too little of the budget", hint=hint)


def _limits(config: Config) -> Problems:
    limits = config.limits
    for name in (
        "sessions",
        "handshakes_per_second",
        "handshakes_per_address",
        "half_open",
        "half_open_per_address",
        "unproven",
        "unproven_per_address",
        "subscriptions_per_session",
    ):
        if getattr(limits, name) < 1:
            yield Problem(path=f"limits.{name}", message="lets nobody in", hint="write 1 or more")
    if limits.half_open_per_address > limits.half_open:
        hint = "keep it below half_open, so that one address cannot take all of them"
        yield Problem(path="limits.half_open_per_address", message="is more than half_open", hint=hint)
    if limits.unproven_per_address > limits.unproven:
        hint = "keep it below unproven, so that one address cannot take all of them"
        yield Problem(path="limits.unproven_per_address", message="is more than unproven", hint=hint)


# Filters -----------------------------------------------------------------------------------------------


def _filters(path: str, filters: Sequence[str], *, node: bool) -> Problems:
    """Problems of a list of topic filters; `node`: {node} may stand in them."""
    for n, text in enumerate(filters):
        where = f"{path}[{n}]"
        plain = text.replace(PLACEHOLDER, SAMPLE_NODE) if node else text
        braces = re.search(r"\{[^}]*\}", plain)
        if braces:
            hint = (
                "the name of the node is written {node}"
                if node
                else "{node} is known in upstream and access only"
            )
            yield Problem(path=where, message=f"unknown placeholder {braces[0][:20]}", hint=hint)
        try:
            check_filter(plain)
        except TopicError as exc:
            hint = "+ stands for one level, # for all the rest, and each alone in its level: a/+/b/#"
            yield Problem(path=where, message=str(exc).replace(SAMPLE_NODE, PLACEHOLDER), hint=hint)


def _twice(path: str, key: str, names: Sequence[str]) -> Problems:
    for n, name in enumerate(names):
        if name in names[:n]:
            first = names.index(name)
            hint = f"{path}[{first}] has it, too: give one of them another"
            yield Problem(path=f"{path}[{n}].{key}", message=f"{shown(name)} stands there twice", hint=hint)


def _classes(config: Config) -> Problems:
    classes = config.classes
    if len(classes) > MAX_CLASSES:
        yield Problem(path="class", message=f"more than {MAX_CLASSES} classes", hint="let some share a class")
    yield from _twice("class", "name", [c.name for c in classes])
    built_in = {c.name for c in BUILT_IN_CLASSES}
    for n, one in enumerate(classes):
        yield from _class(f"class[{n}]", one)
        if classes is not BUILT_IN_CLASSES and "#" in one.filters and one.name not in built_in:
            hint = (
                "the built-in classes come after it and get only topics that begin with $; narrow the filter"
            )
            yield Problem(path=f"class[{n}].filters", message="# takes every topic", hint=hint, warning=True)


def _class(path: str, one: ClassConfig) -> Problems:
    if not CLASS_NAME.fullmatch(one.name):
        hint = "use at most 32 of a-z 0-9 _ - and begin with a letter or digit"
        yield Problem(path=f"{path}.name", message=f"{shown(one.name)} is not a class name", hint=hint)
    if not one.filters:
        hint = 'write filters = ["camera/#"]'
        yield Problem(path=f"{path}.filters", message="takes no topic", hint=hint)
    yield from _filters(f"{path}.filters", one.filters, node=False)
    if not 1 <= one.lane <= 4:
        hint = "1 command, 2 event, 3 telemetry, 4 bulk"
        yield Problem(path=f"{path}.lane", message=f"there is no lane {one.lane}", hint=hint)
    if one.linger > MAX_LINGER:
        yield Problem(path=f"{path}.linger", message="longer than a second", hint='"20ms" fills most batches')


# Peers -------------------------------------------------------------------------------------------------


def split_url(url: str) -> tuple[str, str, int]:
    """Node (or ""), host and port of stp://[node@]host[:port][?tls=port]. Raises ValueError."""
    parts = urlsplit(url)
    query = parts.query and not re.fullmatch(r"tls=[0-9]{1,5}", parts.query)
    extra = parts.path not in ("", "/") or query or parts.fragment or parts.password is not None
    if parts.scheme != "stp" or not parts.hostname or extra or parts.port == 0:
        raise ValueError("not an stp:// address")
    return parts.username or "", parts.hostname, parts.port or DEFAULT_PORT


def _upstreams(config: Config) -> Problems:
    classes = [c.name for c in config.classes] + [c.name for c in BUILT_IN_CLASSES]
    yield from _twice("upstream", "url", [u.url for u in config.upstreams])
    for n, upstream in enumerate(config.upstreams):
        path = f"upstream[{n}]"
        yield from _target(path, upstream, config)
        for m, name in enumerate(upstream.classes):
            if name not in classes:
                hint = nearest(name, classes) or "known: " + ", ".join(dict.fromkeys(classes))
                yield Problem(path=f"{path}.classes[{m}]", message=f"no class {shown(name)}", hint=hint)
        yield from _filters(f"{path}.subscribe", upstream.subscribe, node=True)


def _target(path: str, upstream: UpstreamConfig, config: Config) -> Problems:
    try:
        node, host, port = split_url(upstream.url)
    except ValueError:
        # The address itself is not repeated: somebody may have put a password into it.
        hint = "write stp://node@host:port, such as stp://hub-1@hub.example.net"
        yield Problem(path=f"{path}.url", message="not an stp:// address", hint=hint)
        return
    for key, name in (("url", node), ("node", upstream.node)):
        if name and not NODE_NAME.fullmatch(name):
            hint = "node names are at most 63 of a-z 0-9 . _ -"
            yield Problem(path=f"{path}.{key}", message=f"{shown(name)} is not a node name", hint=hint)
    if node and upstream.node and node != upstream.node:
        message = f"{shown(upstream.node)}, but the url names {shown(node)}"
        yield Problem(path=f"{path}.node", message=message, hint="keep one of them")
    for text in config.listen.udp:
        if list(_address("", text)):
            continue
        own_host, own_port = split_address(text)
        if own_port == port and (host == own_host or (own_host in WILDCARD and is_loopback(host))):
            hint = f"this node listens on {text} itself: name the node above it"
            yield Problem(path=f"{path}.url", message="is this node's own address", hint=hint)


def _access(config: Config) -> Problems:
    yield from _twice("access", "name", [r.name for r in config.access])
    for n, rule in enumerate(config.access):
        path = f"access[{n}]"
        if not RULE_NAME.fullmatch(rule.name):
            hint = "a rule's name stands in refusals and logs: letters, digits, space . _ -"
            yield Problem(path=f"{path}.name", message=f"{shown(rule.name)} is not a name", hint=hint)
        if rule.role is not None and not ROLE_NAME.fullmatch(rule.role):
            hint = "use at most 32 of a-z 0-9 _ -; leave it out for any role"
            yield Problem(path=f"{path}.role", message=f"{shown(rule.role)} is not a role", hint=hint)
        if not rule.nodes:
            hint = 'write nodes = ["*"] for every node'
            yield Problem(path=f"{path}.nodes", message="is for nobody", hint=hint)
        yield from _patterns(f"{path}.nodes", rule.nodes)
        yield from _patterns(f"{path}.speaks_for", rule.speaks_for)
        yield from _filters(f"{path}.publish", rule.publish, node=True)
        yield from _filters(f"{path}.subscribe", rule.subscribe, node=True)
        if not (rule.publish or rule.subscribe or rule.speaks_for):
            hint = "give it publish or subscribe filters; what no rule allows is denied anyway"
            yield Problem(path=path, message="allows nothing", hint=hint, warning=True)
    if not config.access and config.role == "hub":
        hint = "a hub denies what no rule allows: add an [[access]] table"
        yield Problem(path="access", message="nobody may do anything here", hint=hint, warning=True)


def _patterns(path: str, patterns: Sequence[str]) -> Problems:
    for n, text in enumerate(patterns):
        if not NODE_PATTERN.fullmatch(text):
            hint = "a node name (a-z 0-9 . _ -) with * for any run of characters and ? for one"
            yield Problem(path=f"{path}[{n}]", message=f"{shown(text)} is not a pattern", hint=hint)
