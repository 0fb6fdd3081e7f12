"""`stp`: publish, subscribe and measure from a shell. stdout is data, stderr the rest; exit codes as sysexits(3).

Everything slow is imported inside the commands, so that `stp --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from attrs import define

from stp import path_cli
from stp.failures import (
    EX_CONFIG,
    EX_NOINPUT,
    EX_NOPERM,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    EX_USAGE,
    INTERRUPTED,
    Failure,
)
from stp.printing import emit, emit_json, ms, say

if TYPE_CHECKING:
    from stp.client import Client
    from stp.outbox import Refused
    from stp.subscriber import Message

LINES_AT_ONCE: Final = 1_000
"""Lines of stdin that `stp pub -` publishes before it waits for their custody."""

Function = TypeVar("Function", bound=Callable[..., Any])


@define
class Target:
    """What every command that connects is given."""

    url: str
    identity: tuple[str, ...]
    node: str
    timeout: float
    verbose: bool


def connects(function: Function) -> Function:
    """The options of a command that connects; it gets them as one Target."""

    @click.option(
        "--url",
        envvar="STP_URL",
        default="",
        metavar="URL",
        help="stp://[node@]host[:port], or stp+unix:///path/of/socket. [env: STP_URL]",
    )
    @click.option(
        "--identity",
        "-i",
        envvar="STP_IDENTITY",
        multiple=True,
        metavar="FILE",
        help="Bundle with key, certificate and anchors. [env: STP_IDENTITY; ~/.config/stp/device.pem]",
    )
    @click.option(
        "--node", default="", metavar="NAME", help="Name in the peer's certificate, if the URL has none."
    )
    @click.option("--timeout", default=10.0, show_default=True, metavar="SECONDS", help="For an answer.")
    @click.option("--verbose", "-v", is_flag=True, help="Say when the session comes and goes.")
    def command(
        url: str, identity: tuple[str, ...], node: str, timeout: float, verbose: bool, **options: Any
    ) -> Any:
        return function(Target(url, identity, node, timeout, verbose), **options)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__click_params__ = [*getattr(function, "__click_params__", []), *command.__click_params__]  # type: ignore[attr-defined]
    return command  # type: ignore[return-value]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 64 usage, 66 no input, 69 no answer, 75 try again, 77 refused, 78 configuration.",
)
@click.version_option(package_name="stpd", prog_name="stp")
def root() -> None:
    """Publish, subscribe and measure over STP.

    \b
    stp join stpj1.… --host gw.local --name kitchen-1   get an identity
    stp ping                                            is my keeper there?
    stp path                                            what works on the way to it, and why not?
    stp pub site-a/kitchen/temp 21.5                    send one message; done when it is on disk
    stp sub 'site-a/#'                                  watch
    """


@root.command()
@click.argument("host", required=False)
@click.option("--count", "-c", default=3, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--interval", default=1.0, show_default=True, metavar="SECONDS", help="Between two.")
@click.option("--load", metavar="RATE", help="Load the link with echoed datagrams: 500kbit, 1Mbit.")
@click.option(
    "--for", "duration", default="10s", show_default=True, metavar="TIME", help="How long to load it."
)
@click.option("--size", default=0, type=click.IntRange(0), help="Bytes of each datagram.  [default: 1000]")
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", help="How to print.")
@connects
def ping(
    target: Target,
    host: str | None,
    count: int,
    interval: float,
    load: str | None,
    duration: str,
    size: int,
    output: str,
) -> None:
    """Measure round trips to the keeper, at rest or under load. HOST: as --url, with or without stp://.

    \b
    stp ping
    stp ping gw-1@192.168.1.5 -c 10 --interval 0.2
    stp ping --load 1Mbit --for 10s       round trips, jitter and loss of a loaded link
    """
    if host:
        target.url = host if "://" in host else f"stp://{host}"
    if load is None:
        run(partial(_ping, target, count, interval, output), target)
    else:
        run(partial(_ping_under_load, target, load, duration, size, output), target)


async def _ping_under_load(target: Target, load: str, duration: str, size: int, output: str) -> None:
    from stp import underload

    rate, seconds = underload.read_rate(load), underload.read_seconds(duration)
    async with session_of(target) as session:
        found = await underload.measure(session, rate, size, seconds, target.timeout)
    if output == "json":
        emit_json(**found)
    else:
        for line in underload.describe(found):
            emit(line)


async def _ping(target: Target, count: int, interval: float, output: str) -> None:
    import trio

    async with session_of(target) as session:
        for number in range(count):
            if number:
                await trio.sleep(interval)
            result = await session.ping(timeout=target.timeout)
            name = session.peer.node if session.peer is not None else "?"
            if output == "json":
                emit_json(node=name, round_trip_ms=ms(result.round_trip), network_ms=ms(result.network))
            else:
                trip, network = ms(result.round_trip), ms(result.network)
                emit(f"{name}: {trip:.2f} ms, of which the network {network:.2f} ms")


@root.command(help=path_cli.HELP)
@click.argument("host", required=False, metavar="[HOST|URL]")
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", help="How to print.")
@connects
def path(target: Target, host: str | None, output: str) -> None:
    if host:
        target.url = host if "://" in host else f"stp://{host}"
    run(partial(path_cli.show, target.url, target.identity, target.node, output), target)


@root.command()
@click.argument("topic")
@click.argument("text", required=False)
@click.option("--file", "-f", "file", type=click.Path(dir_okay=False), help="Send this file's bytes.")
@click.option(
    "--receipt",
    type=click.Choice(["none", "kept", "custody"]),
    default="kept",
    show_default=True,
    help="Wait until the keeper has it on disk, or until the top of the chain has it.",
)
@click.option("--ttl", default=0.0, metavar="SECONDS", help="Nobody wants it later than that; 0: for ever.")
@connects
def pub(target: Target, topic: str, text: str | None, file: str | None, receipt: str, ttl: float) -> None:
    """Publish TEXT, a file, or with - each line of stdin as a message.

    \b
    stp pub site-a/kitchen/temp 21.5
    stp pub site-a/kitchen/photo --file photo.jpg --receipt custody
    journalctl -f | stp pub site-a/log -
    """
    if (text is None) == (file is None):
        raise click.UsageError("give either TEXT, or --file FILE, or - for the lines of stdin")
    run(partial(_pub, target, topic, text, file, receipt, ttl), target)


async def _pub(
    target: Target, topic: str, text: str | None, file: str | None, receipt: str, ttl: float
) -> None:
    from stp.topics import check_topic

    check_topic(topic)
    level = None if receipt == "none" else receipt
    refused: list[Refused] = []
    payload = b""
    if file is not None:
        payload = read_file(file)
    elif text is not None:
        payload = text.encode(errors="surrogateescape")
    async with session_of(target, on_refused=refused.append) as session:
        if text == "-":
            await _pub_lines(session, topic, level, ttl)
        else:
            await patient(target, session.publish(topic, payload, receipt=level, ttl=ttl), session)  # type: ignore[arg-type]
        if not await session.drain(target.timeout):
            left = session.statistics().unfinished
            raise Failure(
                f"{left} messages are not kept: {session.state}",
                "try again; they may arrive twice",
                EX_TEMPFAIL,
            )
    if refused:
        raise refused[0]


async def _pub_lines(session: Client, topic: str, level: str | None, ttl: float) -> None:
    """Each line as it comes; with custody in groups of LINES_AT_ONCE."""
    import trio

    group: list[tuple[str, bytes]] = []
    async for line in trio.wrap_file(sys.stdin.buffer):
        payload = line.rstrip(b"\r\n")
        if level != "custody":
            await session.publish(topic, payload, ttl=ttl)
            continue
        group.append((topic, payload))
        if len(group) >= LINES_AT_ONCE:
            await session.publish_many(group, receipt="custody", ttl=ttl)
            group.clear()
    if group:
        await session.publish_many(group, receipt="custody", ttl=ttl)


@root.command()
@click.argument("filters", nargs=-1, required=True, metavar="FILTER...")
@click.option(
    "--durable", "-d", metavar="NAME", help="A cursor at the keeper: go on where this name stopped."
)
@click.option("--start", default="now", metavar="now|earliest|TIME", help="For a new name: where to begin.")
@click.option("--count", "-n", default=0, metavar="N", type=click.IntRange(0), help="Stop after N messages.")
@click.option(
    "--output",
    "-o",
    type=click.Choice(["text", "payload", "json"]),
    default="text",
    show_default=True,
    help="Topic and payload; the payload alone; or one JSON object a line.",
)
@connects
def sub(
    target: Target, filters: tuple[str, ...], durable: str | None, start: str, count: int, output: str
) -> None:
    """Print messages as they come, until interrupted.

    \b
    stp sub 'site-a/#'
    stp sub 'site-a/+/temp' 'site-b/#' -o json | jq .payload
    stp sub 'event/#' --durable audit --start earliest
    stp sub 'event/#' --start 2026-01-31T08:00+01:00 -n 100
    """
    run(partial(_sub, target, filters, durable, when(start), count, output), target)


async def _sub(
    target: Target,
    filters: tuple[str, ...],
    durable: str | None,
    start: Any,
    count: int,
    output: str,
) -> None:
    async with (
        session_of(target) as session,
        session.subscribe(*filters, durable=durable, start=start) as subscription,
    ):
        taken = 0
        async for message in subscription:
            show(message, output)
            taken += 1
            if taken == count:
                break


def show(message: Message, output: str) -> None:
    """One message on stdout."""
    if output == "payload":
        sys.stdout.buffer.write(message.payload + b"\n")
        sys.stdout.buffer.flush()
    elif output == "text":
        emit(f"{message.topic} {message.payload.decode(errors='backslashreplace')}")
    else:
        fields: dict[str, Any] = {"topic": message.topic}
        try:
            fields["payload"] = message.payload.decode()
        except UnicodeDecodeError:
            fields["payload_hex"] = message.payload.hex()
        fields["time"] = datetime.fromtimestamp(message.time_ms / 1000, UTC).isoformat(
            timespec="milliseconds"
        )
        fields |= {"lane": message.lane, "number": message.number, "source": message.source.hex()}
        fields |= {"publisher": message.publisher.hex(), "age_s": message.age}
        if message.reply_topic is not None:
            fields["reply_topic"] = message.reply_topic
        if message.tombstone:
            fields["tombstone"] = True
        emit_json(**fields)


@root.command()
@click.argument("topic")
@click.argument("text", required=False, default="")
@connects
def request(target: Target, topic: str, text: str) -> None:
    """Send a request and print the one reply. Nobody acts on it after --timeout.

    \b
    stp request site-a/cmd/valve-1 open --timeout 5
    """
    run(partial(_request, target, topic, text), target)


async def _request(target: Target, topic: str, text: str) -> None:
    async with session_of(target) as session:
        reply = await session.request(topic, text.encode(errors="surrogateescape"), timeout=target.timeout)
    sys.stdout.buffer.write(reply.payload + b"\n")
    sys.stdout.buffer.flush()


@root.command()
@click.option("--messages", default=20_000, show_default=True, type=click.IntRange(1), help="For the rate.")
@click.option(
    "--size", default=100, show_default=True, type=click.IntRange(1, 1024 * 1024), help="Bytes each."
)
@click.option("--topic", default="", help="By default bench/NODE. What is sent is stored like anything else.")
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", help="How to print.")
@connects
def bench(target: Target, messages: int, size: int, topic: str, output: str) -> None:
    """Measure this machine, the network and the keeper together.

    \b
    stp bench --messages 100000 --size 100
    """
    run(partial(_bench, target, messages, size, topic, output), target)


async def _bench(target: Target, messages: int, size: int, topic: str, output: str) -> None:
    import trio

    async with session_of(target) as session:
        topic = topic or f"bench/{session.identity.node}"
        payload = bytes(size)
        pings = [(await session.ping(timeout=target.timeout)).round_trip for _ in range(20)]
        waits = []
        for _ in range(100):
            began = trio.current_time()
            await patient(target, session.publish(topic, payload, receipt="kept"), session)
            waits.append(trio.current_time() - began)
        began = trio.current_time()
        await session.publish_many(((topic, payload) for _ in range(messages)), receipt="kept")
        rate = messages / (trio.current_time() - began)
    result = {
        "ping_ms": {"p50": ms(share(pings, 0.5)), "p99": ms(share(pings, 0.99))},
        "kept_ms": {"p50": ms(share(waits, 0.5)), "p99": ms(share(waits, 0.99))},
        "kept_messages_per_s": round(rate),
        "messages": messages,
        "size": size,
    }
    if output == "json":
        emit_json(**result)
        return
    emit(f"ping             p50 {ms(share(pings, 0.5)):8.2f} ms   p99 {ms(share(pings, 0.99)):8.2f} ms")
    emit(f"one message kept p50 {ms(share(waits, 0.5)):8.2f} ms   p99 {ms(share(waits, 0.99)):8.2f} ms")
    emit(f"{messages} messages of {size} bytes kept at {rate:,.0f} messages/s, {rate * size / 1e6:.1f} MB/s")


@root.command()
@click.argument("token")
@click.option(
    "--host", required=True, metavar="HOST[:PORT]", help="Who enrols: a gateway or the hub, port 8443."
)
@click.option("--name", required=True, metavar="NAME", help="This device's node name.")
@click.option("--out", type=click.Path(dir_okay=False), help="[default: ~/.config/stp/device.pem]")
def join(token: str, host: str, name: str, out: str | None) -> None:
    """Get an identity with a join token, once.

    \b
    stp join stpj1.AbC… --host gw.local --name kitchen-1
    """
    from stp.enrol import join_device

    path = join_device(token, host, name, out)
    click.echo(f"{name} has joined; its identity is {path}", err=True)


@root.command()
@click.option("--host", metavar="HOST[:PORT]", help="Who enrols. [default: who did]")
@click.option(
    "--identity", "-i", "file", type=click.Path(dir_okay=False), help="The bundle to renew, in place."
)
def renew(host: str | None, file: str | None) -> None:
    """Renew the identity before it expires; for a timer. A running program takes it within seconds, on a fresh
    session beside the one it has.

    \b
    stp renew
    """
    from stp.enrol import default_identity, renew_file

    path = file or default_identity()
    identity = renew_file(path, host)
    click.echo(f"{identity.node} is renewed until {identity.not_after:%Y-%m-%d %H:%M}Z", err=True)


# -- running a command -----------------------------------------------------------------------------------


@asynccontextmanager
async def session_of(
    target: Target, *, on_refused: Callable[[Refused], None] | None = None
) -> AsyncIterator[Client]:
    """The session that the options ask for."""
    import stp

    async with stp.connect(
        target.url,
        identity=list(target.identity) or None,
        node=target.node,
        connect_timeout=target.timeout,
        close_timeout=target.timeout,
        on_refused=on_refused,
        kind="cli",
    ) as session:
        yield session


async def patient(target: Target, wait: Awaitable[None], session: Client) -> None:
    """Wait for a receipt, but not for ever."""
    import trio

    with trio.move_on_after(target.timeout) as scope:
        await wait
    if scope.cancelled_caught:
        raise Failure(
            f"no receipt within {target.timeout:g} s: {session.state}",
            "the message may arrive yet; `stpctl status` at the keeper says what holds it up",
            EX_TEMPFAIL,
        )


def run(function: Callable[[], Awaitable[None]], target: Target) -> None:
    """Run a command's coroutine, with what it waits for on stderr."""
    import logging

    import trio

    level = logging.INFO if target.verbose else logging.WARNING
    logging.basicConfig(level=level, format="stp: %(message)s", stream=sys.stderr)
    try:
        trio.run(function)
    except BrokenPipeError:  # `stp sub '#' | head`; click would call it a failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from None
        raise


