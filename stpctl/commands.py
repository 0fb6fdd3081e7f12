"""The commands: noun, verb. Each asks one endpoint and shows the answer.

Modules that take time to import are imported where a command needs them, so that --help is instant.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from stpctl.enrolled import keys, nodes
from stpctl.errors import EXPLAINED, FAILED, UNREACHABLE, CommandError
from stpctl.paths import path
from stpctl.session import Session, options, sure

if TYPE_CHECKING:
    pass

RETRY: Final = (1.0, 2.0, 5.0, 10.0)
"""Seconds between attempts of `events -f` to come back."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\n"
    + EXPLAINED
    + "\n\n\b\nExamples:\n  stpctl status\n  stpctl sessions list -w\n  stpctl edges lag -o json\n"
    "  stpctl keys create --role gateway --ttl 24h",
)
@click.option("--context", metavar="NAME", help="Which daemon; see `stpctl context`.")
@click.version_option(package_name="stpd", prog_name="stpctl")
def root(context: str | None) -> None:
    """Look into a running stpd and tell it what to do."""


@root.command()
@options(watch=True)
def status(session: Session) -> None:
    """The daemon in a few sentences: who, how long, who is behind, what is wrong."""

    def text(answer: Any) -> str:
        from stpctl.sentences import describe
        from stpd.status import DaemonStatus, from_dict

        return "\n".join(describe(from_dict(DaemonStatus, answer)))

    session.show(lambda client: client.get("status"), text)


# Sessions ----------------------------------------------------------------------------------------------


@root.group()
def sessions() -> None:
    """Who is connected."""


@sessions.command("list")
@options(watch=True)
def sessions_list(session: Session) -> None:
    """All live sessions."""

    def text(answer: Any) -> str:
        from stpctl.render import size, span, table
        from stpd.status import SessionStatus, from_dict

        now = time.time()
        return table(
            ["id", "node", "role", "kind", "over", "address", "up", "rtt ms", "in", "out", "messages in",
             "messages out"],
            [
                (s.id[:8], s.node, s.role or "-", s.kind or "-", s.carrier, ("> " if s.dialling else "") + s.address,
                 span(now - s.since_ms / 1000), round(s.rtt_ms, 1), size(s.bytes_in), size(s.bytes_out),
                 s.messages_in, s.messages_out)
                for s in (from_dict(SessionStatus, one) for one in answer)
            ],
        )  # fmt: skip

    session.show(lambda client: client.get("sessions"), text)


@sessions.command("show")
@click.argument("session_id", metavar="ID")
@options(watch=True)
def sessions_show(session: Session, session_id: str) -> None:
    """One session; ID is the beginning of its id."""

    def text(answer: Any) -> str:
        from stpctl.render import instant, pairs

        now = int(time.time() * 1000)
        shown = [
            (
                key.removesuffix("_ms"),
                instant(value, now) if key.endswith(("since_ms", "after_ms")) else value,
            )
            for key, value in answer.items()
        ]
        return pairs(shown)

    session.show(lambda client: client.get("sessions", session_id), text)


@sessions.command("kick")
@click.argument("session_id", metavar="ID")
@options()
def sessions_kick(session: Session, session_id: str) -> None:
    """Close a session. Its peer may come back at once; to keep it out, revoke its certificate."""
    session.done(session.client.delete("sessions", session_id), f"closed {session_id}")


root.add_command(path)


# Edges, upstreams, readers -----------------------------------------------------------------------------


@root.group()
def edges() -> None:
    """Nodes below this one, connected or not."""


@edges.command("list")
@options(watch=True)
def edges_list(session: Session) -> None:
    """All of them, with what waits here to go down and what waits there to come up."""

    def text(answer: Any) -> str:
        from stpctl.render import instant, table
        from stpd.status import EdgeStatus, from_dict

        now = int(time.time() * 1000)
        return table(
            ["node", "role", "connected", "address", "last seen", "waiting down", "waiting up"],
            [
                (e.node, e.role or "-", "yes" if e.connected else "no", e.address or "-",
                 "now" if e.connected else instant(e.last_seen_ms, now), e.behind_messages, e.reported_messages)
                for e in (from_dict(EdgeStatus, one) for one in answer)
            ],
        )  # fmt: skip

    session.show(lambda client: client.get("edges"), text)


@edges.command("lag")
@options(watch=True)
def edges_lag(session: Session) -> None:
    """Who is behind, by how much, since when and why; the worst first."""

    def text(answer: Any) -> str:
        from stpctl.sentences import lag
        from stpd.status import EdgeStatus, from_dict

        now = int(time.time() * 1000)
        found = [from_dict(EdgeStatus, one) for one in answer]
        late = [e for e in found if e.behind_messages or e.reported_messages or not e.connected]
        late.sort(key=lambda e: e.behind_messages + e.reported_messages, reverse=True)
        level = len(found) - len(late)
        return "\n".join(
            [*(lag(e, now) for e in late), f"{level} of {len(found)} edges are connected and level."]
        )

    session.show(lambda client: client.get("edges"), text)


