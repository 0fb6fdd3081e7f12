"""A path in words and numbers, a line per subject."""

from stpctl.render import clean, count_of, instant, number, size, span
from stpd.status import PathStatus

LIMITS = {
    "application": "the application: it has nothing more to send",
    "flow credit": "flow credit: the peer takes no more yet",
    "congestion window": "the congestion window: more is under way than the network is known to take",
    "pacing": "pacing: the next burst waits for its moment",
}
CARRIERS = {"udp": "UDP", "tls": "TLS on TCP", "unix": "a Unix socket"}


def describe(p: PathStatus) -> list[str]:
    """All of `stpctl path show`."""
    lines = [_where(p)]
    if p.datagram_bytes:
        lines += [_packets(p), _round_trip(p), _loss(p), _window(p)]
    elif p.rtt_ms:
        lines.append(f"Round trip: {p.rtt_ms:.2f} ms by ping; losses and rates are the kernel's.")
    lines.append(f"Limited by {LIMITS.get(p.limited_by, clean(p.limited_by) or 'the carrier')}.")
    if p.datagrams_sent or p.datagrams_received or p.datagrams_refused or p.datagrams_dropped:
        lines.append(_datagrams(p))
    lines.append(_keys(p))
    if p.datagram_bytes:
        lines.append(_signs(p))
    return lines


def _where(p: PathStatus) -> str:
    carrier = CARRIERS.get(p.carrier, clean(p.carrier))
    local = f" from {clean(p.local_address)}" if p.local_address else ""
    way = f"{local} to {clean(p.address)}" if p.dialling else f"{local}, asked by {clean(p.address)}"
    up = span((p.now_ms - p.since_ms) / 1000)
    return f"{clean(p.node) or 'A peer'}: {carrier}{way}, up {up}, session {clean(p.session)[:8]}."


def _packets(p: PathStatus) -> str:
    text = f"Packets: {p.datagram_bytes:,} bytes of UDP payload"
    if p.size_probes:
        text += f" after {count_of(p.size_probes, 'probe')}"
    if p.black_holes:
        text += f", made smaller {count_of(p.black_holes, 'time')} in a black hole"
    if p.migrations:
        text += f"; the path changed {count_of(p.migrations, 'time')}"
    came = f"{number(p.packets_in)} in ({size(p.bytes_in)})"
    return f"{text}. {came}, {number(p.packets_out)} out ({size(p.bytes_out)})."


def _round_trip(p: PathStatus) -> str:
    if not p.rtt_min_ms:
        return "Round trip: not measured yet."
    return (
        f"Round trip: {p.rtt_ms:.2f} ms ± {p.rtt_var_ms:.2f}, latest {p.rtt_latest_ms:.2f},"
        f" least {p.rtt_min_ms:.2f}."
    )


def _loss(p: PathStatus) -> str:
    text = f"Loss: {count_of(p.packets_lost, 'packet')}, {p.loss_percent:.2f} % of what left;"
    text += f" {count_of(p.probe_timeouts, 'probe timeout')}"
    if p.packets_spurious:
        text += f"; {number(p.packets_spurious)} were only late"
    if p.pto_count:
        text += f". The peer is silent: {count_of(p.pto_count, 'probe')} unanswered"
    return text + "."


def _window(p: PathStatus) -> str:
    threshold = f", threshold {size(p.slow_start_threshold_bytes)}" if p.slow_start_threshold_bytes else ""
    return (
        f"Congestion: {clean(p.congestion_state)}, window {size(p.congestion_window_bytes)}{threshold},"
        f" {size(p.in_flight_bytes)} in flight, paced at {size(p.pacing_bytes_per_s)}/s;"
        f" credit {size(p.credit_bytes)}."
    )


def _datagrams(p: PathStatus) -> str:
    text = f"Datagrams: {number(p.datagrams_sent)} sent, {number(p.datagrams_acked)} acknowledged,"
    text += f" {number(p.datagrams_lost)} lost; {number(p.datagrams_received)} received"
    if p.datagrams_refused or p.datagrams_dropped:
        text += f"; {number(p.datagrams_refused)} refused, {number(p.datagrams_dropped)} dropped here"
    return text + "."


def _keys(p: PathStatus) -> str:
    cipher = clean(p.cipher) or "none, the kernel is the only party between"
    text = f"Keys: {cipher}"
    if p.datagram_bytes:
        text += f", phase {p.key_phase}, {count_of(p.key_updates, 'update')}"
    if p.certificate_not_after_ms:
        text += f". The peer's certificate ends {instant(p.certificate_not_after_ms, p.now_ms)}"
    return text + "."


def _signs(p: PathStatus) -> str:
    text = (
        f"CIDs: {p.cids_local} of ours, {p.cids_remote} of the peer's. Keep-alive after {p.keepalive_s:.0f} s"
    )
    if p.failed_opens or p.repeated:
        text += f". {number(p.failed_opens)} packets did not open, {number(p.repeated)} came twice"
    if p.trace_until_ms:
        until = (
            "as long as it lives" if p.trace_until_ms < 0 else f"until {instant(p.trace_until_ms, p.now_ms)}"
        )
        text += f". Its event log is written {until}"
    return text + "."