def read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise Failure(
            f"{path} cannot be read: {error.strerror}", "check its name and owner", EX_NOINPUT
        ) from error


def when(text: str) -> str | datetime:
    """--start: a word, or a time. A time without a zone is this machine's."""
    if text in ("now", "earliest"):
        return text
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise click.UsageError(
            f"--start {text!r} is neither now, nor earliest, nor a time such as 2026-01-31T08:00"
        ) from None


def share(values: list[float], part: float) -> float:
    """The value below which that part of all values lies."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def explain(error: Exception) -> Failure | None:
    """What an error means to a person; None for one that is our own fault."""
    from stp.core.errors import MessageError, UsageError
    from stp.identity import IdentityError
    from stp.lines import Rejected, Unreachable
    from stp.outbox import Refused
    from stp.pinned import EnrolError
    from stp.publisher import MessageTooLarge
    from stp.requests import RequestTimeout

    match error:
        case Failure():
            return error
        case IdentityError():
            cause = f"{error.file}: {error.cause}" if error.file else error.cause
            return Failure(cause, error.advice, EX_CONFIG)
        case EnrolError():
            return Failure(error.cause, error.advice, error.exit_code)
        case Unreachable():
            advice = "is stpd running there, UDP 9000 open, and the network key the same? Without it nobody answers"
            return Failure(str(error), advice, EX_UNAVAILABLE)
        case Rejected(by_peer=True):
            advice = "the identity may be revoked, expired or of another fleet: `stp join` gets a new one"
            return Failure(str(error), advice, EX_NOPERM)
        case Rejected():
            return Failure(
                str(error), "is the URL's host the node you mean? Then check its certificate", EX_NOPERM
            )
        case Refused():
            return Failure(str(error), "the keeper's access rules decide; ask its operator", EX_NOPERM)
        case RequestTimeout():
            return Failure(
                str(error), "is anybody subscribed to it? It may have been carried out", EX_TEMPFAIL
            )
        case MessageTooLarge():
            return Failure(str(error), "send it in pieces", EX_USAGE)
        case MessageError() | UsageError():
            return Failure(str(error), "see --help", EX_USAGE)
        case _:
            return None


def execute(arguments: list[str]) -> int:
    """Run one command; the exit code."""
    try:
        root.main(arguments, prog_name="stp", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return EX_USAGE
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        if failure.cause:
            say(f"{failure.cause}\n  {failure.advice}")
        return failure.status
    return 0


def main() -> None:
    """The entry point."""
    sys.exit(execute(sys.argv[1:]))


if __name__ == "__main__":
    main()
