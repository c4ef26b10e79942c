"""`ringzero exec VM -- CMD`: a command in a VM of the host, with our standard streams.

Its exit status becomes ours: 128+N when signal N ended it, 127 when there is no such command, 126 when it cannot be
executed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ringzero.cli import fail, output_closed
from ringzero.cli.command_io import environment, feed
from ringzero.errors import InputError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

NOT_EXECUTABLE, NOT_FOUND = 126, 127


@app.command(
    "exec",
    context_settings={
        "allow_interspersed_args": False,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
    epilog="\b\nExamples:\n  ringzero exec web -- uname -r\n  ringzero exec -t web -- sh",
)
def exec_(
    name: Annotated[str, typer.Argument(metavar="VM")],
    command: Annotated[list[str], typer.Argument(metavar="[--] CMD ARG...")],
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give CMD a terminal of its own.")] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Environment for CMD.")
    ] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", "-w", metavar="DIR", help="Directory for CMD.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", metavar="NAME", help="Who CMD is to be.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End CMD after so long, with status 124.")
    ] = None,
) -> None:
    """Run a command in a VM of the host, with our standard streams; its exit status becomes ours."""
    from ringzero.host.client import Host

    if command[0] == "--":
        command = command[1:]
    if not command:
        raise InputError(f"what is to run in vm {name!r}? ringzero exec {name} -- CMD ARG...")
    with Host.connect() as host:
        raise typer.Exit(_run(host.vm(name), command, tty, environment(env or []), cwd, user, timeout))


def _run(
    vm: Any,
    command: list[str],
    tty: bool,
    env: dict[str, str],
    cwd: str | None,
    user: str | None,
    timeout: float | None,
) -> int:
    from ringzero.machine.frames import DEFAULT_ENVIRONMENT
    from ringzero.machine.machine import write_all
    from ringzero.machine.terminal import RawTerminal, pump_keys, window_size

    status: int | None

    def show(fd: int) -> Callable[[bytes], None]:
        return lambda data: write_all(fd, data)

    process = vm.agent_link().start(
        command,
        env=DEFAULT_ENVIRONMENT | env,
        cwd=cwd,
        stdout=show(1),
        stderr=show(2),
        window=(window_size(0) or (24, 80)) if tty else None,
        credentials=vm.credentials(_number_or_name(user), None, None, -1),
    )

    def forward(number: int, _frame: object) -> None:
        threading.Thread(target=process.send_signal, args=(number,), daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        if tty and os.isatty(0):
            with RawTerminal(0, process.resize):
                pump_keys(process.write, escape=True, left=process.kill)
                status = process.wait(timeout)
        else:
            threading.Thread(target=feed, args=(process,), name="ringzero-stdin", daemon=True).start()
            status = process.wait(timeout)
    except BrokenPipeError:
        process.kill()
        return output_closed()
    except FileNotFoundError as error:
        where = f"vm {vm.name!r}"
        if error.filename == cwd:
            return fail(f"there is no directory {cwd!r} in {where}", NOT_FOUND)
        return fail(f"there is no command {command[0]!r} in {where}", NOT_FOUND)
    except OSError as error:
        return fail(f"{command[0]!r} cannot be run in vm {vm.name!r}: {error.strerror}", NOT_EXECUTABLE)
    if status is None:
        process.kill()
        return fail(f"--timeout passed before {command[0]!r} was done", 124)
    return status if status >= 0 else 128 - status


def _number_or_name(user: str | None) -> str | int | None:
    return int(user) if user is not None and user.isdigit() else user
