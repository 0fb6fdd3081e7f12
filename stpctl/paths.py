"""`stpctl path`: the way to one peer, in words and numbers."""

from __future__ import annotations

from typing import Any

import click

from stpctl.session import Session, options


@click.group("path")
def path() -> None:
    """The way to a peer: how it is reached, how far it is, what limits it."""


@path.command("show")
@click.argument("session_id", metavar="SESSION")
@options(watch=True)
def path_show(session: Session, session_id: str) -> None:
    """One session's path; SESSION is the beginning of its id, as `stpctl sessions list` shows it.

    \b
    stpctl path show 3fa9c1 -w
    """

    def text(answer: Any) -> str:
        from stpctl.pathwords import describe
        from stpd.status import PathStatus, from_dict

        return "\n".join(describe(from_dict(PathStatus, answer)))

    session.show(lambda client: client.get("paths", session_id), text)


@path.command("trace")
@click.argument("session_id", metavar="SESSION")
@click.option(
    "--for", "duration", default="60s", show_default=True, metavar="TIME", help="10s, 5m; at most 1h."
)
@options()
def path_trace(session: Session, session_id: str, duration: str) -> None:
    """Write an event log of one session for a while: every packet, loss and round trip, without their contents.

    It is a file on the daemon's machine, in the form of qlog: https://qvis.quictools.info draws it.

    \b
    stpctl path trace 3fa9c1 --for 5m
    """
    seconds = _seconds(duration)
    answer = session.client.post("traces", session_id, body={"for_s": seconds})
    session.done(answer, f"logging to {answer['path']} for {duration}")


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    try:
        return float(number) * units[unit]
    except ValueError:
        raise click.BadParameter("a number and a unit, such as 60s or 5m", param_hint="--for") from None
