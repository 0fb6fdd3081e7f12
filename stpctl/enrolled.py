"""Who may come in: enrolment keys, and the nodes that joined with them."""

from __future__ import annotations

import time
from typing import Any

import click

from stpctl.session import Session, options, sure

# Enrolment keys ----------------------------------------------------------------------------------------


@click.group()
def keys() -> None:
    """Enrolment keys: what new nodes join with."""


def _span(_: click.Context, __: click.Parameter, value: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if value == "0":
        return 0.0
    try:
        return float(value[:-1]) * units[value[-1:]]
    except (ValueError, KeyError):
        raise click.BadParameter("a number and s, m, h or d, such as 24h; 0 for ever") from None


@keys.command("create")
@click.option("--role", default="gateway", show_default=True, help="What nodes become that join with it.")
@click.option("--uses", default=1, show_default=True, type=click.IntRange(0), help="How many; 0: any number.")
@click.option(
    "--ttl", default="24h", show_default=True, callback=_span, help="How long it is good; 0: for ever."
)
@click.option("--tag", "tags", multiple=True, help="A note for the list; may be repeated.")
@options()
def keys_create(session: Session, role: str, uses: int, ttl: float, tags: tuple[str, ...]) -> None:
    """Make a key and print it. It is shown this once."""
    from stpctl.render import instant

    wishes = {"role": role, "uses": uses, "ttl_s": ttl, "tags": list(tags)}
    answer = session.client.post("keys", body=wishes)
    session.done(answer, answer["token"])
    many = "any number of nodes" if not uses else "one node" if uses == 1 else f"{uses} nodes"
    until = (
        f"until {instant(answer['expires_ms'], int(time.time() * 1000))}"
        if answer["expires_ms"]
        else "for ever"
    )
    click.echo(f"key {answer['id']}: {many}, {until}. On the new machine: stpd join KEY --hub HOST", err=True)


@keys.command("list")
@options(watch=True)
def keys_list(session: Session) -> None:
    """All keys, without their secrets."""

    def text(answer: Any) -> str:
        from stpctl.render import instant, table
        from stpd.status import KeyStatus, from_dict

        now = int(time.time() * 1000)

        def state(k: KeyStatus) -> str:
            if k.revoked:
                return "revoked"
            if k.expires_ms and k.expires_ms <= now:
                return "expired"
            return "used up" if k.uses and k.used >= k.uses else "good"

        return table(
            ["id", "role", "state", "used", "of", "made", "until", "tags"],
            [
                (k.id, k.role, state(k), k.used, k.uses or "any", instant(k.created_ms, now),
                 instant(k.expires_ms, now) if k.expires_ms else "for ever", " ".join(k.tags))
                for k in (from_dict(KeyStatus, one) for one in answer)
            ],
        )  # fmt: skip

    session.show(lambda client: client.get("keys"), text)


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@options()
def keys_revoke(session: Session, key_id: str) -> None:
    """End a key. Nodes that joined with it stay."""
    session.done(session.client.delete("keys", key_id), f"revoked {key_id}")


# Nodes -------------------------------------------------------------------------------------------------


@click.group()
def nodes() -> None:
    """Who enrolled here, and who may come in no longer."""


@nodes.command("list")
@options(watch=True)
def nodes_list(session: Session) -> None:
    """All of them, with the end of their certificates."""

    def text(answer: Any) -> str:
        from stpctl.render import instant, table
        from stpd.status import NodeStatus, from_dict

        now = int(time.time() * 1000)

        def state(n: NodeStatus) -> str:
            if n.revoked:
                return f"revoked: {n.reason}" if n.reason else "revoked"
            if n.not_after_ms <= now:
                return "expired"
            return "connected" if n.connected else "good"

        return table(
            ["node", "role", "state", "enrolled", "renewed", "until", "tags"],
            [
                (n.node, n.role, state(n), instant(n.enrolled_ms, now),
                 instant(n.renewed_ms, now) if n.renewed_ms else "never", instant(n.not_after_ms, now),
                 " ".join(n.tags))
                for n in (from_dict(NodeStatus, one) for one in answer)
            ],
        )  # fmt: skip

    session.show(lambda client: client.get("nodes"), text)


def _revoked(answer: Any, what: str) -> str:
    count = answer["sessions"]
    ended = {0: "it was not connected here", 1: "its session here has ended"}.get(
        count, f"its {count} sessions here have ended"
    )
    return f"{what}; {ended}. Gateways that are online know it, the others when they come back."


@nodes.command("revoke")
@click.argument("name")
@click.option("--reason", default="", help="Why; it stands in the list and in the log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options()
def nodes_revoke(session: Session, name: str, reason: str, yes: bool) -> None:
    """Keep a node out for good: its sessions end, its certificates and its name are good for nothing.

    \b
    stpctl nodes revoke kitchen-1 --reason "stolen on the 3rd"

    To let the machine's successor join under the same name, use forget.
    """
    sure(f"{name} can come back only under another name", yes=yes)
    answer = session.client.post("revocations", body={"node": name, "reason": reason})
    session.done(answer, _revoked(answer, f"revoked {name}"))


@nodes.command("forget")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options()
def nodes_forget(session: Session, name: str, yes: bool) -> None:
    """Free a node's name for another key: its sessions end, its certificates are revoked.

    For a machine that was replaced, or lost its key: the new one joins under the old name with a new key from
    `stpctl keys create`.
    """
    sure(f"{name} has to join again", yes=yes)
    answer = session.client.delete("nodes", name)
    session.done(answer, _revoked(answer, f"forgot {name}"))
