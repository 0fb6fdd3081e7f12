"""The last section of docs/protocol.md, made from tests/vectors/stp1.json and read back.

`python -m tests.spec_vectors` writes it anew after the vectors have changed; test_spec_vectors.py checks that it is
what this file makes, and every value in it against two implementations.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
PROTOCOL: Final = ROOT / "docs" / "protocol.md"
VECTORS: Final = ROOT / "tests" / "vectors" / "stp1.json"
HEADING: Final = "\n## 13. Test vectors\n"
WIDTH: Final = 96
"""Hexadecimal digits on one line."""

MEANS: Final = {"max": "limit"}
"""Names in the vectors -> names in the text, where they differ."""

Case = dict[str, str]


def vectors() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(VECTORS.read_text(encoding="utf-8"))
    return found


def block(case: dict[str, Any]) -> str:
    """One case: `name  value` in lines, long values going on below."""
    width = max(map(len, case)) + 2
    lines = ["```text"]
    for name, value in case.items():
        text = "-" if value == "" else str(value)
        hexadecimal = re.fullmatch("[0-9a-f]+", text) and len(text) > WIDTH
        pieces = [text[at : at + WIDTH] for at in range(0, len(text), WIDTH)] if hexadecimal else [text]
        lines += [f"{name if not at else '':{width}}{piece}" for at, piece in enumerate(pieces)]
    return "\n".join([*lines, "```", ""])


def pick(case: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: case[name] for name in names}


def by_name(cases: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The first case of each of these names."""
    return [next(case for case in cases if case["name"] == name) for name in names]


def _keys(v: dict[str, Any]) -> list[str]:
    parts = [
        "### 13.1 Expand and INIT keys",
        "`Expand` of §3, then the keys of a DCID without and with a network_key.",
        block(v["expand"][0]),
    ]
    shown = (
        "dcid",
        "network_key",
        "initial",
        "c_in",
        "s_in",
        "client_key",
        "client_iv",
        "server_key",
    )
    parts += [block(pick(case, *shown, "server_iv", "retry_key")) for case in v["initial_keys"][:2]]
    parts += [
        "### 13.2 Context, secrets, session id",
        "The leaves stand for DER. `master` is made up: what TLS exports is of each connection alone.",
        block(pick(v["context"], "HC", "HS", "server_leaf", "client_leaf", "context")),
        block(v["session_keys"]),
    ]
    return parts


def _packets(v: dict[str, Any]) -> list[str]:
    shown = (
        "keys_from_dcid",
        "network_key",
        "direction",
        "dcid",
        "scid",
        "token",
        "pn",
        "frames",
    )
    parts: list[str] = [
        "### 13.3 INIT",
        "The second one is padded with zeros to 1,200 bytes before it is sealed.",
    ]
    server, client = by_name(
        v["init_packets"], "server, unpadded", "client, after Retry: keys from the new CID, the pn goes on"
    )
    parts.append(block(pick(server, *shown, "packet")))
    whole = bytes.fromhex(client["packet"])
    header = whole[: 1 + 4 + 8 + 8 + 2 + len(client["token"]) // 2 + 4]
    frames = bytes.fromhex(client["frames"]).rstrip(b"\0").hex()
    sums = {
        "header": header.hex(),
        "tag": whole[-16:].hex(),
        "packet_sha256": hashlib.sha256(whole).hexdigest(),
    }
    parts.append(block(pick(client, *shown) | {"frames": frames} | sums))
    parts += ["### 13.4 RETRY", "`odcid` is the DCID of the INIT that provoked it."]
    by_retry = ("odcid", "network_key", "client_scid", "new_cid", "token", "packet")
    parts += [block(pick(case, *by_retry)) for case in v["retry"][:2]]
    parts += [
        "### 13.5 Whitening and DATA",
        "`x_0` is the sender's first secret, `updates` how often its keys were updated; `w` and `pn` are decimal.",
    ]
    by_data = (
        "suite",
        "x_0",
        "updates",
        "phase",
        "key",
        "iv",
        "cid",
        "w",
        "pn",
        "frames",
        "packet",
    )
    names = ("client, phase 0", "client, phase 1: next key, same w", "server, phase 0", "client, ChaCha20")
    parts += [block(pick(case, *by_data)) for case in by_name(v["data_packets"], *names)]
    parts += ["### 13.6 CIDs, reset tokens, RESET", "The RESET answers a packet of 1,200 bytes."]
    parts.append(block(pick(v["cid"][1], "cid_key", "instance", "r", "cid")))
    parts.append(block(pick(v["reset"][0], "reset_key", "cid", "token", "datagram")))
    return parts


def _frames(v: dict[str, Any]) -> list[str]:
    parts = [
        "### 13.7 Hellos",
        "By type: what a TLV holds. `parameters` is the value of type 5, read the same way.",
    ]
    for case in v["hello"][:3]:
        fields = {f"type_{kind}": value for kind, value in case["fields"].items()}
        inner = {f"parameter_{kind}": value for kind, value in case["parameters"].items()}
        parts.append(block({"hello": case["blob"]} | fields | inner))
    rows = ["| frame | bytes | says |", "|---|---|---|"]
    for case in v["frames"]:
        says = ", ".join(f"{MEANS.get(name, name)} {_word(value)}" for name, value in case["fields"].items())
        rows.append(f"| {case['name']} | `{case['bytes']}` | {says} |")
    parts += ["### 13.8 Frames", "Ranges of an ACK are inclusive.", "\n".join([*rows, ""])]
    return parts


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{low}–{high}" for low, high in value)
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"`{value}`"
        if isinstance(value, str)
        else str(value)
    )


