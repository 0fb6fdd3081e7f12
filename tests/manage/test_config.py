"""Promises of stpd.config, stpd.checks and stpd.problems, and the files in config/."""

import json
import math
import re
import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stpd import schema
from stpd.config import ConfigError, changes, check_config, load, parse, read_duration, read_size, render
from stpd.problems import BadValueError, Problem, shown
from stpd.schema import BUILT_IN_CLASSES, AccessRule, ClassConfig, Config, UpstreamConfig
from tests.identity_kit import Flaw, shared

CONFIG = Path(__file__).parents[2] / "config"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "stpd.toml"
    path.write_text(text)
    return path


def found(tmp_path: Path, text: str) -> dict[str, Problem]:
    problems = parse(write(tmp_path, text))[1]
    assert len({p.path for p in problems}) == len(problems)
    return {p.path: p for p in problems}


def test_an_empty_file_is_a_gateway_with_safe_defaults(tmp_path: Path) -> None:
    """schema (1, R-11-9)."""
    config = load(write(tmp_path, ""))
    assert config.role == "gateway"
    assert config.listen.udp == ("0.0.0.0:9000",)
    assert config.management.listen.startswith("127.0.0.1:")
    assert config.health.listen.startswith("127.0.0.1:")
    assert config.enrol.listen == ""
    assert config.store.path == Path("/var/lib/stpd/store")
    assert config.store.retention == 0
    assert config.identity == (tmp_path / "identity.pem",)
    assert [r.name for r in config.access] == ["devices"]
    assert config.classes == BUILT_IN_CLASSES


def test_roles_pick_defaults_and_the_file_wins(tmp_path: Path) -> None:
    hub = load(write(tmp_path, 'role = "hub"\n[store]\nretention = "1d"\n'))
    assert (hub.store.budget, hub.store.retention, hub.access) == (10**10, 86400, ())


