"""Promises of stpd.metrics: what Prometheus is given, judged by its own tools."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stpd.metrics import MAX_HOPS, OTHER, HopLag, Snapshot, render
from stpd.status import LaneLag
from tests.manage.daemon_double import Double


def snapshot() -> Snapshot:
    """One with a value in every family."""
    double = Double()
    lags = [LaneLag(lane=lane, messages=lane, bytes=10 * lane, oldest_age_s=lane) for lane in (1, 2, 3, 4)]
    return Snapshot(
        status=double.status(),
        ledger=double.ledger(),
        hops=[HopLag(name="erp", kind="reader", connected=True, lanes=lags)],
        sessions_by_role={"gateway": 2, "": 1},
        handshakes={"completed": 3, "refused": 1},
        drops={"unknown_cid": 7, "aead": 2},
        traffic={"rx_bytes": 1000, "tx_bytes": 2000, "rx_datagrams": 10, "tx_datagrams": 20},
        socket_errors={"ENETUNREACH": 1},
        sessions_by_carrier={"udp": 2, "tls": 1},
        sessions_ended={"moved": 3, "expired": 1},
        stream_bytes={("tls", "rx"): 300, ("tls", "tx"): 400},
        doors={("tls", "accepted"): 5, ("tls", "refused_full"): 1, ("tls", "waiting"): 2},
        store={"commits": 4, "repeats": 1},
        commit_seconds=0.25,
        commit_seconds_max=0.125,
        queues={"store": (3, 4096)},
        api={"accepted": 5, "open": 1},
        qlog={"written": 9, "dropped": 1},
        events={"published": 6, "dropped": 0},
        log_written=8,
        log_dropped=9,
    )


def families(data: bytes) -> dict[str, dict[str, float]]:
    """Family -> {sample with labels -> value}."""
    return {
        family.name: {
            s.name + "".join(f",{k}={v}" for k, v in sorted(s.labels.items())): s.value
            for s in family.samples
        }
        for family in text_string_to_metric_families(data.decode())
    }


def test_every_metric_is_ours_and_explained() -> None:
    """metrics (1)."""
    text = render(snapshot()).decode()
    names = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M)
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.M))
    assert len(names) == len({name for name, _ in names})
    for name, kind in names:
        assert name.startswith("stpd_")
        assert helps[name].endswith(".")
        assert name.endswith("_total") is (kind == "counter")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.startswith("stpd_") for line in samples)
    for name, _ in names:
        assert any(re.match(rf"{name}(_sum|_count)?[ {{]", line) for line in samples), f"{name} has no sample"


def test_the_numbers_are_those_of_the_snapshot() -> None:
    found = families(render(snapshot()))
    assert found["stpd_unexplained_messages"] == {"stpd_unexplained_messages": 0}
    assert found["stpd_sessions_by_role"] == {
        "stpd_sessions_by_role,role=gateway": 2,
        "stpd_sessions_by_role,role=none": 1,
    }
    assert found["stpd_packets_dropped"]["stpd_packets_dropped_total,reason=unknown_cid"] == 7
    assert found["stpd_door_messages"]["stpd_door_messages_total,class=telemetry,outcome=accepted"] == 5
    assert found["stpd_hop_lag_messages"]["stpd_hop_lag_messages,hop=erp,kind=reader,lane=telemetry"] == 3
    assert found["stpd_hop_lag_seconds"]["stpd_hop_lag_seconds,hop=erp,kind=reader,lane=bulk"] == 4
    hops = found["stpd_hop_messages"]
    assert hops["stpd_hop_messages_total,hop=erp,kind=reader,lane=telemetry,outcome=custody"] == 2
    commits = found["stpd_store_commit_seconds"]
    assert commits["stpd_store_commit_seconds_sum"] == 0.25
    assert found["stpd_queue_limit"] == {"stpd_queue_limit,queue=store": 4096}
    assert found["stpd_log_lines_dropped"] == {"stpd_log_lines_dropped_total": 9}
    assert found["stpd_received_bytes"] == {"stpd_received_bytes_total": 1000}
    assert "stpd_api_total,what=open" not in found["stpd_api"]
    assert found["stpd_api_connections"] == {"stpd_api_connections": 1}


def test_the_number_of_series_is_bounded() -> None:
    """metrics (2): what is too many is summed up, not lost."""
    many = snapshot()
    many.hops = [
        HopLag(name=f"edge-{n}", kind="edge", lanes=[LaneLag(lane=3, messages=2, bytes=5, oldest_age_s=n)])
        for n in range(MAX_HOPS + 100)
    ]
    many.ledger.hops = [
        type(many.ledger.hops[0])(hop=f"edge-{n}", kind="edge", lane=3, routed=1)
        for n in range(MAX_HOPS + 100)
    ]
    found = families(render(many))
    assert len(found["stpd_hop_connected"]) == MAX_HOPS
    lag = found["stpd_hop_lag_messages"]
    assert lag[f"stpd_hop_lag_messages,hop={OTHER},kind=edge,lane=telemetry"] == 200
    assert sum(lag.values()) == 2 * (MAX_HOPS + 100)
    age = found["stpd_hop_lag_seconds"]
    assert age[f"stpd_hop_lag_seconds,hop={OTHER},kind=edge,lane=telemetry"] == MAX_HOPS + 99
    routed = {k: v for k, v in found["stpd_hop_messages"].items() if k.endswith("outcome=routed")}
    assert sum(routed.values()) == MAX_HOPS + 100
    assert len(routed) == MAX_HOPS + 1


def test_peers_are_no_labels() -> None:
    """metrics (2): a thousand devices at the door are still one series per class and outcome."""
    many = snapshot()
    one = many.ledger.doors[0]
    many.ledger.doors = [
        type(one)(peer=f"device-{n}", class_name="telemetry", received=1, accepted=1) for n in range(1000)
    ]
    text = render(many).decode()
    assert "device-" not in text
    assert 'stpd_door_messages_total{class="telemetry",outcome="received"} 1000.0' in text


def test_names_with_quotes_do_not_break_the_format() -> None:
    odd = snapshot()
    odd.hops[0].name = 'a"b\\c\nd'
    found = families(render(odd))
    assert 'stpd_hop_connected,hop=a"b\\c\nd,kind=reader' in found["stpd_hop_connected"]


def test_promtool_finds_nothing_to_complain_of() -> None:
    """metrics (1)."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    data = render(snapshot())
    run = subprocess.run([promtool, "check", "metrics"], input=data, capture_output=True, check=False)
    assert (run.returncode, run.stdout + run.stderr) == (0, b"")


# Alerts ------------------------------------------------------------------------------------------------

ALERTS = Path(__file__).parents[2] / "config" / "alerts.yml"


def test_alerts_ask_for_metrics_that_exist() -> None:
    """A renamed metric would leave an alert that never fires."""
    text = render(snapshot()).decode()
    expressions = re.findall(r"expr: ((?:.|\n)+?)\n +(?:for|labels)", ALERTS.read_text())
    asked = set(re.findall(r"stpd_\w+", " ".join(expressions)))
    assert len(asked) > 10
    for name in asked:
        assert re.search(rf"^{name}[ {{]", text, re.M), name


def test_alerts_fire_on_incidents_and_not_on_good_days(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    checked = subprocess.run(
        [promtool, "check", "rules", ALERTS], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr + checked.stdout
    names = set(re.findall(r"alert: (\w+)", ALERTS.read_text()))
    assert names == set(re.findall(r'alertname="(\w+)"', (tmp_path / "alerts_test.yml").read_text()))
    tested = subprocess.run(
        [promtool, "test", "rules", tmp_path / "alerts_test.yml"], capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stderr + tested.stdout
