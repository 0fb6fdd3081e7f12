"""What this host can say of itself: load, memory, disk, and a temperature where there is one. Linux."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TypeAlias

Reading: TypeAlias = tuple[str, dict[str, float]]
"""A few characters for people, and the figures for programs."""


def load() -> Reading:
    """Load averages, and how hot it is where the kernel knows."""
    one, five, fifteen = os.getloadavg()
    figures = {"load_1m": one, "load_5m": five, "load_15m": fifteen}
    degrees = temperature()
    if degrees is None:
        return f"{one:.2f}", figures
    return f"{one:.2f} {degrees:.0f}°C", {**figures, "celsius": degrees}


def memory() -> Reading:
    """Memory in use, from /proc/meminfo."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kilobytes = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    return f"{(total - free) / 1e9:.2f} GB", {"total_bytes": total, "available_bytes": free}


def disk() -> Reading:
    """Room on the root file system."""
    usage = shutil.disk_usage("/")
    return f"{usage.free / 1e9:.1f} GB", {"total_bytes": usage.total, "free_bytes": usage.free}


def temperature() -> float | None:
    """Degrees Celsius of the warmest zone that makes sense, None if there is none."""
    found = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            degrees = int(zone.read_text()) / 1000
        except (OSError, ValueError):
            continue  # a sensor that sleeps
        if 0 < degrees < 150:
            found.append(degrees)
    return max(found, default=None)
