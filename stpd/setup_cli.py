"""The commands `stpd init`, `join`, `renew` and `network-key`: `stpd.setup` and `stpd.network_keys` for people.

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
from stpd import network_keys, setup

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


@click.group("network-key")
def network_key() -> None:
    """Change the key without which nobody is answered. On the hub that has the CA.

    Every node accepts the two keys that it holds and sends with the first, so a change takes three steps:

    \b
      stpd network-key add    a second key;     reload the hub, let all gateways renew
      stpd network-key use    it becomes first; reload the hub, let all nodes renew
      stpd network-key drop   the old one goes; reload the hub

    A step that would cut off a node is refused and names it. Renewals hand the keys on: `stpd renew --force` on
    a gateway and `stp renew` on a device make one happen; without haste, wait for their timers.
    """


def _config(command: F) -> F:
    return click.option(
        "--config", required=True, type=click.Path(dir_okay=False), help="The hub's configuration."
    )(command)


def _force(command: F) -> F:
    return click.option("--force", is_flag=True, help="Although some nodes are not ready for it.")(command)


def _keys(ask: Callable[[], network_keys.NetworkKeys], next_step: str = "") -> None:
    try:
        found = ask()
    except EnrolError as exc:
        _fail(exc)
    for number, name in enumerate(found.ids):
        place = "sends and accepts" if not number else "accepts"
        known, sending = len(found.holders[number]), len(found.senders[number])
        click.echo(f"{name}  the hub {place} it; {known} nodes have it, {sending} of them send with it")
    if found.unknown:
        click.echo(f"{len(found.unknown)} nodes have none of these, or have not renewed since this is noted")
    if next_step:
        click.echo(
            f"  put it in force: stpctl reload; under the shipped units systemctl restart\n  {next_step}"
        )


@network_key.command("show")
@_config
def network_key_show(config: str) -> None:
    """The keys by their fingerprints, and how many nodes have them."""
    _keys(lambda: network_keys.show(config))


@network_key.command("add")
@_config
def network_key_add(config: str) -> None:
    """Step one: make a second key that everybody is to accept."""
    _keys(
        lambda: network_keys.add(config),
        "then let all gateways renew (stpd renew --force), and say: stpd network-key use",
    )


@network_key.command("use")
@_config
@_force
def network_key_use(config: str, force: bool) -> None:
    """Step two: send with the second key. Refused while a gateway would not hear it."""
    _keys(
        lambda: network_keys.use(config, force=force),
        "then let all nodes renew (stpd renew --force, stp renew), and say: stpd network-key drop",
    )


@network_key.command("drop")
@_config
@_force
def network_key_drop(config: str, force: bool) -> None:
    """Step three: forget the old key. Refused while a node still sends with it."""
    _keys(
        lambda: network_keys.drop(config, force=force),
        "nodes that hold the old key as well forget it when they renew",
    )


COMMANDS: Final[tuple[click.Command, ...]] = (init, join, renew, network_key)
"""For `stpd` to attach: `for command in COMMANDS: main.add_command(command)`."""
