"""Options that `ringzero run` and `ringzero host up` have in common, described once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Cpus",
    "Disks",
    "Engine",
    "Hostname",
    "Initrd",
    "Mounts",
    "Persist",
    "Published",
    "SshKeys",
    "User",
    "UserData",
]

Initrd = Annotated[str | None, typer.Option(metavar="FILE", help="Its initramfs.")]
Cpus = Annotated[int, typer.Option(metavar="N", help="Processors.")]
Engine = Annotated[str, typer.Option(metavar="NAME", help="direct, translate, or interpret.")]
Disks = Annotated[
    list[str] | None, typer.Option(metavar="FILE[,OPTION...]", help="Add a virtio disk (docs/disks.md).")
]
Mounts = Annotated[
    list[str] | None, typer.Option(metavar="HERE:THERE[:ro]", help="Share a folder with the guest.")
]
Published = Annotated[
    list[str] | None,
    typer.Option(
        "--publish", "-p", metavar="[ADDRESS:]PORT:GUEST_PORT[/udp]", help="Lead a port to the guest."
    ),
]
Persist = Annotated[
    str | None, typer.Option(metavar="FILE", help="Keep what the root disk gets in this qcow2 image.")
]
User = Annotated[
    str | None, typer.Option(metavar="NAME", help="Seed: make this user, who may sudo; root is locked.")
]
SshKeys = Annotated[list[str] | None, typer.Option(metavar="FILE|KEY", help="Seed: who may log in over SSH.")]
Hostname = Annotated[str | None, typer.Option(metavar="NAME", help="Seed: the guest's host name.")]
UserData = Annotated[
    str | None, typer.Option(metavar="FILE", help="Seed: a script, or what the image's cloud-init takes.")
]
