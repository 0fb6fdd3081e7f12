"""The floor plan, held by a test. docs/architecture.md explains it; this file is the plan as data.

(1) Every module stands on a floor, and imports only from lower floors.
(2) What says it is sans-IO imports no clock, no socket, no randomness, no database, no thread.
(3) stpctl imports stpd.status and nothing else of ours, and nothing slow.
(4) A file has under 600 lines, a function under 60, and no module is called by what it is not.
(5) The tree speaks only of itself: no issue numbers, no paths of somebody's machine.

Every test collects all it finds and says file and line, so that one run shows all there is to mend.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("stp", "stpd", "stpctl")

FLOORS: Final[tuple[str, ...]] = (
    # -- stp/core: bytes and time in; bytes, events and a deadline out
    "stp.core.errors stp.core.ranges stp.core.congestion stp.core.flow stp.core.admission stp.core.sizing",
    "stp.core.wire stp.core.packet stp.core.frames stp.core.crypto_stream stp.core.streams stp.core.recovery"
    " stp.core.cubic stp.core.unreliable",
    "stp.core.keys stp.core.params stp.core.tokens stp.core.acks stp.core.path stp.core.resets stp.core.streamset"
    " stp.core.tolerant",
    "stp.core.handshake stp.core.scratch",
    "stp.core.packetizer stp.core.keepalive",
    "stp.core.events stp.core.initspace stp.core.phases stp.core.channel stp.core.units stp.core.clienthello"
    " stp.core.trace",
    "stp.core.output stp.core.routing",
    "stp.core.migration",
    "stp.core.dataspace stp.core.states",
    "stp.core.snapshot",
    "stp.core.verbs",
    "stp.core.session stp.core.framed",
    "stp.core.endpoint",
    # -- stp: messages, sans-IO too
    "stp.topics stp.sources stp.fields stp.echo stp.failures stp.printing",
    "stp.batch stp.control",
    "stp.records",
    "stp.lanes stp.link_events",
    "stp.receiving",
    "stp.link",
    # -- stp: what touches the machine, and the front doors
    "stp.qlog",
    "stp.carriers.udp stp.carriers.streams stp.carriers.door stp.identity stp.pinned",
    "stp.carriers.tls stp.carriers.unix",
    "stp.networks stp.lifetimes stp.kept_tokens stp.racing stp.proxy",
    "stp.ways",
    "stp.enrol stp.outbox stp.lines stp.pathfinder",
    "stp.connection",
    "stp.dialler stp.local stp.publisher stp.subscriber",
    "stp.reader stp.requests stp.statistics",
    "stp.pings",
    "stp.client",
    "stp.underload stp.path_cli",
    "stp.cli",
    # -- stpd: what is said of the daemon, and what it is told
    "stpd.status stpd.schema stpd.problems stpd.templates stpd.logs stpd.notify stpd.httpd stpd.ledger"
    " stpd.throttle",
    "stpd.events stpd.checks",
    "stpd.config stpd.api stpd.probes stpd.metrics",
    # -- stpd: who may, how much, to whom
    "stpd.router",
    "stpd.access stpd.limits stpd.localnames",
    # -- stpd: certificates and tokens
    "stpd.pki",
    "stpd.kept stpd.keys",
    "stpd.network_keys",
    "stpd.setup stpd.issuing",
    "stpd.setup_cli",
    "stpd.enrol",
    # -- stpd/store: the only files that know a database
    "stpd.store.base stpd.store.redo stpd.store.reserve",
    "stpd.store.cache stpd.store.rows stpd.store.schema stpd.store.tally",
    "stpd.store.changes stpd.store.reader stpd.store.seen",
    "stpd.store.log stpd.store.quarantine",
    "stpd.store.group stpd.store.trim",
    "stpd.store.commits",
    "stpd.store.writer",
    "stpd.store.sqlite",
    # -- stpd: the relay and the house around it
    "stpd.excerpts",
    "stpd.turns stpd.hops",
    "stpd.relay",
    "stpd.peers",
    "stpd.moving stpd.fallback",
    "stpd.sessions",
    "stpd.uplink stpd.lifetimes",
    "stpd.paths stpd.doors stpd.dialling stpd.tracing",
    "stpd.managed stpd.services",
    "stpd.daemon",
    "stpd.__main__",
    # -- stpctl
    "stpctl.errors stpctl.render",
    "stpctl.contexts stpctl.sentences stpctl.pathwords",
    "stpctl.client",
    "stpctl.session",
    "stpctl.paths stpctl.enrolled",
    "stpctl.commands",
    "stpctl.__main__",
)
"""From the ground up. Modules of one floor do not import each other."""

FRONT_DOORS: Final = {"stp": "stp.client"}
"""A package's `__init__` may import what it offers: it stands just above that module."""

