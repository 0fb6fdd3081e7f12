"""Fault matrix, row 10, between network namespaces (level L3): real sockets, and a router that passes less."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.transport import make_identities
from tests.real.namespaces import FAR, Namespaces, why_not

REASON = why_not()
pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

SIZE = 20_000_000
RATE = 4_000_000


class Move:
    """A transfer under way from the near host to the far one."""

    def __init__(self, net: Namespaces, directory: Path) -> None:
        make_identities(directory)
        command = [sys.executable, "-m", "tests.real.mover"]
        self.server = net.popen(net.far, [*command, "serve", str(directory), FAR, str(SIZE)])
        assert self.server.stdout is not None
        port = self.server.stdout.readline().strip()
        self.client = net.popen(net.near, [*command, "send", str(directory), FAR, str(SIZE), port, str(RATE)])
        self.sizes: list[int] = []

    def until_size(self, size: int) -> None:
        assert self.client.stdout is not None
        while size not in self.sizes:
            line = self.client.stdout.readline()
            assert line.startswith("size "), line
            self.sizes.append(int(line.split()[1]))

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        sent, received = (end.communicate(timeout=30)[0].splitlines() for end in (self.client, self.server))
        self.sizes += [int(line.split()[1]) for line in sent[:-1]]
        return json.loads(sent[-1]), json.loads(received[-1])

    def kill(self) -> None:
        for end in (self.client, self.server):
            end.kill()
            end.wait()


@pytest.mark.parametrize("where", ["router", "first hop"])
def test_fault_10_mtu_falls_to_1280_in_mid_transfer(tmp_path: Path, where: str) -> None:
    """R-6-7: full packets vanish (or the kernel refuses them): at most 3 s of standstill, and every byte arrives."""
    with Namespaces() as net:
        move = Move(net, tmp_path)
        try:
            move.until_size(1472)
            (net.set_mtu if where == "router" else net.set_first_hop)(1280)
            sent, received = move.finish()
        finally:
            move.kill()
    assert received["bytes"] == SIZE
    assert received["sha"] == sent["sha"]
    assert received["code"] == sent["code"] == 0
    assert received["stall"] <= 3.0, received
    assert move.sizes[:3] == [1200, 1472, 1200]
    assert sent["datagram"] <= 1252
    assert sent["black_holes"] == 1
    assert ("EMSGSIZE" in sent["errors"]) is (where == "first hop")
