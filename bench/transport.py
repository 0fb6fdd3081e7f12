"""Bulk throughput of the transport against others: two processes, loopback, 1,200-byte packets.

    python -m bench.transport [--json] [--rounds 3] [--only stp,aioquic] [--packet 8972]

Kinds take turns, each `--rounds` times; the median counts. The last line on stdout is JSON: `MB_per_s` of STP,
`peers` (MB/s), `ratio` (STP over each), and what a packet costs each receiver, and a MB both ends, in CPU, which a
busy machine falsifies less. `--packet 8972` is what STP uses between processes of one host, 65000 the most that UDP
carries; DTLS and the QUIC libraries make none above 16 KB, and TLS on TCP writes as much at a time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from attrs import astuple, define
from cryptography.hazmat.primitives.asymmetric import ec

from bench.carriers import KINDS, PACKET
from stp.identity import network_key_pem
from stpd.pki import CertificateAuthority, certificate_pem, private_pem

MB: Final = 1_000_000
SIZES: Final = {"stp": 384, "aioquic": 24, "qh3": 64, "dtls": 64, "tls": 384}
"""MiB per round: one to three seconds each, in small packets."""
MAX_PACKET: Final = 65_000
LIMIT: Final = 60.0
"""Seconds that one transfer may take."""


def make_identities(directory: Path) -> None:
    """server.pem, client.pem for STP; server.crt, server.key for the others."""
    authority = CertificateAuthority.create("bench.local")
    for name in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = certificate_pem(authority.issue(key.public_key(), "bench.local", name, answers=True))
        secret = private_pem(key).decode()
        (directory / f"{name}.crt").write_text(leaf)
        (directory / f"{name}.key").write_text(secret)
        bundle = directory / f"{name}.pem"
        bundle.touch(0o600)
        bundle.write_text(secret + leaf + authority.pem + network_key_pem(bytes(range(32))))


@define
class Round:
    """What one transfer found, or the medians of several."""

    rate: float
    """MB/s as the receiver saw it."""
    packet_cpu: float
    """Microseconds of the receiver's CPU per packet."""
    cpu: float
    """Milliseconds of CPU per MB, both processes, handshake and start included."""


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def transfer(kind: str, directory: Path, size: int, packet: int) -> Round:
    command = [sys.executable, "-m", "bench.carriers"]
    common = [kind, str(directory), str(size), str(packet)]
    before = cpu_of_children()
    with subprocess.Popen([*command, "serve", *common], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            port = server.stdout.readline().strip()
            subprocess.run([*command, "send", *common, port], check=True, timeout=LIMIT)
            found = json.loads(server.communicate(timeout=LIMIT)[0].splitlines()[-1])
        finally:
            server.kill()
    if kind != "dtls" and found["bytes"] < size:
        raise SystemExit(f"{kind}: {found['bytes']} of {size} bytes arrived")
    packets, megabytes = found["bytes"] / packet, found["bytes"] / MB
    return Round(
        rate=megabytes / found["seconds"],
        packet_cpu=found["cpu_seconds"] * 1e6 / packets,
        cpu=(cpu_of_children() - before) * 1e3 / megabytes,
    )


def measure(kinds: list[str], rounds: int, packet: int, *, loud: bool) -> dict[str, Round]:
    """Medians of `transfer` for each kind."""
    found: dict[str, list[Round]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_identities(directory)
        for turn in range(rounds):
            for kind in kinds:
                one = transfer(kind, directory, SIZES[kind] * 1024 * 1024, packet)
                found[kind].append(one)
                if loud:
                    figures = f"{one.rate:8.1f} MB/s {one.packet_cpu:6.1f} us/packet {one.cpu:7.2f} ms/MB"
                    print(f"round {turn + 1}: {kind:8} {figures}", file=sys.stderr)
    return {
        kind: Round(*(statistics.median(column) for column in zip(*map(astuple, values), strict=True)))
        for kind, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    parser.add_argument("--packet", type=int, default=PACKET, help="bytes of UDP payload [default: 1200]")
    options = parser.parse_args()
    if not PACKET <= options.packet <= MAX_PACKET:
        parser.error(f"--packet {options.packet}: {PACKET} to {MAX_PACKET} bytes are wanted")
    medians = measure(options.only.split(","), options.rounds, options.packet, loud=not options.json)
    own = medians["stp"].rate if "stp" in medians else 0.0
    peers = {kind: one.rate for kind, one in medians.items() if kind != "stp"}
    print(
        json.dumps(
            {
                "MB_per_s": round(own, 1),
                "peers": {kind: round(value, 2) for kind, value in peers.items()},
                "ratio": {kind: round(own / value, 1) for kind, value in peers.items()},
                "receiver_cpu_us_per_packet": {
                    kind: round(one.packet_cpu, 2) for kind, one in medians.items()
                },
                "cpu_ms_per_MB": {kind: round(one.cpu, 2) for kind, one in medians.items()},
                "packet_bytes": options.packet,
                "rounds": options.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