def _messages(v: dict[str, Any]) -> list[str]:
    parts = [
        "### 13.9 Batches",
        "`crc` is the last field. The topics of the messages are prefix and suffix joined.",
        block(pick(v["node_id"][0], "uri", "id")),
    ]
    names = (
        "plain",
        "equal topics",
        "one topic is the start of the other",
        "with properties and times",
        "compressed, with properties and times",
    )
    for case in [*by_name(v["batches"], *names), v["excerpts"][0]]:
        made = pick(
            case, "flags", "count", "time_ms", "ttl_ms", "publisher", "run", "sequence", "prefix", "crc"
        )
        for number, message in enumerate(case["messages"][:3]):
            made[f"topic_{number}"], made[f"payload_{number}"] = message["topic"], message["payload"]
            if message["index"] != number:
                made[f"index_{number}"] = message["index"]
        parts.append(block(made | {"batch": case["bytes"]}))
    parts += [
        "### 13.10 Records",
        "One as its publisher sends it; a keeper's, with two batches and its hop; a part of a record; a void.",
    ]
    shown = ("kind", "lane", "batches", "source", "number", "crc", "age_ds")
    kinds = (
        "data, from its publisher: one batch, no hops",
        "data, all batches of one topic",
        "part, batches of one topic left of the mixed record",
        "void, numbers 18 to 20 filtered",
    )
    for case in by_name(v["records"], *kinds):
        hops = {"hops": " ".join(case["hops"])}
        ends = pick(case, "prefix") if case["kind"] != "void" else pick(case, "to", "reason", "messages")
        parts.append(block(pick(case, *shown) | hops | ends | {"record": case["bytes"]}))
    parts += ["### 13.11 Control records", "Length, type, body, as on stream 0."]
    seen = set()
    for case in v["control_records"]:
        if case["name"] not in seen or case["name"] == "RECEIPT":
            seen.add(case["name"])
            parts.append(block({"record": case["name"], "bytes": case["bytes"], "body": _body(case)}))
    parts += [
        "### 13.12 A lane's first bytes, and the TLS carrier's",
        block(pick(v["lane_stream"], "stream", "lane") | {"first_bytes": v["lane_stream"]["first_bytes"]}),
        block(v["stream_carrier"]),
    ]
    return parts


def _body(case: dict[str, Any]) -> str:
    return json.dumps(case["fields"], separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def render(v: dict[str, Any]) -> str:
    """The section, heading included."""
    parts = [
        HEADING.strip(),
        "Worked examples, in hexadecimal where nothing else is said. `-` is the empty string, and a long value goes\n"
        "on in the next line. Two implementations that share no code are checked by every one of them. They are a\n"
        "selection: all of them, and bytes that must be refused, are in `tests/vectors/stp1.json`.",
        *_keys(v),
        *_packets(v),
        *_frames(v),
        *_messages(v),
    ]
    return "\n" + "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def section() -> str:
    """As it stands in the text."""
    text = PROTOCOL.read_text(encoding="utf-8")
    _, heading, rest = text.partition(HEADING)
    assert heading, "docs/protocol.md has no §13"
    return heading + rest


def parse(text: str) -> dict[str, list[Case]]:
    """Heading number -> the cases below it. A table's rows are cases, too."""
    found: dict[str, list[Case]] = {}
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        cases = found.setdefault(part.split()[0], [])
        for body in re.findall(r"^```text\n(.*?)^```", part, re.MULTILINE | re.DOTALL):
            case: Case = {}
            name = ""
            for line in body.splitlines():
                head, _, value = line.partition(" ")
                name = head or name
                case[name] = case.get(name, "") + value.strip().removeprefix(
                    "-" if value.strip() == "-" else ""
                )
            cases.append(case)
        for name, raw, says in re.findall(
            r"^\| ([A-Z_]+) \| `([0-9a-f]+)` \| (.*?) ?\|$", part, re.MULTILINE
        ):
            cases.append({"name": name, "bytes": raw, "says": says})
    return found


def main() -> None:
    """Replace, or append, the section."""
    before, _, _ = PROTOCOL.read_text(encoding="utf-8").partition(HEADING)
    PROTOCOL.write_text(before.rstrip("\n") + "\n" + render(vectors()), encoding="utf-8")


if __name__ == "__main__":
    main()
