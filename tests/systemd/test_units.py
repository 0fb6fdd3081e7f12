"""The shipped units: systemd finds nothing wrong with them, and little to fear; fault row 48."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
DAEMONS = ("stpd-hub.service", "stpd-gateway.service")
MAX_EXPOSURE = 1.1

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units with an ExecStart that is there: without it systemd complains of nothing else."""
    for source in UNITS.iterdir():
        text = source.read_text()
        (tmp_path / source.name).write_text(text.replace("/usr/bin/stpd", sys.executable))
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@needs_systemd
@pytest.mark.real
@pytest.mark.parametrize("unit", [*DAEMONS, "stpd-renew@.service", "stpd-renew@.timer"])
def test_systemd_finds_nothing_wrong(installed: Path, unit: str) -> None:
    """It exits with 0 on unknown keys; what it has to say stands on standard error."""
    found = analyze("verify", str(installed / unit))
    assert (found.returncode, found.stderr, found.stdout) == (0, "", "")


@needs_systemd
@pytest.mark.real
def test_systemd_would_find_a_misspelled_key(installed: Path) -> None:
    """The test above can fail."""
    unit = installed / DAEMONS[0]
    unit.write_text(unit.read_text().replace("PrivateUsers=", "PrivateUser="))
    assert "PrivateUser" in analyze("verify", str(unit)).stderr


@needs_systemd
@pytest.mark.real
@pytest.mark.parametrize("unit", DAEMONS)
def test_fault_48_exposure(installed: Path, unit: str) -> None:
    threshold = str(int(MAX_EXPOSURE * 10))
    found = analyze(
        "security", "--offline=true", "--no-pager", f"--threshold={threshold}", str(installed / unit)
    )
    overall = re.search(r"Overall exposure level for \S+: ([\d.]+)", found.stdout)
    assert overall is not None, found.stderr
    assert float(overall[1]) <= MAX_EXPOSURE
    assert found.returncode == 0


@pytest.mark.parametrize("unit", DAEMONS)
def test_what_the_daemon_relies_on(unit: str) -> None:
    role = unit.removeprefix("stpd-").removesuffix(".service")
    lines = (UNITS / unit).read_text().splitlines()
    for needed in (
        "Type=notify",
        "WatchdogSec=30",
        "DynamicUser=yes",
        "MemoryDenyWriteExecute=yes",
        "CapabilityBoundingSet=",
        f"StateDirectory=stpd-{role}",
        f"ExecStart=/usr/bin/stpd run --config /etc/stpd/{role}.toml",
    ):
        assert needed in lines
    after = " ".join(line for line in lines if line.startswith(("After=", "Requires=", "Wants=")))
    assert "time-sync" not in after  # a machine without a clock starts
    assert "network-online" not in after  # one without a network serves its own devices
