"""`ringzero host start`, `status` and `stop`: the daemon."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["start", "status", "stop"]


def start(
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the host's memory, what VMs may take: 90 % of it.")
    ] = None,
    swap: Annotated[str, typer.Option(metavar="SIZE", help="Of disk, what their pages may take.")] = "0",
    swap_folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Where that is.")] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A memory policy of your own, in Python.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Record counters, for `ringzero host simulate`.")
    ] = None,
) -> None:
    """Start the daemon; it finds the VMs of an earlier one."""
    from ringzero.host.launch import start_daemon
    from ringzero.host.runtime import Runtime

    runtime = Runtime.default()
    pid = start_daemon(
        runtime, memory=memory, swap=swap, swap_folder=swap_folder, policy=policy, record=record
    )
    typer.echo(f"the daemon is process {pid}; its runtime folder is {runtime.root}")


def status(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the daemon, and how many VMs it has."""
    from ringzero.host.client import Host
    from ringzero.machine.spec import format_size

    with Host.connect() as host:
        facts = host.status()
    if json:
        typer.echo(json_format.dumps({key: value for key, value in facts.items() if key not in ("ok", "id")}))
        return
    counts = ", ".join(f"{count} {phase}" for phase, count in facts["vms"].items() if count) or "none"
    sharer = facts["sharer"] or "that of an earlier daemon"
    typer.echo(f"daemon    process {facts['pid']}, fork server {facts['fork_server']}, sharer {sharer}")
    typer.echo(f"folder    {facts['root']}")
    typer.echo(f"memory    {facts['memory'] >> 20} MiB for vms, swap {format_size(facts['swap'])}")
    typer.echo(f"policy    {facts['policy']}")
    typer.echo(f"vms       {counts}")


def stop(
    down: Annotated[bool, typer.Option("--down", help="Take all VMs down first.")] = False,
) -> None:
    """End the daemon. Its VMs go on, and the next daemon finds them."""
    from ringzero.host.client import Host

    with Host.connect() as host:
        if down:
            host.down(*(vm.name for vm in host.vms()))
        living = host.stop()
    if living:
        typer.echo(f"the daemon has ended; {living} vms go on, and the next daemon finds them")