def test_all_errors_at_once_with_paths_and_hints(tmp_path: Path) -> None:
    """config (1), (2)."""
    problems = found(
        tmp_path,
        """
        role = "gatway"
        stor = 1
        [store]
        budget = 10
        reserve = "1gb"
        retention = "5 parsecs"
        path = true
        [limits]
        sessions = "false"
        half_open = true
        half_open_per_address = -1
        [log]
        level = "inf"
        format = false
        [[class]]
        name = "x"
        lane = 1.0
        filters = ["a", 3]
        [[upstream]]
        url = 3
        class = ["x"]
        """,
    )
    hints = {
        "role": '"gateway"',
        "stor": '"store"',
        "store.budget": '"512MiB"',
        "store.reserve": '"1GB"',
        "store.retention": '"72h"',
        "store.path": "path",
        "limits.sessions": "digits",
        "limits.half_open": "digits",
        "limits.half_open_per_address": "0 or more",
        "log.level": '"info"',
        "log.format": '"json"',
        "class[0].lane": "digits",
        "class[0].filters[1]": "quotes",
        "upstream[0].url": "quotes",
        "upstream[0].class": '"classes"',
    }
    assert problems.keys() == hints.keys()
    for path, hint in hints.items():
        assert hint in problems[path].hint, path


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        ("[listen]\nudp = ['9000']", "listen.udp[0]", "host:port"),
        ("[listen]\nudp = ['::1:9000']", "listen.udp[0]", "[::]"),
        ("[listen]\nudp = ['a:70000']", "listen.udp[0]", "host:port"),
        ("[listen]\nudp = [':9000', ':9000']", "listen.udp[1]", "drop"),
        ("role = 'hub'\naccess = [{name='a', publish=['#']}]\n[listen]\nudp = []", "listen.udp", "udp ="),
        ("[management]\nlisten = '127.0.0.1:8080'", "health.listen", "port"),
        ("[listen]\ntls = ['8443']", "listen.tls[0]", "host:port"),
        ("[listen]\ntls = ['127.0.0.1:9443']", "listen.tls[0]", "enrol.listen alone"),
        ("[listen]\ntls = [':8443', ':8443']", "listen.tls[1]", "own port"),
        ("[listen]\nunix = { path = 'stp.sock' }", "listen.unix.path", "/run/stpd"),
        ("[listen]\nunix = { path = '/run/x', mode = 'rw-rw----' }", "listen.unix.mode", "0660"),
        ("[listen]\nunix = { path = '/x', map = [{ node = 'A b' }] }", "listen.unix.map[0].node", "{user}"),
        ("[limits]\nunproven = 4", "limits.unproven_per_address", "below unproven"),
        ("[enrol]\nlisten = ':8443'", "enrol.listen", "forward"),
        ("[enrol]\nforward = 'h:1'\nca = '.'", "enrol", "keep"),
        ("[enrol]\nforward = '0.0.0.0:8443'", "enrol.forward", "name the hub"),
        ("[enrol]\nforward = 'hub'", "enrol.forward", ":8443"),
        ("[store]\nbudget = '1MiB'\nreserve = 0", "store.budget", "16MiB"),
        ("[store]\nbudget = '20MiB'\nreserve = '20MiB'", "store.reserve", "part of the budget"),
        ("[limits]\nsessions = 0", "limits.sessions", "1 or more"),
        ("[limits]\nhalf_open = 4", "limits.half_open_per_address", "below half_open"),
        ("[[class]]\nname='Upper'\nfilters=['a']\nlane=1", "class[0].name", "a-z"),
        ("[[class]]\nname='x'\nfilters=['a#']\nlane=1", "class[0].filters[0]", "alone"),
        ("[[class]]\nname='x'\nfilters=['a/{node}']\nlane=1", "class[0].filters[0]", "upstream and access"),
        ("[[class]]\nname='x'\nfilters=[]\nlane=1", "class[0].filters", "filters ="),
        ("[[class]]\nname='x'\nfilters=['a']\nlane=5", "class[0].lane", "4 bulk"),
        ("[[class]]\nname='x'\nfilters=['a']\nlane=1\nlinger='2s'", "class[0].linger", "20ms"),
        ("[[class]]\nname='event'\n[[class]]\nname='event'", "class[1].name", "class[0]"),
        ("[[upstream]]\nurl='http://h'", "upstream[0].url", "stp://"),
        ("[[upstream]]\nurl='stp://h:0'", "upstream[0].url", "stp://"),
        ("[[upstream]]\nurl='stp://h:x'", "upstream[0].url", "stp://"),
        ("[[upstream]]\nurl='stp://n@h'\nnode='m'", "upstream[0].node", "one of them"),
        ("[[upstream]]\nurl='stp://n@h'\nclasses=['telmetry']", "upstream[0].classes[0]", '"telemetry"'),
        ("[[upstream]]\nurl='stp://n@h'\nclasses=['zzz']", "upstream[0].classes[0]", "command"),
        ("[[upstream]]\nurl='stp://n@h'\nsubscribe=['{nod}/#']", "upstream[0].subscribe[0]", "{node}"),
        ("[[upstream]]\nurl='stp://n@localhost'", "upstream[0].url", "above"),
        ("[[upstream]]\nurl='stp://a@h'\n[[upstream]]\nurl='stp://a@h'", "upstream[1].url", "upstream[0]"),
        ("[[access]]\nname='a'\nnodes=['gw 1']\npublish=['#']", "access[0].nodes[0]", "*"),
        ("[[access]]\nname='a'\nnodes=[]\npublish=['#']", "access[0].nodes", '["*"]'),
        ("[[access]]\nname='a'\nspeaks_for=['[ab]']", "access[0].speaks_for[0]", "*"),
        ("[[access]]\nname='a'\nrole=''\npublish=['#']", "access[0].role", "any role"),
        ("[[access]]\nname='a'\npublish=['a/#/b']", "access[0].publish[0]", "alone"),
        ("[access]\nname='a'", "access", "[[double brackets]]"),
        ("store = 'redis'", "store", "[heading]"),
        ("identity = []", "identity", "identity.pem"),
        ("identity = '$CREDENTIALS_DIRECTORY/x'", "identity[0]", "LoadCredential"),
        ("role =", "", "quote"),
        ("x = " + "[" * 5000, "", "quote"),
        ("x = " + "9" * 5000, "", "quote"),
        ("[store]\n[store]", "", "quote"),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, text: str, path: str, hint: str) -> None:
    """config (1): exactly that problem, where it is, and what to do."""
    problems = found(tmp_path, text)
    assert list(problems) == [path]
    assert hint in problems[path].hint
    assert not problems[path].warning
    with pytest.raises(ConfigError, match="1 error"):
        load(tmp_path / "stpd.toml")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("role = 'hub'", "access"),
        ("[health]\nlisten = '0.0.0.0:8080'", "health.listen"),
        ("[[class]]\nname='x'\nfilters=['#']\nlane=1", "class[0].filters"),
        ("[[access]]\nname='a'", "access[0]"),
    ],
)
def test_unwise_is_a_warning_and_loads(tmp_path: Path, text: str, path: str) -> None:
    problems = found(tmp_path, text)
    assert list(problems) == [path]
    assert problems[path].warning
    load(tmp_path / "stpd.toml")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20ms", 0.02), ("5s", 5), ("1h30m", 5400), ("1.5h", 5400), ("7d", 604800), (0, 0), ("0", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert read_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "5 sec", "-5s", "5s5", "1e3s", 5, 5.0, True, None, "5M"])