@root.group()
def upstreams() -> None:
    """Nodes above this one."""


@upstreams.command("list")
@options(watch=True)
def upstreams_list(session: Session) -> None:
    """All of them, the primary first."""

    def text(answer: Any) -> str:
        from stpctl.render import instant, span, table
        from stpd.status import UpstreamStatus, from_dict

        now = int(time.time() * 1000)
        return table(
            ["node", "url", "state", "since", "over", "rtt ms", "behind", "oldest", "in custody", "last error"],
            [
                (u.node, u.url, u.state, instant(u.since_ms, now), u.carrier or "-", round(u.rtt_ms, 1),
                 u.behind_messages, span(u.oldest_age_s) if u.behind_messages else "-", u.custody_messages,
                 u.last_error or "-")
                for u in (from_dict(UpstreamStatus, one) for one in answer)
            ],
        )  # fmt: skip

    session.show(lambda client: client.get("upstreams"), text)


@root.group()
def readers() -> None:
    """Durable subscriptions."""


@readers.command("list")
@options(watch=True)
def readers_list(session: Session) -> None:
    """All of them, and how far each is behind."""

    def text(answer: Any) -> str:
        from stpctl.render import instant, size, span, table
        from stpd.status import ReaderStatus, from_dict

        now = int(time.time() * 1000)
        return table(
            ["name", "node", "connected", "filters", "since", "behind", "bytes", "oldest", "dropped after"],
            [
                (r.name, r.node, "yes" if r.connected else "no", " ".join(r.filters), instant(r.created_ms, now),
                 r.behind_messages, size(r.behind_bytes), span(r.oldest_age_s) if r.behind_messages else "-",
                 span(r.max_lag_s) if r.max_lag_s else "-")
                for r in (from_dict(ReaderStatus, one) for one in answer)
            ],
        )  # fmt: skip

    session.show(lambda client: client.get("readers"), text)


@readers.command("remove")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options()
def readers_remove(session: Session, name: str, yes: bool) -> None:
    """Forget a durable subscription and what waits for it."""
    sure(f"what waits for {name} is lost to it", yes=yes)
    session.done(session.client.delete("readers", name), f"removed {name}")


# Store and ledger --------------------------------------------------------------------------------------


@root.group()
def buffer() -> None:
    """What is kept on disk."""


@buffer.command("show")
@options(watch=True)
def buffer_show(session: Session) -> None:
    """How full it is, lane by lane, and what was put aside."""

    def text(answer: Any) -> str:
        from stpctl.render import instant, lane_name, pairs, size, span, table
        from stpd.status import BufferStatus, from_dict

        b, now = from_dict(BufferStatus, answer), int(time.time() * 1000)
        facts = [
            ("file", b.path),
            ("used", f"{size(b.used_bytes)} of {size(b.budget_bytes)}, {size(b.reserve_bytes)} in reserve"),
            ("disk", f"{size(b.disk_free_bytes)} free"),
            ("full", f"since {instant(b.full_since_ms, now)}: {b.full_cause}" if b.full else "no"),
            (
                "commits",
                f"{b.commits:,}; {b.commit_mean_ms:.1f} ms on average, {b.commit_max_ms:.1f} ms at worst",
            ),
            ("queue", f"{b.queue_depth} of {b.queue_limit} records"),
        ]
        rows: list[tuple[Any, ...]] = [
            (lane_name(x.lane), x.first, x.last, x.messages, size(x.bytes),
             span(x.oldest_age_s) if x.messages else "-")
            for x in b.lanes
        ]  # fmt: skip
        lanes = table(["lane", "first", "last", "messages", "bytes", "oldest"], rows)
        parts = [pairs(facts), lanes]
        if b.quarantined:
            rows = [
                (lane_name(q.lane), q.pos, q.peer, q.messages, q.reason, instant(q.at_ms, now))
                for q in b.quarantined
            ]
            aside = table(["lane", "pos", "from", "messages", "reason", "at"], rows)
            parts.append(f"In quarantine, {b.quarantined_records} records:\n{aside}")
        return "\n\n".join(parts)

    session.show(lambda client: client.get("buffer"), text)


@root.group()
def ledger() -> None:
    """Where every message is."""


