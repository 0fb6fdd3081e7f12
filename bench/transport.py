"""Bulk throughput of the transport against others: two processes, loopback, 1,200-byte packets.

    python -m bench.transport [--json] [--rounds 3] [--only stp,aioquic]

Kinds take turns, each `--rounds` times; the median counts. The last line on stdout is JSON: `MB_per_s` of STP,
`peers` (MB/s), `ratio` (STP over each), and what a packet costs each receiver in CPU, which a busy machine
falsifies less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from bench.carriers import KINDS, PACKET
from stp.identity import network_key_pem
from stpd.pki import CertificateAuthority, certificate_pem, private_pem

MB: Final = 1_000_000
SIZES: Final = {"stp": 384, "aioquic": 24, "qh3": 64, "dtls": 64}
"""MiB per round: one to three seconds each."""
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


def transfer(kind: str, directory: Path, size: int) -> tuple[float, float]:
    """MB/s as the receiver saw it, and microseconds of its CPU per packet."""
    command = [sys.executable, "-m", "bench.carriers"]
    common = [kind, str(directory), str(size)]
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
    packets = found["bytes"] / PACKET
    return found["bytes"] / found["seconds"] / MB, found["cpu_seconds"] * 1e6 / packets


def measure(kinds: list[str], rounds: int, *, loud: bool) -> dict[str, tuple[float, float]]:
    """Medians of `transfer` for each kind."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_identities(directory)
        for turn in range(rounds):
            for kind in kinds:
                found[kind].append(transfer(kind, directory, SIZES[kind] * 1024 * 1024))
                if loud:
                    rate, cpu = found[kind][-1]
                    print(
                        f"round {turn + 1}: {kind:8} {rate:8.1f} MB/s {cpu:6.1f} us/packet", file=sys.stderr
                    )
    return {
        kind: (statistics.median(rate for rate, _ in values), statistics.median(cpu for _, cpu in values))
        for kind, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    options = parser.parse_args()
    medians = measure(options.only.split(","), options.rounds, loud=not options.json)
    own = medians.get("stp", (0.0, 0.0))[0]
    peers = {kind: rate for kind, (rate, _) in medians.items() if kind != "stp"}
    print(
        json.dumps(
            {
                "MB_per_s": round(own, 1),
                "peers": {kind: round(value, 2) for kind, value in peers.items()},
                "ratio": {kind: round(own / value, 1) for kind, value in peers.items()},
                "receiver_cpu_us_per_packet": {kind: round(cpu, 2) for kind, (_, cpu) in medians.items()},
                "packet_bytes": PACKET,
                "rounds": options.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