def test_no_durations(text: object) -> None:
    with pytest.raises(BadValueError):
        read_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("64KiB", 65536), ("1.5GB", 1_500_000_000), ("100B", 100), ("2 TiB", 2 << 40), (0, 0)]
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "64", "KiB", "-1MB", "1mb", "1Gb", "1G", 64, True, False, "0x10MB"])
def test_no_sizes(text: object) -> None:
    with pytest.raises(BadValueError):
        read_size(text)


def test_new_classes_come_first_and_built_in_ones_are_adjusted_in_place(tmp_path: Path) -> None:
    config = load(
        write(
            tmp_path,
            """
            [[class]]
            name = "telemetry"
            ttl = "72h"
            durability = "memory"
            [[class]]
            name = "camera"
            filters = ["camera/#"]
            lane = 4
            """,
        )
    )
    assert [c.name for c in config.classes] == ["camera", "command", "event", "bulk", "telemetry"]
    telemetry = config.classes[-1]
    assert (telemetry.filters, telemetry.lane, telemetry.linger) == (("#",), 3, 0.02)
    assert (telemetry.ttl, telemetry.durability) == (72 * 3600, "memory")


@pytest.mark.parametrize(
    "text",
    [
        'identity = "-----BEGIN PRIVATE KEY-----MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg"',
        '[log]\nlevel = "stpj1-hunter2hunter2hunter2hunter2hunter2"',
        '[[upstream]]\nurl = "stp://admin:hunter2@hub"',
        'hunter2hunter2hunter2hunter2hunter2hunter2 = "x"',
        '[[access]]\nname = "a"\nnodes = ["hunter2hunter2hunter2HUNTER2hunter2"]\npublish=["#"]',
    ],
)
def test_what_may_be_a_secret_is_not_repeated(tmp_path: Path, text: str) -> None:
    """problems (1)."""
    problems = parse(write(tmp_path, text))[1]
    assert problems
    told = render("f", problems)
    assert "hunter2" not in told
    assert "MIGH" not in told


def test_shown_is_short() -> None:
    assert len(shown("a " * 200)) < 70


def test_paths_are_relative_to_the_file_or_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config (3)."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/stpd")
    text = 'state_dir = "state"\nidentity = ["$CREDENTIALS_DIRECTORY/id.pem", "ca.pem"]\n'
    config = load(write(tmp_path, text))
    assert config.state_dir == tmp_path / "state"
    assert config.store.path == tmp_path / "state" / "store"
    assert config.identity == (Path("/run/credentials/stpd/id.pem"), tmp_path / "ca.pem")


@pytest.mark.parametrize("make", ["missing", "directory", "binary", "huge"])
def test_unreadable_files_are_named(tmp_path: Path, make: str) -> None:
    path = tmp_path / "stpd.toml"
    if make == "directory":
        path.mkdir()
    elif make == "binary":
        path.write_bytes(b"\xff\xfe")
    elif make == "huge":
        path.write_bytes(b"#" * (1024 * 1024 + 1))
    (problem,) = parse(path)[1]
    assert problem.path == ""
    assert problem.hint


def test_check_looks_at_the_identity_too(tmp_path: Path) -> None:
    path = write(tmp_path, "[[upstream]]\nurl = 'stp://edge-1@hub'\n")
    (missing,) = check_config(path)
    assert missing.path == "identity"
    assert "join" in missing.hint
    shared().write(tmp_path, "edge-1", Flaw.NONE).rename(tmp_path / "identity.pem")
    (itself,) = check_config(path)
    assert itself.path == "upstream[0]"
    assert "itself" in itself.message
    (nameless,) = check_config(write(tmp_path, "[[upstream]]\nurl = 'stp://hub'\n"))
    assert "which node" in nameless.message
    (nowhere,) = check_config(write(tmp_path, ""))
    assert nowhere.warning
    assert check_config(write(tmp_path, "[[upstream]]\nurl = 'stp://hub'\nnode = 'hub-1'\n")) == []


def test_changes_say_what_a_reload_can_do(tmp_path: Path) -> None:
    old = load(write(tmp_path, ""))
    new = load(write(tmp_path, "[log]\nlevel='debug'\n[store]\nbudget='2GB'\n[limits]\nsessions = 5\n"))
    assert changes(old, new) == (["log.level"], ["limits.sessions", "store.budget"])
    assert changes(old, old) == ([], [])


