"""What an idle session keeps, so that ten thousand of them stay cheap. `bench.idle` measures the whole process."""

from __future__ import annotations

import gc
import tracemalloc

from stp.core.session import Session
from tests.sim import Host, Network

OBJECTS = 10.0
"""KiB of Python objects of one side of an idle session, with the endpoint's tables. OpenSSL's are not seen here."""
COUNT = 60


def test_an_idle_session_keeps_little() -> None:
    net = Network(1)
    net.keep_log = False
    options = dict.fromkeys(("max_half_open", "address_half_open", "address_rate", "total_rate"), 1_000_000)
    hub, edge = net.listener(**options), net.dialler(**options)

    def take(session: Session) -> None:
        while session.next_event() is not None:
            pass

    def settle(hosts: tuple[Host, Host], count: int) -> None:
        for _ in range(count):
            edge.connect(hub)
        net.run_for(3.0)
        for host in hosts:
            host.sessions.clear()
        gc.collect()

    hub.on_ready = edge.on_ready = take
    settle((hub, edge), 5)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    settle((hub, edge), COUNT)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(hub.endpoint.sessions) == COUNT + 5
    assert (after - before) / 2 / COUNT / 1024 < OBJECTS