PURE: Final = (
    "stp.core.",
    "stp.topics",
    "stp.batch",
    "stp.records",
    "stp.control",
    "stp.fields",
    "stp.link",
    "stp.echo",
)
IMPURE: Final = frozenset(
    {"trio", "socket", "time", "random", "logging", "sqlite3", "threading", "asyncio", "select"}
)
OPERATOR_MAY_IMPORT: Final = ("stpctl", "stpd.status")
SLOW_TO_IMPORT: Final = frozenset(
    {"trio", "structlog", "cryptography", "OpenSSL", "cattrs", "prometheus_client"}
)

MAX_FILE_LINES: Final = 600
MAX_FUNCTION_LINES: Final = 60
NAMES_THAT_SAY_NOTHING: Final = frozenset({"utils", "util", "common", "helpers", "helper", "misc"})

SKIPPED: Final = frozenset({"__pycache__", "build", "dist", "run"})
FOREIGN: Final = re.compile(
    r"""(?P<issue>(?<![\w&/#])(?:\#\d+\b|GH-\d+|issues?/\d+))
      | (?P<path>(?<![\w.])/(?:work|home/\w+|root|Users/\w+)\b(?:/[\w.-]+)?|/tmp/[t]eam\b)""",
    re.VERBOSE,
)
TEXT: Final = frozenset(
    {".py", ".md", ".toml", ".service", ".socket", ".conf", ".yaml", ".yml", ".sh", ".txt", ""}
)


