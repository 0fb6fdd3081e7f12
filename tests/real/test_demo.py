"""What people try first must work: `make demo`, its verdict, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent.parent


def demo(tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.demo"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def nothing_runs_in(home: Path, seconds: float = 10.0) -> bool:
    """Whether every process that works in this directory ends within that time."""
    end = time.monotonic() + seconds
    while found := running_in(str(home)):
        if time.monotonic() > end:
            pytest.fail(f"still running: {found}")
        time.sleep(0.05)
    return True


def running_in(home: str) -> list[str]:
    """Command lines of processes that work in this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            cwd, line = os.readlink(entry / "cwd"), (entry / "cmdline").read_bytes()
        except OSError:
            continue  # ended, or not ours
        if cwd.startswith(home):
            found.append(line.replace(b"\0", b" ").decode())
    return found


def test_the_demo_ends_well_and_leaves_nothing(tmp_path: Path) -> None:
    process = demo(tmp_path)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert output.rstrip().endswith("lost 0 duplicated 0 reordered 0 unexplained 0")
    assert re.search(r"^\$ kill -9 \d+$", output, re.MULTILINE)
    assert "as sent" in output
    assert not list(tmp_path.iterdir())
    assert nothing_runs_in(tmp_path)


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    process = demo(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("$ stpd run --config edge"):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert output.rstrip().endswith("stopped")
    assert not list(tmp_path.iterdir())
    assert nothing_runs_in(tmp_path)
