"""`stpctl`: runs a command and turns whatever ends it into words and an exit status."""

import os
import sys

import click

from stpctl.commands import root
from stpctl.errors import FAILED, OK, USAGE, CommandError

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; the exit status."""
    try:
        root.main(arguments, prog_name="stpctl", standalone_mode=False)
        sys.stdout.flush()
    except CommandError as exc:
        click.echo(f"stpctl: {exc.cause}\n  {exc.advice}", err=True)
        return exc.status
    except click.UsageError as exc:
        exc.show()
        return USAGE
    except click.ClickException as exc:
        exc.show()
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # `stpctl sessions list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OK


if __name__ == "__main__":
    main()
