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
