"""`ringzero host up`, `down`, `list`, `console` and `events`: the VMs."""

from __future__ import annotations

import json as json_format
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringzero.cli.options import (
    Cpus,
    Disks,
    Engine,
    Hostname,
    Initrd,
    Mounts,
    Persist,
    Published,
    SshKeys,
    User,
    UserData,
)
from ringzero.errors import InputError

if TYPE_CHECKING:
    from ringzero.host.client import Host

__all__ = ["console", "down", "events", "list_", "up"]


def up(
    image: Annotated[
        str | None,
        typer.Argument(metavar="[IMAGE]", help="debian, debian:6.12, debian-full, hello, or a disk."),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", help="How many VMs.")] = 1,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of several: NAME-1, NAME-2 ...")] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="What each guest believes to have.")] = "128M",
    min: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What it can always have: a quarter of that.")
    ] = None,
    max: Annotated[str | None, typer.Option(metavar="SIZE", help="What it never has more of: all.")] = None,
    shares: Annotated[int, typer.Option(metavar="N", help="Its weight when memory is short.")] = 1000,
    share_group: Annotated[
        str, typer.Option(metavar="NAME", help="Equal pages are shared within a group only.")
    ] = "default",
    cpus: Cpus = 1,
    engine: Engine = "direct",
    kernel: Annotated[str | None, typer.Option(metavar="FILE", help="A kernel to boot.")] = None,
    initrd: Initrd = None,
    append: Annotated[
        str | None, typer.Option(metavar="WORDS", help="For the kernel's command line.")
    ] = None,
    net: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NETWORK",
            help="Add a network card: none, nat, allow=CIDR[:PORT],..., switch=NAME, tap=NAME.",
        ),
    ] = None,
    publish: Published = None,
    disk: Disks = None,
    mount: Mounts = None,
    persist: Persist = None,
    user: User = None,
    ssh_key: SshKeys = None,
    hostname: Hostname = None,
    user_data: UserData = None,
    wait: Annotated[bool, typer.Option(help="Wait until the guests have booted.")] = True,
) -> None:
    """Start VMs: all of them, or none where the host could not keep what it would promise."""
    from rich.console import Console

    from ringzero.machine.seed import Seed

    began = time.monotonic()
    seed = Seed.parse(user, tuple(ssh_key or ()), hostname, user_data)
    with _host() as host, Console(stderr=True).status("starting"):
        vms = host.up_many(
            count,
            image,
            name=name,
            memory=memory,
            min=min,
            max=max,
            shares=shares,
            share_group=share_group,
            wait=wait,
            cpus=cpus,
            engine=engine,
            kernel=kernel,
            initrd=initrd,
            append=append,
            net=net or (),
            publish=publish or (),
            disks=disk or (),
            mounts=mount or (),
            persist=persist,
            seed=seed,
        )
    seconds = time.monotonic() - began
    done = "booted" if wait else "started"
    if len(vms) == 1:
        typer.echo(f"{vms[0].name} {done} in {seconds:.2f} s")
    else:
        typer.echo(f"{len(vms)} vms, {vms[0].name} to {vms[-1].name}, {done} in {seconds:.1f} s")


def down(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Which VMs.")] = None,
    all: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    now: Annotated[bool, typer.Option("--now", help="At once, as if their plugs were pulled.")] = False,
) -> None:
    """Take VMs down: ask their guests to power off, and pull their plugs when they have not after 10 s."""
    with _host() as host:
        chosen = [vm.name for vm in host.vms()] if all else names or []
        if not chosen and not all:
            raise InputError("which vms? Name them, or say --all")
        host.down(*chosen, now=now)


def list_(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the VMs, those that have ended and were not taken down, too."""
    with _host() as host:
        rows = host.ask("list")["vms"]
    if json:
        typer.echo(json_format.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ringzero.machine.spec import format_size

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NAME", "IMAGE", "MEMORY", "GROUP", "PID", "STATE", "SINCE"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading in ("MEMORY", "PID") else "left"
        )
    for row in rows:
        spec = row["spec"]
        table.add_row(
            row["name"],
            spec["image"] or os.path.basename(spec["kernel"] or ""),
            format_size(spec["memory"]),
            spec["group"],
            str(row["pid"] or ""),
            Text(
                row["phase"] if row["reason"] is None else f"ended: {row['reason']}"
            ),  # it may look like markup
            _ago(row["ended"] or row["began"]),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def console(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Attach to a guest's serial console; Ctrl-] leaves it, and the guest goes on."""
    import threading

    from ringzero.machine.machine import write_all
    from ringzero.machine.terminal import RawTerminal, pump_keys

    with _host() as host:
        line, first = host.vm(name).open_console()
    left = threading.Event()

    def leave() -> None:
        left.set()
        line.shutdown(2)

    def show() -> None:
        write_all(1, first)
        while data := line.recv(65536):
            write_all(1, data)

    try:
        if os.isatty(0):
            with RawTerminal(0):
                pump_keys(line.sendall, escape=True, left=leave)
                show()
        else:
            pump_keys(line.sendall, escape=False, left=leave)
            show()
    except ConnectionError:
        pass
    finally:
        line.close()
    if os.isatty(0):
        write_all(
            2, b"\r\nringzero: left the console; the guest goes on\n" if left.is_set() else b"\r\nended\n"
        )


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they happen.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON, one a line.")] = False,
    most: Annotated[int, typer.Option(metavar="N", help="So many of the last ones.")] = 50,
) -> None:
    """Show what happened: VMs that started and ended, and what was refused."""
    from dataclasses import asdict

    def show(event: Any) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
        typer.echo(json_format.dumps(asdict(event)) if json else f"{when}  {event.kind:<12}{event.text}")

    with _host() as host:
        for event in host.events(most=most):
            show(event)
        if follow:
            for event in host.watch():
                show(event)


def _host() -> Host:
    from ringzero.host.client import Host

    return Host.connect()


def _ago(at: float) -> str:
    seconds = max(0, int(time.time() - at))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
