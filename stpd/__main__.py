"""`stpd`: run the daemon, check a configuration, make or join a fleet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click

from stpd import __version__
from stpd.setup_cli import init, join, network_key, renew

if TYPE_CHECKING:
    from stpd.daemon import StartupError

DEFAULT_CONFIG: Final = "/etc/stpd/stpd.toml"

EX_SOFTWARE: Final = 70
EX_CONFIG: Final = 78


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Exit status: 0 stopped as told, 64 wrong usage, 69 unreachable, 70 a part died, 71 the system refused
(port in use), 73 cannot write, 77 refused, 78 the configuration or identity is wrong.

\b
A hub in two minutes:
  stpd init hub --name hub-1 --dir /etc/stpd
  stpd run --config /etc/stpd/hub.toml
  stpctl keys create --role gateway
and on the gateway:
  stpd join TOKEN --hub HOST --name edge-1 --dir /etc/stpd
  stpd run --config /etc/stpd/gateway.toml""",
)
@click.version_option(__version__, prog_name="stpd")
def main() -> None:
    """The relay that can account for every message: gateway, regional hub or hub, by configuration."""


def config_option(function: click.decorators.FC) -> click.decorators.FC:
    """--config, the same for every command that needs one."""
    return click.option(
        "--config",
        "-c",
        "path",
        default=DEFAULT_CONFIG,
        show_default=True,
        envvar="STPD_CONFIG",
        type=click.Path(path_type=Path),
        help="The configuration file (TOML).",
    )(function)


@main.command()
@config_option
def run(path: Path) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT; SIGHUP reads the configuration again.

    It needs the configuration and the identity that `stpd init` or `stpd join` wrote, says on standard error
    what it does (one JSON object a line, see [log]), and tells systemd when it is ready.
    """
    from stp.identity import IdentityError
    from stpd import daemon, logs
    from stpd.config import ConfigError, load

    try:
        config = load(path)
    except ConfigError as error:
        fail(str(error), f"check it with: stpd check --config {path}", EX_CONFIG)
    logs.configure(level=config.log.level, format=config.log.format)
    try:
        daemon.run(config, path)
    except IdentityError as error:
        logs.shutdown()
        where = f"{error.file}: " if error.file else ""
        fail(f"{where}{error.cause}", error.advice, EX_CONFIG)
    except BaseException as error:
        found = first_startup_error(error)
        logs.shutdown()
        if found is not None:
            fail(found.cause, found.advice, found.status)
        raise
    logs.shutdown()


def first_startup_error(error: BaseException) -> StartupError | None:
    """The StartupError in *error*, however deep the nurseries wrapped it; None if there is none."""
    from stpd.daemon import StartupError

    if isinstance(error, StartupError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for one in error.exceptions if (found := first_startup_error(one))), None)
    return None


@main.command()
@config_option
def check(path: Path) -> None:
    """Read the configuration as `run` would, and list everything that is wrong with it.

    Exit status 0 when it is good, warnings included, 78 when it is not.
    """
    from stpd.config import check_config
    from stpd.problems import render

    problems = check_config(path)
    if problems:
        click.echo(render(str(path), problems), err=True)
    if any(not problem.warning for problem in problems):
        sys.exit(EX_CONFIG)
    click.echo(f"{path}: good")


main.add_command(init)
main.add_command(join)
main.add_command(renew)
main.add_command(network_key)


def fail(cause: str, advice: str, status: int) -> NoReturn:
    """One line of cause, one of what to do, and out."""
    click.echo(f"stpd: {cause}\n  {advice}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
