"""What every command shares: its options, the daemon it asks, how it shows the answer."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from stpctl.errors import FAILED, USAGE, CommandError

if TYPE_CHECKING:
    from stpctl.client import Client

F = TypeVar("F", bound=Callable[..., None])

INTERVAL: Final = 2.0
"""Seconds between two looks of --watch, unless told otherwise."""


class Session:
    """One run of stpctl."""

    def __init__(self, context: str | None, output: str, watch: float | None) -> None:
        self.context_name = context
        self.output = output
        self.watch = watch

    @functools.cached_property
    def client(self) -> Client:
        """The daemon that is meant. Raises CommandError."""
        from stpctl import contexts
        from stpctl.client import Client

        return Client(contexts.load(contexts.chosen(self.context_name)))

    def show(self, ask: Callable[[Client], Any], text: Callable[[Any], str]) -> None:
        """Ask and print: as JSON, or what `text` makes of it; with --watch again and again."""
        from stpctl.render import as_json

        while True:
            answer = ask(self.client)
            shown = as_json(answer) if self.output == "json" else text(answer)
            if self.watch is not None and sys.stdout.isatty():
                click.clear()
            click.echo(shown)
            if self.watch is None:
                return
            time.sleep(self.watch)

    def done(self, answer: Any, text: str) -> None:
        """Tell that something was done."""
        from stpctl.render import as_json

        click.echo(as_json(answer) if self.output == "json" else text)


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise click.BadParameter("seconds between 0.1 and 3600, such as 2 or 0.5s")
    return seconds


def options(*, watch: bool = False) -> Callable[[F], F]:
    """-o and --context for a command, and -w for those that look at something."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, context: str | None, output: str, **kwargs: Any) -> None:
            group: Any = click.get_current_context().find_root().params.get("context")
            function(Session(context or group, output, kwargs.pop("watch", None)), *args, **kwargs)

        made = click.option(
            "-o",
            "--output",
            type=click.Choice(["table", "json"]),
            default="table",
            help="For people or programs.",
        )(run)
        made = click.option("--context", metavar="NAME", help="Which daemon; see `stpctl context`.")(made)
        if watch:
            made = click.option(
                "-w",
                "--watch",
                is_flag=False,
                flag_value=str(INTERVAL),
                default=None,
                metavar="[SECONDS]",
                callback=_seconds,
                help=f"Look again every {INTERVAL:.0f} s, or as told.",
            )(made)
        return made  # type: ignore[return-value]

    return wrap


def sure(consequence: str, *, yes: bool) -> None:
    """Ask before what cannot be taken back. Raises CommandError where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"not done: {consequence}", "say --yes where nobody can be asked", USAGE)
    if not click.confirm(f"{consequence}. Go on?", err=True):
        raise CommandError("not done", "nothing was changed", FAILED)
