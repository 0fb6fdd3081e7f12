"""stp.networks: promises (1) to (3) of its head."""

from __future__ import annotations

import json
import random
import stat
from pathlib import Path

import pytest
from attrs import evolve

from stp.core.keepalive import GROWTH, STEADY
from stp.core.path import KEEPALIVE
from stp.networks import MAX_FILE, MAX_NETWORKS, Here, Network, Networks, here, parse

ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
ARP = "IP address  HW type  Flags  HW address  Mask  Device\n"


def proc(path: Path, route: str = "", arp: str = "", ipv6: str = "") -> Path:
    path.mkdir(exist_ok=True)
    (path / "route").write_text(ROUTES + route)
    (path / "arp").write_text(ARP + arp)
    (path / "ipv6_route").write_text(ipv6)
    return path


def gateway(hexadecimal: str) -> str:
    return f"eth0\t00000000\t{hexadecimal}\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "networks.json"
    networks = Networks(path, wall=lambda: 1_700_000_000.0)
    assert networks.get("a") == Network()
    networks.put("a", Network(keepalive=60.0, too_long=80.0, carrier="tls"))
    again = Networks(path)
    assert again.get("a") == Network(60.0, 80.0, "tls", 1_700_000_000)
    again.put("a", evolve(again.get("a"), carrier="udp"))
    assert Networks(path).get("a").carrier == "udp"
    assert Networks(path).get("a").keepalive == 60.0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert networks.write_errors == again.read_errors == 0


def test_two_processes_do_not_undo_each_other(tmp_path: Path) -> None:
    path = tmp_path / "networks.json"
    one, other = Networks(path), Networks(path)
    one.put("a", Network(carrier="tls"))
    other.put("b", Network(carrier="udp"))
    assert Networks(path).get("a").carrier == "tls"
    assert Networks(path).get("b").carrier == "udp"


def test_the_oldest_gives_way(tmp_path: Path) -> None:
    now = 0.0
    networks = Networks(tmp_path / "n.json", wall=lambda: now)
    for n in range(MAX_NETWORKS + 10):
        now += 1.0
        networks.put(f"{n:016x}", Network(keepalive=100.0))
    found = parse((tmp_path / "n.json").read_bytes())
    assert len(found) == MAX_NETWORKS
    assert f"{9:016x}" not in found
    assert f"{10:016x}" in found
    assert (tmp_path / "n.json").stat().st_size < MAX_FILE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"format": 2, "networks": {}}',
        b'{"format": 1, "networks": []}',
        b"[" * 20_000,
        b" " * (MAX_FILE + 1),
    ],
)
def test_a_damaged_file_is_no_memory_and_no_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "n.json"
    path.write_bytes(data)
    networks = Networks(path)
    assert networks.read_errors == 1
    assert networks.get("a") == Network()
    networks.put("a", Network(carrier="udp"))
    assert Networks(path).get("a").carrier == "udp"


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {"keepalive": 1e300},
        {"keepalive": float("nan")},
        {"keepalive": 1},
        {"keepalive": True},
        {"keepalive": "25"},
        {"too_long": -1},
        {"carrier": "pigeon"},
        {"carrier": []},
        {"used": float("inf")},
    ],
)
def test_entries_out_of_bounds_are_left_out(entry: object) -> None:
    data = json.dumps({"format": 1, "networks": {"bad": entry, "good": {}}}).encode()
    assert parse(data) == {"good": Network()}


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_parse_or_raise_value_error(seed: int) -> None:
    rng = random.Random(seed)
    good = bytearray(json.dumps({"format": 1, "networks": {"a": {"keepalive": 60.0}}}).encode())
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = parse(bytes(data))
        except ValueError:
            continue
        assert all(KEEPALIVE - 10 <= one.keepalive <= 110 for one in found.values())


def test_what_cannot_be_written_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    networks = Networks(tmp_path / "file" / "n.json")
    networks.put("a", Network(carrier="udp"))
    assert networks.write_errors == 1
    assert networks.get("a").carrier == "udp"
    assert Networks().get("a") == Network()


def test_a_network_is_known_by_its_gateway_and_not_by_name(tmp_path: Path) -> None:
    home = proc(tmp_path / "p", gateway("0101A8C0"), "192.168.1.1 0x1 0x2 02:00:00:00:00:01 * eth0\n")
    key = here(home)
    assert len(key) == 16
    assert here(home) == key
    cafe = proc(tmp_path / "p", gateway("0101A8C0"), "192.168.1.1 0x1 0x2 02:00:00:00:00:02 * eth0\n")
    assert here(cafe) != key
    unknown = proc(tmp_path / "p", gateway("0101A8C0"))
    assert here(unknown) not in (key, "")


def test_point_to_point_ipv6_and_no_network_at_all(tmp_path: Path) -> None:
    lte = here(proc(tmp_path / "p", "wwan0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n"))
    six = here(proc(tmp_path / "p", ipv6=f"{0:032x} 00 {0:032x} 00 fe80{1:028x} 400 2 0 3 eth0\n"))
    assert len(lte) == len(six) == 16
    assert lte != six
    assert here(proc(tmp_path / "p")) == ""
    assert here(tmp_path / "missing") == ""


async def test_what_is_learned_is_kept_per_network(tmp_path: Path) -> None:
    """R-8-9: the interval of a network is there after a restart, that of another network is its own."""
    place = "home"
    places = Here(Networks(tmp_path / "n.json"), find=lambda: place)
    learner = places.learner()
    assert places.learner() is learner
    assert not places.changed
    for _ in range(STEADY):
        learner.on_answer(KEEPALIVE)
    assert places.changed
    await places.keep()
    await places.keep()
    assert not places.changed
    place = "train"
    places.learner().on_forgotten(20.0)
    places.save()
    again = Here(Networks(tmp_path / "n.json"), find=lambda: place)
    assert again.learner().interval == pytest.approx(15.0)
    assert again.learner().too_long == pytest.approx(20.0)
    place = "home"
    assert again.learner().interval == pytest.approx(KEEPALIVE * GROWTH)


def test_without_a_network_nothing_is_kept(tmp_path: Path) -> None:
    places = Here(Networks(tmp_path / "n.json"), find=lambda: "")
    places.learner().on_forgotten(60.0)
    assert not places.changed
    assert places.learner().interval == KEEPALIVE
    places.save()
    assert not (tmp_path / "n.json").exists()