@ledger.command("show")
@options(watch=True)
def ledger_show(session: Session) -> None:
    """The sums at the door, in the node and at each hop. Unexplained is 0, or it is an incident."""

    def text(answer: Any) -> str:
        import attrs

        from stpctl.render import lane_name, table
        from stpd.status import DoorCounts, HopCounts, LedgerStatus, NodeCounts, from_dict

        found = from_dict(LedgerStatus, answer)
        parts = []
        tables: list[tuple[str, type, list[Any]]] = [
            ("Door: received = accepted + repeats + refused + corrupt", DoorCounts, found.doors),
            ("Node: accepted + originated = stored + live only + no taker", NodeCounts, found.nodes),
            ("Hops: routed = custody + behind + refused in flight + gone by reason", HopCounts, found.hops),
        ]
        for title, cls, rows in tables:
            names = [f.name for f in attrs.fields(cls)]
            headings = [name.removesuffix("_name").replace("_", " ") for name in names]
            cells = [[lane_name(row.lane) if n == "lane" else getattr(row, n) for n in names] for row in rows]
            told = [row for row in cells if any(cell and isinstance(cell, int) for cell in row)]
            parts.append(f"{title}\n" + (table(headings, told) if told else "nothing yet"))
        if found.unexplained:
            parts.append("\n".join([f"UNEXPLAINED: {found.unexplained} messages", *found.explain]))
        else:
            parts.append("Every message is accounted for.")
        return "\n\n".join(parts)

    session.show(lambda client: client.get("ledger"), text)


root.add_command(keys)
root.add_command(nodes)


# The daemon itself -------------------------------------------------------------------------------------


@root.command()
@options()
def reload(session: Session) -> None:
    """Read configuration and certificates again. What is wrong changes nothing."""
    from stpd.status import ReloadReport, from_dict

    answer = session.client.post("reload")
    report = from_dict(ReloadReport, answer)
    lines = [f"in force: {', '.join(report.changed) or 'nothing new'}"]
    if report.restart_needed:
        lines.append(f"needs a restart: {', '.join(report.restart_needed)}")
    if not report.problems or session.output == "json":
        session.done(answer, "\n".join(lines))
    if report.problems:
        raise CommandError(
            "nothing was changed:\n  " + "\n  ".join(report.problems),
            "mend it and try again; stpd check",
            FAILED,
        )


@root.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@options()
def drain(session: Session, yes: bool) -> None:
    """Send all sessions elsewhere and end the daemon, losing nothing."""
    sure("the daemon ends", yes=yes)
    session.done(session.client.post("drain"), "draining")


@root.command()
@click.option("-f", "--follow", is_flag=True, help="For ever, and again when the line breaks.")
@click.option(
    "-n", "--count", default=1, show_default=True, type=click.IntRange(1), help="End after so many."
)
@options()
def events(session: Session, follow: bool, count: int) -> None:
    """What happens, as it happens."""
    left = count
    attempt = 0
    while follow or left > 0:
        try:
            for event in session.client.events():
                attempt = 0
                _print_event(session, event)
                left -= 1
                if left <= 0 and not follow:
                    return
            broken = CommandError("the daemon ended the stream", "it is stopping or busy", UNREACHABLE)
        except CommandError as exc:
            broken = exc
        if not follow or broken.status != UNREACHABLE:
            raise broken
        pause = RETRY[min(attempt, len(RETRY) - 1)]
        attempt += 1
        click.echo(f"stpctl: {broken.cause}; again in {pause:.0f} s", err=True)
        time.sleep(pause)


def _print_event(session: Session, event: dict[str, Any]) -> None:
    import json

    from stpctl.render import clean
    from stpd.status import EventRecord, from_dict

    if session.output == "json":
        click.echo(json.dumps(event))
        return
    e = from_dict(EventRecord, event)
    at = time.strftime("%H:%M:%S", time.localtime(e.time_ms / 1000))
    click.echo(f"{at}  {clean(e.kind):18}  {clean(e.text)}")


# Contexts ----------------------------------------------------------------------------------------------


@root.group()
def context() -> None:
    """Which daemon the commands are for."""


@context.command("list")
@options()
def context_list(session: Session) -> None:
    """All contexts; * marks the one in use."""
    from stpctl import contexts
    from stpctl.render import as_json, table

    found, chosen = [], ""
    try:
        chosen = contexts.chosen(session.context_name)
    except CommandError:
        pass
    for name in contexts.names():
        try:
            found.append(contexts.load(name).shown() | {"in_use": name == chosen})
        except CommandError as exc:
            found.append({"name": name, "url": exc.cause, "node": "", "in_use": name == chosen})
    rows = [("*" if c["in_use"] else "", c["name"], c["node"], c["url"]) for c in found]
    click.echo(as_json(found) if session.output == "json" else table(["", "name", "node", "url"], rows))


@context.command("use")
@click.argument("name")
@options()
def context_use(session: Session, name: str) -> None:
    """Choose the context for the commands that follow."""
    from stpctl import contexts

    contexts.use(name)
    session.done({"name": name}, f"using {name}")


@context.command("show")
@options()
def context_show(session: Session) -> None:
    """The context in use. Certificates and keys are only named, never shown."""
    from stpctl import contexts
    from stpctl.render import pairs

    found = contexts.load(contexts.chosen(session.context_name)).shown()
    session.done(found, pairs(list(found.items())))
