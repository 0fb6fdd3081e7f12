"""The commands `stpd init`, `stpd join` and `stpd renew`: `stpd.setup` for people.

What was done goes to standard output. An error is two lines on standard error, cause and advice, and an exit
code of sysexits.h.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

import click

from stp.pinned import EnrolError
from stpd import setup

F = TypeVar("F", bound=Callable[..., object])


def _fail(exc: EnrolError) -> NoReturn:
    click.echo(f"stpd: {exc.cause}\n  {exc.advice}", err=True)
    sys.exit(exc.exit_code)


def _addresses(command: F) -> F:
    """Options for where the new node listens and keeps its state."""
    defaults = setup.Addresses()
    state_help = "What must survive a restart; /var/lib/stpd-hub or -gateway for the shipped units."
    command = click.option("--state", default=setup.STATE, show_default=True, help=state_help)(command)
    for option, default, text in (
        ("--health", defaults.health, "Plain HTTP: /health, /ready, /metrics."),
        ("--management", defaults.management, "HTTPS for stpctl."),
        ("--enrol", defaults.enrol, 'TCP, where others join; "" for none.'),
        ("--listen", defaults.udp, "UDP, where peers connect."),
    ):
        command = click.option(option, default=default, show_default=True, metavar="HOST:PORT", help=text)(
            command
        )
    return command


def _report(done: setup.Done, what: str) -> None:
    click.echo(f"{what} in {done.directory}. Next:")
    for step in done.next_steps:
        click.echo(f"  {step}")


@click.group()
def init() -> None:
    """Make a new fleet."""


@init.command("hub")
@click.option("--name", required=True, help="The hub's node name, such as hub-1.")
@click.option(
    "--dir", "directory", required=True, type=click.Path(file_okay=False), help="Where its files go."
)
@click.option(
    "--domain", default="stp.internal", show_default=True, help="The fleet's name, in every certificate."
)
@click.option("--operator", default="admin", show_default=True, help="Whose certificate stpctl gets.")
@click.option("--no-context", is_flag=True, help="Do not write a context for stpctl into your home.")
@_addresses
def init_hub(
    name: str,
    directory: str,
    domain: str,
    operator: str,
    no_context: bool,
    listen: str,
    enrol: str,
    management: str,
    health: str,
    state: str,
) -> None:
    """Make a CA, a hub, an operator and a configuration."""
    addresses = setup.Addresses(udp=listen, enrol=enrol, management=management, health=health)
    try:
        done = setup.init_hub(
            name,
            directory,
            domain=domain,
            operator=operator,
            addresses=addresses,
            state=state,
            context=not no_context,
        )
    except EnrolError as exc:
        _fail(exc)
    _report(done, f"Made hub {name} of {domain}")


@click.command()
@click.argument("token")
@click.option(
    "--hub", required=True, metavar="HOST[:PORT]", help="The hub, or a gateway that asks it for you."
)
@click.option("--name", required=True, help="This gateway's node name, such as edge-1.")
@click.option(
    "--dir", "directory", required=True, type=click.Path(file_okay=False), help="Where its files go."
)
@_addresses
def join(
    token: str,
    hub: str,
    name: str,
    directory: str,
    listen: str,
    enrol: str,
    management: str,
    health: str,
    state: str,
) -> None:
    """Let this machine into a fleet as a gateway, with a TOKEN from `stpctl keys create`."""
    addresses = setup.Addresses(udp=listen, enrol=enrol, management=management, health=health)
    try:
        done = setup.join_gateway(token, hub, name, directory, addresses=addresses, state=state)
    except EnrolError as exc:
        _fail(exc)
    _report(done, f"Joined as {name}")


@click.command()
@click.option("--config", required=True, type=click.Path(dir_okay=False), help="The daemon's configuration.")
@click.option("--host", metavar="HOST[:PORT]", help="Who signs; by default the node above this one.")
@click.option("--force", is_flag=True, help="Renew although it is not due.")
@click.option(
    "--then", metavar="COMMAND", help="Run this after a renewal, and only then; its exit code is ours."
)
def renew(config: str, host: str | None, force: bool, then: str | None) -> None:
    """Renew this daemon's certificate when a third of its life is left, or when it has lapsed."""
    try:
        done = setup.renew(config, host=host, force=force)
    except EnrolError as exc:
        _fail(exc)
    state = "renewed" if done.renewed else "not due"
    click.echo(
        f"{done.file}: {state}, good until {done.not_after:%Y-%m-%d} ({setup.days_left(done.not_after)} days)"
    )
    if done.renewed and then:
        sys.exit(subprocess.run(shlex.split(then), check=False).returncode)
    if done.renewed:
        click.echo("  put it in force: stpctl reload; under the shipped units systemctl restart")


COMMANDS: Final[tuple[click.Command, ...]] = (init, join, renew)
"""For `stpd` to attach: `for command in COMMANDS: main.add_command(command)`."""
