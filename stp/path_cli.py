"""`stp path`: what was found on the way to a keeper, in words and as JSON.

(1) The first line is a sentence that stands alone; then one line for each thing that was tried; then what to do,
    where something is wrong.
(2) JSON has all its keys, whatever was found; what is not known is null, and keys are added, never renamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from stp.failures import EX_UNAVAILABLE, EX_USAGE, Failure
from stp.printing import emit, emit_json, ms, say

if TYPE_CHECKING:
    from stp.pathfinder import Findings, Memory, Resolution, Way

HELP: Final = """What works between here and the keeper, and why not. HOST: as --url, with or without stp://.

    Its name, UDP and TLS are tried side by side, then measured; it takes 3 to 10 seconds. Nothing is published, and a
    program that runs under the same identity keeps its session. Exit code 69 when nothing works.

    \b
    stp path
    stp path gw-1@192.168.1.5
    stp path 'stp://gw-1@gw.local:9000?tls=443' -o json
    """


async def show(url: str, identity: tuple[str, ...], node: str, output: str) -> None:
    """Find out, and print it. Raises IdentityError, and Failure when nothing works."""
    from attrs import evolve

    from stp import pathfinder
    from stp.enrol import load_identity
    from stp.identity import parse_url, unix_path

    if unix_path(url):
        raise Failure(
            f"{url} is a socket of this machine: no network is on the way", "ask `stp ping`", EX_USAGE
        )
    loaded = load_identity(list(identity) or None)
    upstream = loaded.upstream
    target = parse_url(url or (upstream.url if upstream is not None else ""), upstream)
    found = await pathfinder.find(evolve(target, node=node) if node else target, loaded, say)
    if output == "json":
        emit_json(**as_json(found))
    else:
        for line in describe(found):
            emit(line)
    if not (found.best_udp.works or found.tls.works):
        raise Failure("", "", EX_UNAVAILABLE)


# -- in words ----------------------------------------------------------------------------------------------


def describe(found: Findings) -> list[str]:
    """All lines (1)."""
    lines = [headline(found), ""]
    lines.append(f"  name    {_name(found)}")
    lines += [f"  UDP     {way_in_words(way)}" for way in found.udp]
    lines.append(f"  TLS     {way_in_words(found.tls)}")
    lines.append(f"  choice  {choice(found)}")
    lines.append(f"  memory  {_memory(found.memory)}")
    lines += [f"  next    {advice}" for advice in next_steps(found)]
    return lines


def headline(found: Findings) -> str:
    """One sentence."""
    udp, tls, target = found.best_udp, found.tls, found.target
    if udp.works:
        return f"UDP works: {_quality(udp)}."
    if tls.works:
        return f"UDP does not work ({_short(udp)}), TLS does: {_quality(tls)}."
    if found.resolution.problem and not tls.proxy:
        return f"Nothing works: the name {target.host} leads nowhere."
    same = not target.tls or tls.fault is udp.fault or _misnamed(udp, tls)
    why = _short(udp) if same else f"UDP: {_short(udp)}; TLS: {_short(tls)}"
    return f"Nothing works between here and {target.node} at {target.where}: {why}."


def way_in_words(way: Way) -> str:
    """What was found of one way."""
    if not way.port:
        return "not tried: the URL says tls=0"
    where = f"{way.address} port {way.port}" if way.address else f"port {way.port}"
    if way.proxy:
        where = f"port {way.port} through the proxy {way.proxy}"
    if not way.works:
        return f"{where}: {_long(way)}"
    text = f"{where}: connected in {_ms(way.connected)}"
    if way.tcp:
        text += f", of which TCP {_ms(way.tcp)}"
    text += f"; round trips {_ms(way.rtt_min)} at least, p50 {_ms(way.rtt_p50)}"
    if way.carrier == "udp":
        text += f"; {way.lost} of {way.sent} lost; {_size(way)}; congestion control {way.congestion}"
    return text


def choice(found: Findings) -> str:
    """What a client does here (R-11-4)."""
    from stp.racing import PROBE_MOST, TLS_AFTER, tls_after

    after = tls_after(found.memory.known.carrier)
    udp, tls = found.best_udp, found.tls
    if udp.works and tls.works and not after:
        return "both at once, since TLS worked here last; whichever stands first, and UDP again when it is stable"
    if udp.works:
        return "UDP"
    if tls.works:
        when = f"after {TLS_AFTER:g} s without an answer" if after else "at once, since it worked here last"
        return f"TLS, {when}; UDP is asked again at least every {PROBE_MOST:g} s"
    return "nothing: it tries again and again"


def next_steps(found: Findings) -> list[str]:
    """What to do where something is wrong; at most one sentence for each way."""
    if found.resolution.problem:
        return [
            f"write the address instead of {found.target.host}, or mend DNS: getent hosts {found.target.host}"
        ]
    steps = []
    udp, tls = found.best_udp, found.tls
    if not udp.works:
        steps.append(_step(udp, found))
    if tls.port and not tls.works and not _misnamed(udp, tls):
        steps.append(_step(tls, found))
    if udp.works and 10 * udp.lost > udp.sent:
        steps.append(
            "so much loss is no congestion of ours: look at the radio, the cable, the duplex of a port"
        )
    if udp.works and 0 < udp.datagram < 1200:
        steps.append("so small packets are costly: look for a tunnel within a tunnel on the way")
    return list(dict.fromkeys(step for step in steps if step))


def _misnamed(udp: Way, tls: Way) -> bool:
    """TLS says no more of a wrong name than that it is refused."""
    from stp.pathfinder import Fault

    return udp.fault is Fault.WRONG_NODE and tls.fault is Fault.REFUSED_BY_US


def _step(way: Way, found: Findings) -> str:
    from stp.pathfinder import Fault

    if way.carrier == "tls" and found.best_udp.works:
        return "TLS is not needed while UDP works; where UDP is blocked it will be: listen.tls at the keeper opens it"
    target, port = found.target, f"{'UDP' if way.carrier == 'udp' else 'TCP'} port {way.port}"
    match way.fault:
        case Fault.SILENCE if way.carrier == "udp":
            keys = ", ".join(found.key_ids) or "none"
            text = f"open {port} on the way and at {target.host}; and compare network keys: here {keys}, at the hub"
            return f"{text} `stpd network-key show`"
        case Fault.SILENCE if way.proxy:
            return f"ask whoever runs the proxy {way.proxy}, or unset STP_PROXY and HTTPS_PROXY"
        case Fault.SILENCE:
            return f"open {port} on the way and at {target.host}"
        case Fault.PORT_CLOSED if found.tls.works:
            return f"stpd is there, for TLS works: look at its listen.udp, and for a firewall that rejects {port}"
        case Fault.PORT_CLOSED:
            return f"start stpd at {target.host} (systemctl status stpd), or mend the ports in the URL"
        case Fault.NO_ROUTE if found.tls.works and way.carrier == "udp":
            return f"a router or firewall on the way rejects {port}, for TLS passes: open it there"
        case Fault.NO_ROUTE:
            return "has this machine a way there? ip route get " + (way.address or target.host)
        case Fault.FORBIDDEN:
            return f"a firewall of this machine forbids {port}: nft list ruleset"
        case Fault.PROXY:
            return f"mend the proxy {way.proxy}, or unset STP_PROXY and HTTPS_PROXY".replace("  ", " ")
        case Fault.WRONG_NODE:
            return f"write stp://{way.found}@{target.where}, if that is the node you mean"
        case Fault.REFUSED_BY_PEER if way.carrier == "tls":
            return f"is it stpd that answers at {port}? Then our identity needs `stp renew`, or `stp join`"
        case Fault.REFUSED_BY_PEER:
            return "our identity is not accepted there: `stp renew`, or `stp join` with a new token"
        case Fault.REFUSED_BY_US:
            return (
                "is it the node you mean, and of our fleet? Then its certificate must be mended, or our clock"
            )
        case _:
            return ""


def _short(way: Way) -> str:
    from stp.pathfinder import Fault

    match way.fault:
        case Fault.SILENCE:
            return "no answer"
        case Fault.PORT_CLOSED:
            return "nobody listens there"
        case Fault.NO_ROUTE:
            return "no way there"
        case Fault.FORBIDDEN:
            return "forbidden on this machine"
        case Fault.PROXY:
            return "the proxy is no way"
        case Fault.WRONG_NODE:
            return f"{way.found} answers, not the node you named"
        case Fault.REFUSED_BY_PEER:
            return "it refuses us" if way.carrier == "tls" else "it refuses our certificate"
        case Fault.REFUSED_BY_US:
            return "we refuse its certificate"
        case Fault.NO_NAME:
            return "its name leads nowhere"
        case Fault.NOT_TRIED:
            return "not tried"
        case _:
            return "broken off"


def _long(way: Way) -> str:
    from stp.pathfinder import ANSWER_TIMEOUT, Fault

    wait = f"{ANSWER_TIMEOUT:g} s"
    match way.fault:
        case Fault.SILENCE if way.carrier == "udp":
            text = f"no answer within {wait}: it is blocked on the way, or no stpd is there, or the network key is"
            return f"{text} another; silence does not say which"
        case Fault.SILENCE if way.tcp:
            return f"TCP stands after {_ms(way.tcp)}, and TLS is not answered within {wait}: is stpd there?"
        case Fault.SILENCE:
            return f"no answer within {wait}: blocked on the way, or no machine there"
        case Fault.PORT_CLOSED:
            return f"nobody listens there: the machine, or a firewall before it, says so ({way.reason})"
        case Fault.NO_ROUTE:
            return f"no way there: this machine, or a router, says so ({way.reason})"
        case Fault.FORBIDDEN:
            return f"this machine does not let it out ({way.reason})"
        case Fault.WRONG_NODE:
            return f"an stpd answers, and it is {way.found} ({way.reason})"
        case Fault.REFUSED_BY_PEER if way.carrier == "tls":
            return f"somebody answers, and refuses us: {way.reason}"
        case Fault.REFUSED_BY_PEER:
            return f"stpd is there, and refuses our certificate: {way.reason}"
        case Fault.REFUSED_BY_US:
            return f"somebody answers, and we refuse the certificate: {way.reason}"
        case Fault.NO_NAME | Fault.NOT_TRIED:
            return "not tried: the name leads nowhere"
        case _:
            return way.reason or "it broke off"


def _quality(way: Way) -> str:
    trip = _ms(way.rtt_p50)
    if way.carrier == "tls":
        return f"{trip}{f' through the proxy {way.proxy}' if way.proxy else ''}"
    return f"{trip}, {_percent(way):g} % lost, {_size(way)}"


def _size(way: Way) -> str:
    return f"packets of {way.datagram:,} bytes"


def _percent(way: Way) -> float:
    return round(100 * way.lost / way.sent, 1) if way.sent else 0.0


def _name(found: Findings) -> str:
    resolution, host = found.resolution, found.target.host
    if resolution.problem:
        return f"{host} has no address: {resolution.problem} (after {_ms(resolution.seconds)})"
    if resolution.addresses == (host,):
        return f"{host} is an address: nothing was asked"
    more = len(resolution.addresses) - len(found.udp)
    text = f"{host} is {', '.join(resolution.addresses)} (in {_ms(resolution.seconds)})"
    return f"{text}; the last {more} were not tried over UDP" if more else text


def _memory(memory: Memory) -> str:
    known = memory.known
    if not memory.network:
        return "no default route: nothing is remembered without one"
    if not known.used:
        return f"nothing yet of this network ({memory.network})"
    from datetime import UTC, datetime

    used = datetime.fromtimestamp(known.used, UTC)
    carrier = f"{known.carrier.upper()} worked last" if known.carrier else "no carrier noted"
    text = f"of this network ({memory.network}): {carrier}, {known.keepalive:g} s of silence do no harm"
    if known.too_long:
        text += f" and {known.too_long:g} s did"
    return f"{text}; written {used:%Y-%m-%d %H:%M}Z"


def _ms(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


# -- as JSON (2) -------------------------------------------------------------------------------------------


def as_json(found: Findings) -> dict[str, Any]:
    """The shape of `-o json`."""
    target, known = found.target, found.memory.known
    return {
        "works": found.best_udp.works or found.tls.works,
        "summary": headline(found),
        "node": target.node,
        "host": target.host,
        "name": _resolution(found.resolution),
        "udp": way_as_json(found.best_udp),
        "udp_by_address": [way_as_json(way) for way in found.udp],
        "tls": way_as_json(found.tls),
        "client": choice(found),
        "remembered": {
            "network": found.memory.network or None,
            "carrier": known.carrier or None,
            "keepalive_s": known.keepalive if known.used else None,
            "too_long_s": known.too_long or None,
            "used": known.used or None,
        },
        "next": next_steps(found),
    }


def _resolution(found: Resolution) -> dict[str, Any]:
    return {"addresses": list(found.addresses), "ms": ms(found.seconds), "problem": found.problem or None}


def way_as_json(way: Way) -> dict[str, Any]:
    """One way, with all its keys."""

    return {
        "works": way.works,
        "fault": way.fault.value or None,
        "reason": way.reason or None,
        "address": way.address or None,
        "port": way.port or None,
        "proxy": way.proxy or None,
        "found_node": way.found or None,
        "tcp_ms": ms(way.tcp) or None,
        "connected_ms": ms(way.connected) or None,
        "rtt_ms": {"min": ms(way.rtt_min) or None, "p50": ms(way.rtt_p50) or None},
        "sent": way.sent,
        "lost": way.lost,
        "loss_percent": _percent(way) if way.sent and way.carrier == "udp" else None,
        "packet_bytes": way.datagram or None,
        "congestion": way.congestion or None,
    }
