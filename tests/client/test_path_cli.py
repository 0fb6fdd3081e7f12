"""`stp path`: findings into words. What finds them is tested against real daemons (tests/real/test_pathfinder.py)."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import Any

import pytest
from attrs import evolve

from stp import cli
from stp.failures import EX_USAGE
from stp.identity import Address
from stp.networks import Network
from stp.path_cli import as_json, choice, describe, headline, next_steps, way_in_words
from stp.pathfinder import Fault, Findings, Memory, Resolution, Way, fault_of, resolve
from stp.proxy import ProxyError

TARGET = Address("gw-1", "gw.local")
UDP = Way(
    "udp",
    "192.168.1.5",
    9000,
    Fault.NONE,
    connected=0.0081,
    rtt_min=0.001,
    rtt_p50=0.0012,
    sent=60,
    datagram=1472,
    datagram_most=1472,
    congestion="tolerant",
)
TLS = Way("tls", "192.168.1.5", 8443, Fault.NONE, tcp=0.001, connected=0.009, rtt_min=0.0011, rtt_p50=0.12345)


def found(udp: Way = UDP, tls: Way = TLS, **changes: Any) -> Findings:
    whole = Findings(
        TARGET, Resolution(("192.168.1.5",), 0.0004), [udp], tls, Memory("c5ab65150d6c7fde"), ("6183fdc4",)
    )
    return evolve(whole, **changes)


def without(way: Way, fault: Fault, reason: str = "", **changes: Any) -> Way:
    return evolve(Way(way.carrier, way.address, way.port, fault, reason), **changes)


SILENT, NO_TLS = without(UDP, Fault.SILENCE), Way("tls")


@pytest.mark.parametrize(
    ("findings", "sentence"),
    [
        (found(), "UDP works: 1.2 ms, 0 % lost, packets of 1,472 bytes."),
        (found(evolve(UDP, lost=2)), "UDP works: 1.2 ms, 3.3 % lost, packets of 1,472 bytes."),
        (found(SILENT), "UDP does not work (no answer), TLS does: 123 ms."),
        (
            found(without(UDP, Fault.PORT_CLOSED), evolve(TLS, proxy="proxy:3128")),
            "UDP does not work (nobody listens there), TLS does: 123 ms through the proxy proxy:3128.",
        ),
        (
            found(SILENT, without(TLS, Fault.SILENCE)),
            "Nothing works between here and gw-1 at gw.local:9000: no answer.",
        ),
        (
            found(SILENT, without(TLS, Fault.PORT_CLOSED)),
            "Nothing works between here and gw-1 at gw.local:9000:"
            " UDP: no answer; TLS: nobody listens there.",
        ),
        (
            found(without(UDP, Fault.WRONG_NODE, found="gw-2"), without(TLS, Fault.REFUSED_BY_US)),
            "Nothing works between here and gw-1 at gw.local:9000: gw-2 answers, not the node you named.",
        ),
        (
            found(SILENT, NO_TLS, target=evolve(TARGET, tls=0)),
            "Nothing works between here and gw-1 at gw.local:9000: no answer.",
        ),
        (
            found(
                without(UDP, Fault.NO_NAME),
                without(TLS, Fault.NO_NAME),
                resolution=Resolution(problem="unknown"),
            ),
            "Nothing works: the name gw.local leads nowhere.",
        ),
    ],
)
def test_the_first_sentence(findings: Findings, sentence: str) -> None:
    """(1)"""
    assert headline(findings) == sentence
    assert describe(findings)[0] == sentence


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (
            UDP,
            "192.168.1.5 port 9000: connected in 8.1 ms; round trips 1.0 ms at least, p50 1.2 ms; 0 of 60 lost;",
        ),
        (TLS, "192.168.1.5 port 8443: connected in 9.0 ms, of which TCP 1.0 ms; round trips 1.1 ms at least"),
        (evolve(TLS, proxy="proxy:3128"), "port 8443 through the proxy proxy:3128: connected in"),
        (SILENT, "blocked on the way, or no stpd is there, or the network key is another"),
        (without(TLS, Fault.SILENCE), "no answer within 5 s: blocked on the way, or no machine there"),
        (
            without(TLS, Fault.SILENCE, tcp=0.002),
            "TCP stands after 2.0 ms, and TLS is not answered within 5 s",
        ),
        (without(UDP, Fault.PORT_CLOSED, "Connection refused"), "says so (Connection refused)"),
        (without(UDP, Fault.NO_ROUTE, "Network is unreachable"), "no way there: this machine, or a router"),
        (without(UDP, Fault.FORBIDDEN, "Operation not permitted"), "this machine does not let it out"),
        (without(TLS, Fault.PROXY, "the proxy p:1 refused it with 407"), "the proxy p:1 refused it with 407"),
        (without(UDP, Fault.WRONG_NODE, "wanted a, found b", found="gw-2"), "it is gw-2 (wanted a, found b)"),
        (
            without(UDP, Fault.REFUSED_BY_PEER, "revoked"),
            "stpd is there, and refuses our certificate: revoked",
        ),
        (without(TLS, Fault.REFUSED_BY_PEER, "alert"), "somebody answers, and refuses us: alert"),
        (without(TLS, Fault.REFUSED_BY_US, "expired"), "we refuse the certificate: expired"),
        (without(UDP, Fault.NO_NAME), "not tried: the name leads nowhere"),
        (without(TLS, Fault.OTHER, "the stream broke"), "port 8443: the stream broke"),
        (NO_TLS, "not tried: the URL says tls=0"),
    ],
)
def test_a_way_in_words(way: Way, words: str) -> None:
    assert words in way_in_words(way)


@pytest.mark.parametrize(
    ("findings", "advice"),
    [
        (found(), []),
        (found(SILENT), ["compare network keys: here 6183fdc4, at the hub `stpd network-key show`"]),
        (found(UDP, without(TLS, Fault.PORT_CLOSED)), ["TLS is not needed while UDP works"]),
        (found(without(UDP, Fault.PORT_CLOSED)), ["stpd is there, for TLS works"]),
        (found(without(UDP, Fault.PORT_CLOSED), without(TLS, Fault.PORT_CLOSED)), ["start stpd at gw.local"]),
        (found(without(UDP, Fault.NO_ROUTE)), ["rejects UDP port 9000, for TLS passes"]),
        (found(without(UDP, Fault.NO_ROUTE), without(TLS, Fault.NO_ROUTE)), ["ip route get 192.168.1.5"]),
        (found(without(UDP, Fault.FORBIDDEN)), ["nft list ruleset"]),
        (found(SILENT, without(TLS, Fault.SILENCE)), ["open UDP port 9000", "open TCP port 8443"]),
        (found(SILENT, without(TLS, Fault.PROXY, proxy="p:1")), ["open UDP", "mend the proxy p:1"]),
        (found(SILENT, without(TLS, Fault.SILENCE, proxy="p:1")), ["open UDP", "whoever runs the proxy p:1"]),
        (
            found(without(UDP, Fault.WRONG_NODE, found="gw-2"), without(TLS, Fault.REFUSED_BY_US)),
            ["write stp://gw-2@gw.local:9000"],
        ),
        (
            found(without(UDP, Fault.REFUSED_BY_PEER), without(TLS, Fault.REFUSED_BY_PEER)),
            ["`stp renew`, or `stp join` with a new token", "is it stpd that answers at TCP port 8443?"],
        ),
        (found(without(UDP, Fault.REFUSED_BY_US)), ["its certificate must be mended, or our clock"]),
        (found(evolve(UDP, lost=7)), ["look at the radio"]),
        (found(evolve(UDP, datagram=1024)), ["a tunnel within a tunnel"]),
        (found(resolution=Resolution(problem="unknown")), ["getent hosts gw.local"]),
    ],
)
def test_what_to_do_next(findings: Findings, advice: list[str]) -> None:
    steps = next_steps(findings)
    assert len(steps) == len(advice), steps
    assert all(words in step for words, step in zip(advice, steps, strict=True)), steps


@pytest.mark.parametrize(
    ("carrier", "udp", "tls", "words"),
    [
        ("", UDP, TLS, "UDP"),
        ("tls", UDP, TLS, "both at once"),
        ("tls", UDP, NO_TLS, "UDP"),
        ("", SILENT, TLS, "TLS, after 3 s without an answer; UDP is asked again at least every 220 s"),
        ("tls", SILENT, TLS, "TLS, at once, since it worked here last"),
        ("tls", SILENT, NO_TLS, "nothing"),
    ],
)
def test_what_a_client_chooses(carrier: str, udp: Way, tls: Way, words: str) -> None:
    """As racing.py has it."""
    memory = Memory("c5ab65150d6c7fde", "", Network(carrier=carrier, used=1_700_000_000))
    assert choice(found(udp, tls, memory=memory)).startswith(words)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (Memory(), "no default route"),
        (Memory("c5ab"), "nothing yet of this network (c5ab)"),
        (
            Memory("c5ab", "", Network(40.0, 90.0, "tls", 1_700_000_000)),
            "TLS worked last, 40 s of silence do no harm and 90 s did; written 2023-11-14 22:13Z",
        ),
    ],
)
def test_what_is_remembered(memory: Memory, words: str) -> None:
    assert any(words in line for line in describe(found(memory=memory)))


def test_of_several_addresses_the_one_that_works_counts() -> None:
    findings = found(udp=SILENT)
    findings.udp.append(UDP)
    assert findings.best_udp is UDP
    assert headline(findings).startswith("UDP works")
    assert sum(line.startswith("  UDP") for line in describe(findings)) == 2


def keys(value: Any) -> Any:
    return {key: keys(one) for key, one in value.items()} if isinstance(value, dict) else None


def test_json_has_the_same_keys_whatever_was_found() -> None:
    """(2)"""
    good = as_json(found())
    bad = as_json(
        found(without(UDP, Fault.NO_NAME), NO_TLS, resolution=Resolution(problem="unknown"), memory=Memory())
    )
    assert keys(good) == keys(bad)
    assert json.loads(json.dumps(good))["udp"]["packet_bytes"] == 1472
    assert (bad["works"], bad["udp"]["fault"], bad["udp"]["packet_bytes"]) == (
        False,
        "name not resolved",
        None,
    )


@pytest.mark.parametrize("fault", list(Fault))
def test_every_fault_has_words_and_its_place(fault: Fault) -> None:
    """None of them breaks the report, on either carrier."""
    findings = found(without(UDP, fault, found="gw-2"), without(TLS, fault))
    assert findings.best_udp.fault is fault
    assert all(describe(findings)[:1])


def test_errors_are_told_by_their_number() -> None:
    """Also where trio tells of several addresses at once."""
    outer, middle = OSError(errno.EHOSTUNREACH, "cannot connect"), OSError("all attempts to connect failed")
    outer.__cause__ = middle
    middle.__cause__ = ExceptionGroup("several", [OSError(errno.ECONNREFUSED, "Connection refused")])
    assert fault_of(outer) is Fault.PORT_CLOSED
    assert fault_of(OSError(errno.ENETUNREACH, "x")) is Fault.NO_ROUTE
    assert fault_of(ProxyError(errno.ECONNREFUSED, "x")) is Fault.PROXY
    assert fault_of(OSError("x")) is Fault.OTHER


async def test_addresses_are_resolved_each_once() -> None:
    resolution = await resolve(Address("gw-1", "127.0.0.1"))
    assert (resolution.addresses, resolution.problem) == (("127.0.0.1",), "")


def test_a_socket_of_this_machine_has_no_path(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["path", "stp+unix:///run/stpd/stp.sock"]) == EX_USAGE
    assert "`stp ping`" in capfd.readouterr().err


def test_help_is_worth_reading_and_fast() -> None:
    program = (
        "import sys; from stp import cli; cli.execute(['path', '--help']);"
        "print([m for m in ('trio', 'OpenSSL', 'stp.pathfinder', 'stp.client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Exit code 69 when nothing works" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
