"""Doors of the daemon: its configuration."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path

from stpd.config import ConfigError, load
from tests.fuzz.engine import Target

GATEWAY = b"""
role = "gateway"
state_dir = "state"
identity = ["identity.pem"]
[listen]
udp = ["0.0.0.0:9000", "[::1]:9000"]
[store]
budget = "1GB"
retention = "72h"
[log]
level = "info"
[[class]]
name = "alarms"
filters = ["alarm/#"]
lane = "event"
ttl = "10m"
[[upstream]]
node = "hub"
url = "stp://hub@hub.example:9000"
subscribe = ["cmd/{node}/#"]
[[access]]
name = "devices"
nodes = ["dev-*"]
publish = ["{node}/#"]
subscribe = ["cmd/{node}/#"]
"""
HUB = b"""
role = "hub"
state_dir = "/var/lib/stpd"
identity = "hub.pem"
[enrol]
listen = "0.0.0.0:8443"
ca = "ca"
[management]
listen = "127.0.0.1:9443"
[health]
listen = "127.0.0.1:8080"
[limits]
sessions = 1000
[[access]]
nodes = ["gw-*"]
role = "gateway"
publish = ["#"]
subscribe = ["cmd/#"]
speaks_for = ["dev-*"]
"""
WORDS = b"""[[class]] [store] [[access]] = " [] true 1e400 -0 {} 1979-05-27 "99999999999999999999d" "1e9GB"
"\\u0000" nan ["a",1] inf 0x7f [[upstream]] "stp://" "{node}" ....""".split()


def configuration() -> Target:
    directory = tempfile.TemporaryDirectory(prefix="stpd-fuzz-")
    atexit.register(directory.cleanup)
    path = Path(directory.name) / "stpd.toml"

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        load(path)

    return Target(
        name="config",
        feed=feed,
        seeds=[GATEWAY, HUB, b'identity = "identity.pem"\n'],
        promised=(ConfigError,),
        words=WORDS,
    )
