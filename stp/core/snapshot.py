"""What a session over datagrams says of itself: the numbers of its parts, in one place. Above the data space.

Nothing here is called but by who looks: the parts count with plain integers as they go.
"""

from __future__ import annotations

from typing import Final

from stp.core.congestion import pacing_rate
from stp.core.dataspace import DataSpace
from stp.core.events import SessionStatistics

SLOW_START: Final = "slow start"
CONGESTION_AVOIDANCE: Final = "congestion avoidance"
IN_RECOVERY: Final = "recovery"

BY_APPLICATION: Final = "application"
BY_CREDIT: Final = "flow credit"
BY_WINDOW: Final = "congestion window"
BY_PACING: Final = "pacing"


def take(found: SessionStatistics, data: DataSpace, now: float) -> None:
    """Write the state of `data` into `found`."""
    recovery, congestion, rtt = data.recovery, data.recovery.congestion, data.recovery.rtt
    found.packets_lost, found.packets_spurious = recovery.lost_packets, recovery.spurious
    found.probe_timeouts, found.pto_count = recovery.probe_timeouts, recovery.pto_count
    sizer = data.path.sizer
    found.datagram, found.size_probes = sizer.datagram, sizer.probes
    found.black_holes = sizer.black_holes
    found.key_updates, found.key_phase = data.phases.updates, data.sealer.phase
    found.failed_opens, found.repeated = data.opener.failed, data.opener.repeated
    found.rtt, found.rtt_var = rtt.smoothed, rtt.var
    if rtt.sampled:
        found.rtt_min, found.rtt_latest = rtt.min, rtt.latest
    found.cwnd, found.in_flight = congestion.cwnd, recovery.in_flight
    found.ssthresh = int(min(congestion.ssthresh, 1 << 62)) if congestion.ssthresh != float("inf") else 0
    found.pacing_rate = pacing_rate(congestion.cwnd, rtt.smoothed)
    found.congestion_state = state_of(data)
    found.limited_by = limit_of(data, now)
    found.session_credit = data.streams.session_room
    found.cids_local = len(data.local_cids.active)
    found.cids_remote = 1 + len(data.remote_cids.spare)
    found.keepalive = data.liveness.keepalive


def state_of(data: DataSpace) -> str:
    """Where congestion control is (RFC 9002 §7.3)."""
    recovery = data.recovery
    if recovery.in_recovery:
        return IN_RECOVERY
    return SLOW_START if recovery.congestion.slow_start else CONGESTION_AVOIDANCE


def limit_of(data: DataSpace, now: float) -> str:
    """What keeps more from leaving at this moment."""
    streams, recovery, output = data.streams, data.recovery, data.output
    room = streams.session_room
    waiting = credit = output.datagrams is not None and bool(output.datagrams.waiting)
    for sender in (streams.send[0], *streams.writers.values()):
        if sender.next < sender.written:
            waiting = True
            credit = credit or sender.wants_to_send(room if sender.id else 1)
    if not waiting:
        return BY_APPLICATION
    if not credit:
        return BY_CREDIT
    if recovery.congestion.cwnd - recovery.in_flight < data.path.datagram:
        return BY_WINDOW
    return BY_PACING if not output.pacer.may_send(now) else BY_APPLICATION