def tree(top: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """Files below `top` with one of `suffixes`, without caches, environments and what git keeps."""
    for path in sorted(top.iterdir()):
        if path.name in SKIPPED or (path.name.startswith(".") and path.name != ".ci"):
            continue
        if path.is_dir() and not path.is_symlink():
            if path.name.endswith(".egg-info"):
                continue
            yield from tree(path, suffixes)
        elif path.suffix in suffixes:
            yield path


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    return {module_of(p): p for package in PACKAGES for p in tree(ROOT / package, frozenset({".py"}))}


def floors() -> dict[str, int]:
    plan = {name: 2 * n for n, row in enumerate(FLOORS) for name in row.split()}
    return plan | {package: plan[door] + 1 for package, door in FRONT_DOORS.items()}


def for_the_type_checker(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:` and nothing else in the condition."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs below `node`: a name that only the type checker reads is no dependency."""
    for child in ast.iter_child_nodes(node):
        if not for_the_type_checker(child):
            yield child
            yield from walk(child)


@cache
def imports(path: Path, modules: frozenset[str]) -> list[tuple[int, str]]:
    """Line and full name of every module that `path` imports, wherever in the file it does so."""
    found = []
    for node in walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            assert node.module is not None
            for alias in node.names:  # `from stp.core import wire` means stp.core.wire
                full = f"{node.module}.{alias.name}"
                found.append((node.lineno, full if full in modules else node.module))
    return found


def is_ours(target: str) -> bool:
    return target.split(".")[0] in PACKAGES


def report(found: list[str]) -> None:
    if found:
        pytest.fail(f"{len(found)} found:\n  " + "\n  ".join(found), pytrace=False)


def where(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def test_every_module_stands_on_a_floor() -> None:
    """(1)"""
    plan = floors()
    report(
        [
            f"{where(path)} stands on no floor: add {name} to FLOORS, with the reason in docs/architecture.md"
            for name, path in sources().items()
            if name not in plan
            and (
                path.name != "__init__.py" or any(is_ours(target) for _, target in imports(path, frozenset()))
            )
        ]
    )


def test_the_plan_names_what_is_there() -> None:
    """(1)"""
    rooms = [name for row in FLOORS for name in row.split()]
    missing = sorted(set(rooms) - set(sources()))
    twice = sorted({name for name in rooms if rooms.count(name) > 1})
    report(
        [f"FLOORS names {n}: no such module" for n in missing] + [f"FLOORS names {n} twice" for n in twice]
    )


def test_imports_go_down() -> None:
    """(1)"""
    plan, files = floors(), sources()
    modules = frozenset(files)
    found = []
    for name, path in files.items():
        for line, target in imports(path, modules):
            if name not in plan or target not in plan:
                continue  # not ours, or already named by the test above
            if plan[target] >= plan[name]:
                found.append(
                    f"{where(path, line)} imports {target}: floor {plan[target]} from floor {plan[name]}"
                )
    report(found)


def test_packages_are_imported_by_their_modules() -> None:
    """(1) `import stp.core` would hide what is meant; only the front doors are imported by package name."""
    files = sources()
    modules = frozenset(files)
    packages = {name for name, path in files.items() if path.name == "__init__.py"} - set(FRONT_DOORS)
    report(
        [
            f"{where(path, line)} imports the package {target}: name the module"
            for name, path in files.items()
            for line, target in imports(path, modules)
            if target in packages and any(is_ours(inner) for _, inner in imports(files[target], modules))
        ]
    )


def test_sans_io_stays_sans_io() -> None:
    """(2)"""
    files = sources()
    report(
        [
            f"{where(path, line)} imports {target}: time, bytes and chance come in as arguments here"
            for name, path in files.items()
            if name.startswith(PURE)
            for line, target in imports(path, frozenset(files))
            if target.split(".")[0] in IMPURE
        ]
    )


def test_sans_io_reads_no_clock() -> None:
    """(2) datetime and os may be imported for types and constants, not asked the time or for bytes."""
    asks = {
        ("datetime", "now"),
        ("datetime", "utcnow"),
        ("datetime", "today"),
        ("os", "urandom"),
        ("os", "times"),
    }
    found = []
    for name, path in sources().items():
        if not name.startswith(PURE):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                last = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if (last, node.func.attr) in asks:
                    found.append(f"{where(path, node.lineno)} calls {last}.{node.func.attr}()")
    report(found)


def test_the_operators_tool_stands_alone() -> None:
    """(3)"""
    files = sources()
    modules = frozenset(files)
    found = []
    for name, path in files.items():
        if name.split(".")[0] != "stpctl" and name != "stpd.status":
            continue
        for line, target in imports(path, modules):
            top = target.split(".")[0]
            ours = top in PACKAGES and target != "stpd.status" and top != "stpctl"
            if ours or (name == "stpd.status" and top == "stpctl"):
                found.append(f"{where(path, line)} imports {target}: {', '.join(OPERATOR_MAY_IMPORT)} only")
            elif top in SLOW_TO_IMPORT:
                found.append(
                    f"{where(path, line)} imports {target}: too slow for a command that must start at once"
                )
    report(found)


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first line and number of lines of every function in `path`."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_small() -> None:
    """(4)"""
    found = []
    for path in tree(ROOT, frozenset({".py"})):
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length >= MAX_FILE_LINES:
            found.append(f"{where(path)} has {length} lines; under {MAX_FILE_LINES} please")
        for name, line, size in functions(path):
            if size >= MAX_FUNCTION_LINES:
                found.append(
                    f"{where(path, line)} {name}() has {size} lines; under {MAX_FUNCTION_LINES} please"
                )
    report(found)


def test_modules_are_called_by_what_they_do() -> None:
    """(4)"""
    report(
        [
            f"{where(path)}: a name for what is in it, please"
            for path in tree(ROOT, frozenset({".py"}))
            if path.stem in NAMES_THAT_SAY_NOTHING or path.parent.name in NAMES_THAT_SAY_NOTHING
        ]
    )


def test_the_tree_speaks_of_itself() -> None:
    """(5)"""
    found = []
    for path in tree(ROOT, TEXT):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # fuzz corpus and other binary files
        for number, text in enumerate(lines, 1):
            found += [f"{where(path, number)} {m.lastgroup}: {m.group()}" for m in FOREIGN.finditer(text)]
    report(found)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("see #~12", "issue"),
        ("as in GH-~7", "issue"),
        ("reads /~work/main/x", "path"),
        ("in /~home/me/x", "path"),
        ("filter cmd/#", None),
        ("cmd/#1", None),
        ("a network/work ratio", None),
        ("&#39;", None),
    ],
)
def test_the_patterns_of_rule_5(text: str, kind: str | None) -> None:
    """The tildes keep this table from being found by the test above."""
    match = FOREIGN.search(text.replace("~", ""))
    assert (match.lastgroup if match else None) == kind
