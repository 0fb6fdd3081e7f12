"""The way to a peer as operators see it."""

from __future__ import annotations

from stpd.peers import Peer, address_of, session_id
from stpd.status import PathStatus


def path_status(peer: Peer, *, now_ms: int, local_address: str, trace_until_ms: int) -> PathStatus:
    """One session's transport, in the shape of the API."""
    session, identity = peer.session, peer.session.peer
    n = session.statistics()
    return PathStatus(
        session=session_id(session),
        node=peer.node,
        carrier=session.carrier,
        local_address=local_address,
        address=address_of(session),
        dialling=session.dialling,
        since_ms=peer.opened_ms,
        now_ms=now_ms,
        datagram_bytes=n.datagram,
        size_probes=n.size_probes,
        black_holes=n.black_holes,
        migrations=n.migrations,
        rtt_ms=_ms(n.rtt),
        rtt_var_ms=_ms(n.rtt_var),
        rtt_min_ms=_ms(n.rtt_min),
        rtt_latest_ms=_ms(n.rtt_latest),
        packets_in=n.datagrams_in,
        packets_out=n.datagrams_out,
        bytes_in=n.bytes_in,
        bytes_out=n.bytes_out,
        packets_lost=n.packets_lost,
        packets_spurious=n.packets_spurious,
        loss_percent=round(100 * n.packets_lost / n.datagrams_out, 3) if n.datagrams_out else 0.0,
        probe_timeouts=n.probe_timeouts,
        pto_count=n.pto_count,
        congestion_state=n.congestion_state,
        congestion_window_bytes=n.cwnd,
        slow_start_threshold_bytes=n.ssthresh,
        in_flight_bytes=n.in_flight,
        pacing_bytes_per_s=round(n.pacing_rate),
        credit_bytes=n.session_credit,
        limited_by=n.limited_by,
        datagrams_sent=n.datagrams_sent,
        datagrams_acked=n.datagrams_acked,
        datagrams_lost=n.datagrams_lost,
        datagrams_received=n.datagrams_received,
        datagrams_refused=n.datagrams_refused,
        datagrams_dropped=n.datagrams_dropped,
        cipher=session.suite,
        key_phase=n.key_phase,
        key_updates=n.key_updates,
        certificate_not_after_ms=round(identity.not_after.timestamp() * 1000) if identity else 0,
        cids_local=n.cids_local,
        cids_remote=n.cids_remote,
        keepalive_s=n.keepalive,
        path_validations=n.path_validations,
        path_reverts=n.path_reverts,
        rebinds=n.rebinds,
        failed_opens=n.failed_opens,
        repeated=n.repeated,
        trace_until_ms=trace_until_ms,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
