"""A daemon's state in words: what a person asks first, and what is out of order by name."""

from stpctl.render import clean, count_of, instant, number, size, span
from stpd.status import BufferStatus, DaemonStatus, EdgeStatus, UpstreamStatus

CERTIFICATE_SOON_S = 7 * 86400
"""Seconds before its end from which a certificate is worth a line."""


def describe(s: DaemonStatus) -> list[str]:
    """All of `stpctl status`, a line per subject."""
    lines = [_who(s)]
    lines += [_uplink(u, s.now_ms) for u in s.upstreams]
    if not s.upstreams and s.role == "gateway":
        lines.append("No uplink is configured: nothing goes up from here.")
    lines += [*_below(s), *_buffer(s.buffer, s.now_ms), *_ledger(s), *_warnings(s)]
    return lines


def _who(s: DaemonStatus) -> str:
    up = span((s.now_ms - s.started_ms) / 1000)
    state = "draining" if s.draining else "ready" if s.ready else "starting"
    where = f" ({clean(s.domain)})" if s.domain else ""
    name = f"{s.role.capitalize() or 'Node'} {clean(s.node)}{where}"
    return f"{name}: {state}, up {up}, {count_of(s.sessions, 'session')}, stpd {clean(s.version)}."


def behind(messages: int, size_bytes: int, oldest_s: float) -> str:
    """ "behind by 1,234 messages (1.2 MB), the oldest 5 min old" """
    text = f"behind by {count_of(messages, 'message')} ({size(size_bytes)})"
    return f"{text}, the oldest {span(oldest_s)} old" if oldest_s else text


def _uplink(u: UpstreamStatus, now_ms: int) -> str:
    since = f" since {instant(u.since_ms, now_ms)}" if u.since_ms else ""
    parts = [f"{u.state}{since}"]
    if u.state == "connected" and u.rtt_ms:
        parts[0] += f", round trip {u.rtt_ms:.1f} ms"
    if u.carrier == "tls":
        parts[0] += ", over TLS, as UDP does not get through"
    if u.behind_messages:
        text = behind(u.behind_messages, u.behind_bytes, u.oldest_age_s)
        parts.append(text + (f", since {instant(u.behind_since_ms, now_ms)}" if u.behind_since_ms else ""))
    elif u.state == "connected":
        parts.append("level")
    if u.state not in ("connected", "standby"):
        if u.last_error:
            parts.append(f"because: {clean(u.last_error)}")
        if u.next_attempt_ms > now_ms:
            parts.append(f"next attempt in {span((u.next_attempt_ms - now_ms) / 1000)}")
    return f"Uplink {clean(u.node)}: {'; '.join(parts)}."


def _below(s: DaemonStatus) -> list[str]:
    lines = []
    if s.edges:
        late = f"; {s.edges_behind} behind: stpctl edges lag" if s.edges_behind else ""
        lines.append(f"Edges: {s.edges_connected} of {s.edges} connected{late}.")
    if s.readers:
        late = f"; {s.readers_behind} behind: stpctl readers list" if s.readers_behind else ", all level"
        lines.append(f"Readers: {s.readers}{late}.")
    return lines


def _buffer(b: BufferStatus, now_ms: int) -> list[str]:
    share = 100 * b.used_bytes / b.budget_bytes if b.budget_bytes else 0.0
    text = f"Buffer: {size(b.used_bytes)} of {size(b.budget_bytes)} used ({share:.0f} %)"
    if b.oldest_age_s:
        text += f", the oldest message {span(b.oldest_age_s)} old"
    lines = [text + "."]
    if b.full:
        since = f" since {instant(b.full_since_ms, now_ms)}" if b.full_since_ms else ""
        cause = f": {clean(b.full_cause)}" if b.full_cause else ""
        lines.append(f"The store is FULL{since}: publishers are held back, nothing kept is lost{cause}.")
    if b.quarantined_records:
        text = f"Quarantine: {count_of(b.quarantined_records, 'record')}"
        if b.quarantined:
            newest = b.quarantined[-1]
            text += f", the newest from {clean(newest.peer or 'this node')} ({clean(newest.reason)})"
        lines.append(text + ": stpctl buffer show.")
    return lines


def _ledger(s: DaemonStatus) -> list[str]:
    if s.unexplained:
        return [f"Ledger: {number(s.unexplained)} messages are UNEXPLAINED: stpctl ledger show."]
    return ["Ledger: every message is accounted for."]


def _warnings(s: DaemonStatus) -> list[str]:
    lines = [f"Attention: {clean(reason)}." for reason in s.reasons if not _said(reason, s)]
    left = s.certificate_not_after_ms - s.now_ms
    if s.certificate_not_after_ms and left <= 0:
        lines.append("The certificate has ENDED: stpd renew.")
    elif s.certificate_not_after_ms and left < CERTIFICATE_SOON_S * 1000:
        lines.append(f"The certificate ends in {span(left / 1000)}: stpd renew.")
    if not s.clock_synchronised:
        lines.append("The clock is not synchronised.")
    if s.log_drops:
        lines.append(f"The log lost {count_of(s.log_drops, 'line')}: whoever reads it is too slow.")
    return lines


def _said(reason: str, s: DaemonStatus) -> bool:
    """Whether a line above says it already, and better."""
    return (s.buffer.full and "full" in reason) or (s.unexplained > 0 and "unexplained" in reason)


def lag(e: EdgeStatus, now_ms: int) -> str:
    """One edge: who is behind, by how much, since when, why."""
    state = "connected" if e.connected else f"away since {instant(e.last_seen_ms, now_ms)}"
    parts = []
    if e.behind_messages:
        parts.append("down: " + behind(e.behind_messages, e.behind_bytes, e.oldest_age_s))
    if e.reported_messages:
        told = "" if e.connected else f" (as it said at {instant(e.reported_ms, now_ms)})"
        cause = f", because {clean(e.reported_cause)}" if e.reported_cause else ""
        up = behind(e.reported_messages, e.reported_bytes, e.reported_oldest_age_s)
        parts.append(f"up: {up}{told}{cause}")
    return f"{clean(e.node)}: {state}, {'; '.join(parts) or 'level'}."