SCALARS = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=20)
    | st.sampled_from(
        [
            "5s",
            "9" * 400 + "GB",
            "9" * 400 + "d",
            "#",
            "stp://n@h:1",
            "127.0.0.1:1",
            "[::1]:9",
            "{node}",
            "a/+/b",
            "telemetry",
        ]
    )
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(["a", "name"]), SCALARS)
KEYS = sorted(
    {f.name for cls in vars(schema).values() if attrs.has(cls) for f in attrs.fields(cls)} | {"x", "class"}
)
TABLES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)
FILES = st.dictionaries(st.sampled_from(KEYS), VALUES | TABLES | st.lists(TABLES, max_size=3), max_size=8)


def toml(value: object) -> str:
    """A value as TOML, all in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    return json.dumps(value).replace("\x7f", "\\u007f")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=FILES)
def test_whatever_stands_in_a_file_it_is_read_or_explained(tmp_path: Path, data: dict[str, object]) -> None:
    """config (1): a configuration, or problems with hints; never anything else."""
    path = tmp_path / "any.toml"
    path.write_text("\n".join(f"{k} = {toml(v)}" for k, v in data.items()), "utf-8", "surrogatepass")
    config, problems = parse(path)
    assert config is not None or problems
    for problem in problems:
        assert problem.message
        assert "Traceback" not in render("any.toml", problems)
        assert "\n" not in str(problem)


# The files people start from ---------------------------------------------------------------------------


def keys_of(path: Path) -> set[str]:
    """Every key of a commented file, set or commented out, as table.key."""
    table, keys = "", set()
    for line in path.read_text().splitlines():
        heading = re.fullmatch(r"#?\[+(\w+)\]+", line)
        key = re.match(r"#?(\w+) = ", line)
        if heading:
            table = heading[1] + "."
        elif key:
            keys.add(table + key[1])
    return keys


def keys_of_schema() -> set[str]:
    keys = set()
    for f in attrs.fields(Config):
        rows = {"classes": ClassConfig, "upstreams": UpstreamConfig, "access": AccessRule}
        name = {"classes": "class", "upstreams": "upstream"}.get(f.name, f.name)
        table = rows.get(f.name) or f.type
        assert table is not None
        keys |= {f"{name}.{g.name}" for g in attrs.fields(table)} if attrs.has(table) else {name}
    return keys


@pytest.mark.parametrize("name", ["hub", "gateway"])
def test_shipped_files_load_clean_and_show_every_key(name: str) -> None:
    path = CONFIG / f"{name}.toml"
    config, problems = parse(path)
    assert problems == []
    assert config is not None
    assert config.role == name
    assert keys_of(path) == keys_of_schema()


@pytest.mark.parametrize("name", ["hub", "gateway"])
def test_what_shipped_files_comment_out_is_valid(name: str, tmp_path: Path) -> None:
    """Whoever takes the comment sign away gets a file that loads, but for keys that exclude each other."""
    lines = (CONFIG / f"{name}.toml").read_text().splitlines()
    text = "\n".join(re.sub(r"^#(\[|\w+ = )", r"\1", line) for line in lines)
    data = tomllib.loads(text)
    assert data["class"][0]["name"] == "camera"
    problems = parse(write(tmp_path, text))[1]
    assert [p.path for p in problems] == ["enrol"]


@pytest.mark.parametrize("name", ["hub", "gateway"])
def test_shipped_defaults_are_the_defaults(name: str, tmp_path: Path) -> None:
    """A commented key with a value tells the truth about the default."""
    told = load(CONFIG / f"{name}.toml")
    default = load(write(tmp_path, f'role = "{name}"\nidentity = "/var/lib/stpd/identity.pem"\n'))
    now, restart = changes(default, told)
    expected = {"access", "enrol.ca", "enrol.listen", "listen.tls"} if name == "hub" else set()
    assert set(now) | set(restart) == expected


def test_secrets_beside_the_file_come_as_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config (4): the unit loads them, the file need not know."""
    loaded = tmp_path / "credentials"
    loaded.mkdir()
    for name in ("identity.pem", "ca.key"):
        (loaded / name).write_text("secret")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(loaded))
    text = 'role = "hub"\nidentity = ["identity.pem", "network.key", "/etc/ssl/own.pem"]\n[enrol]\nca = "."\n'
    config = load(write(tmp_path, text))
    assert config.identity == (loaded / "identity.pem", tmp_path / "network.key", Path("/etc/ssl/own.pem"))
    assert config.enrol.ca == loaded
