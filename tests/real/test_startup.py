"""What a person sees who starts stpd with something wrong: one line of cause, one of what to do, and a status."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.fleet import Fleet, Node

pytestmark = [pytest.mark.real]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path / "fleet") as made:
        yield made


def start(node: Node) -> tuple[int, list[str]]:
    """Exit status and what stood on standard error but log lines."""
    done = subprocess.run(
        [sys.executable, "-m", "stpd", "run", "--config", str(node.config)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("{")]


def test_a_port_in_use(fleet: Fleet) -> None:
    first = fleet.hub("hub-1")
    first.start()
    second = fleet.hub("hub-2")
    text = second.config.read_text().replace(f":{second.port}", f":{first.port}")
    second.config.write_text(text)
    status, lines = start(second)
    assert status == 71
    assert len(lines) == 2
    assert f"127.0.0.1:{first.port}" in lines[0]
    assert "in use" in lines[0]


def test_a_tcp_port_in_use(fleet: Fleet) -> None:
    first = fleet.hub("hub-1")
    first.start()
    second = fleet.hub("hub-2")
    text = second.config.read_text().replace(f":{second.health_port}", f":{first.health_port}")
    second.config.write_text(text)
    status, lines = start(second)
    assert (status, len(lines)) == (71, 2)
    assert str(first.health_port) in lines[0]


def test_a_directory_that_cannot_be_written(fleet: Fleet) -> None:
    hub = fleet.hub()
    (hub.directory / "state").write_text("a file where a directory should be")
    status, lines = start(hub)
    assert (status, len(lines)) == (73, 2)
    assert "state" in lines[0]


def test_a_missing_key(fleet: Fleet) -> None:
    hub = fleet.hub()
    hub.identity.unlink()
    status, lines = start(hub)
    assert (status, len(lines)) == (78, 2)
    assert "identity.pem" in lines[0]
    assert "join" in lines[1]


def test_a_store_in_use_by_another_daemon(fleet: Fleet) -> None:
    first = fleet.hub("hub-1")
    first.start()
    second = fleet.hub("hub-2")
    text = second.config.read_text().replace('"state"', f'"{first.directory}/state"')
    second.config.write_text(text)
    status, lines = start(second)
    assert (status, len(lines)) == (73, 2)
    assert "state/store" in lines[0]


def test_a_broken_configuration_names_every_problem(fleet: Fleet) -> None:
    hub = fleet.hub()
    with hub.config.open("a") as file:
        file.write('[store]\nbudget = "much"\nretension = "5s"\n[log]\nlevel = "loud"\n')
    for words in (["run"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "stpd", *words, "--config", str(hub.config)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 78
        for path in ("store.budget", "store.retension", "log.level"):
            assert path in done.stderr
        assert 'did you mean "retention"?' in done.stderr


def test_sigterm_ends_with_0_within_10_s_and_keeps_what_was_acknowledged(fleet: Fleet) -> None:
    hub = fleet.hub()
    hub.start()
    begun = time.monotonic()
    assert hub.stop() == 0
    assert time.monotonic() - begun < 10
    assert "stopped" in hub.tail(1)


def test_sighup_reloads_rules_and_level_and_refuses_nonsense(fleet: Fleet) -> None:
    """Daemon promise (3)."""
    hub = fleet.hub()
    hub.start()
    good = hub.config.read_text()
    hub.config.write_text(good + '[log]\nlevel = "debug"\n')
    assert hub.process is not None
    hub.process.send_signal(signal.SIGHUP)
    wait_for(hub, '"event": "reloaded"')
    assert "log.level" in hub.tail(3)
    hub.config.write_text(good + '[log]\nlevel = "loud"\n')
    hub.process.send_signal(signal.SIGHUP)
    wait_for(hub, '"event": "reload_refused"')
    assert hub.get("/health")[0] == 200
    hub.config.write_text(good.replace('publish = ["#", "$inbox/#"]', 'publish = ["a/#"]'))
    report = hub.ctl("reload")
    assert any("access" in one for one in report["changed"])
    assert report["problems"] == []


def test_health_ready_and_metrics(fleet: Fleet) -> None:
    hub = fleet.hub()
    hub.start()
    assert hub.get("/health")[0] == 200
    assert hub.get("/ready")[0] == 200
    status, text = hub.get("/metrics")
    assert status == 200
    assert "stpd_unexplained_messages 0.0" in text
    assert hub.get("/nothing")[0] == 404


def wait_for(node: Node, text: str, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while text not in node.log.read_text():
        assert time.monotonic() < deadline, f"{text} not in:\n{node.tail()}"
        time.sleep(0.02)


def test_a_place_where_nothing_can_be_made(fleet: Fleet) -> None:
    hub = fleet.hub()
    hub.config.write_text(hub.config.read_text().replace('"state"', '"/proc/stpd"'))
    status, lines = start(hub)
    assert (status, len(lines)) == (73, 2)
    assert "/proc/stpd cannot be written" in lines[0]
