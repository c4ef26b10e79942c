"""`ringzero run`: its options. What it does with them, and its exit statuses, are in `ringzero.cli.guest`."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ringzero.cli.guest import RunOptions, run_guest
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
from ringzero.cli.quick import unannounced_command
from ringzero.errors import InputError

EPILOG = """\
\b
Examples:
  ringzero run debian                          a shell; Ctrl-] leaves, exit powers off
  ringzero run debian:6.12 -- uname -r         one command in the 6.12 kernel
  ringzero run debian -- cat < in > out        standard input and output pass through
  ringzero run hello --engine interpret --stats
  ringzero run debian --disk base.qcow2,overlay --disk data.raw,ro
  ringzero run debian-full --net nat -p 2222:22 --user ana --ssh-key ~/.ssh/id_ed25519.pub
  ringzero run ./debian-12-genericcloud-amd64.qcow2 --memory 512M --persist mine.qcow2 --user ana
  ringzero run --kernel bzImage --initrd root.cpio --append 'console=ttyS0' --timeout 60
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class RunCommand(TyperCommand):
    """Everything after `--` is the guest's command, whatever it looks like."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the guest's command off before options are looked for."""
        ctx.obj = None
        if "--" in args:
            at = args.index("--")
            ctx.obj, args = args[at + 1 :], args[:at]
        else:
            command = unannounced_command(args)
            if command is not None:
                example = f"ringzero run IMAGE -- {shlex.join(command)}"
                raise InputError(f"write -- before the guest's command: {example}")
        return super().parse_args(ctx, args)


@app.command(
    cls=RunCommand,
    epilog=EPILOG,
    options_metavar="[OPTIONS]",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
def run(
    context: typer.Context,
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="[IMAGE] [-- CMD ARG...]", help="debian, debian:6.12, debian-full, hello, or a disk."
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A kernel to boot (bzImage, ELF, multiboot), or a series of debian's."
        ),
    ] = None,
    initrd: Initrd = None,
    append: Annotated[
        str | None, typer.Option(metavar="WORDS", help="Words for the kernel's command line.")
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Guest memory: 512M, 2G.")] = "256M",
    cpus: Cpus = 1,
    engine: Engine = "direct",
    cpu: Annotated[
        str, typer.Option(metavar="WORDS", help="Features to add to the processors: +pku,+pks.")
    ] = "",
    kaslr: Annotated[
        bool, typer.Option("--kaslr", help="Let the kernel unpack itself, at a random address; slower.")
    ] = False,
    virtio: Annotated[
        str,
        typer.Option(
            metavar="WAY", help="Virtio devices on the bus (pci), or, for kernels without PCI, mmio."
        ),
    ] = "pci",
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End the guest after so long, with status 124.")
    ] = None,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give CMD a terminal of its own.")] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Environment for CMD.")
    ] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", "-w", metavar="DIR", help="Directory for CMD.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Add a device: debug-exit, or pc-testdev.")
    ] = None,
    disk: Disks = None,
    mount: Mounts = None,
    vsock: Annotated[
        str | None,
        typer.Option(metavar="SOCKET", help="Let programs here and in the guest connect, by this name."),
    ] = None,
    net: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NETWORK",
            help="Add a network card: none, nat, allow=CIDR[:PORT],..., switch=NAME, tap=NAME.",
        ),
    ] = None,
    publish: Published = None,
    persist: Persist = None,
    user: User = None,
    ssh_key: SshKeys = None,
    hostname: Hostname = None,
    user_data: UserData = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print the counters at the end.")] = False,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a trace of every instruction.")
    ] = None,
    no_translation_cache: Annotated[
        bool,
        typer.Option("--no-translation-cache", help="Keep no translations for later runs, and use none."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the kernel's messages while it boots.")
    ] = False,
) -> None:
    """Boot a guest: a shell on this terminal, or one command, or a kernel of your own."""
    command: list[str] | None = context.obj
    options = RunOptions(
        image=image,
        command=None if command is None else tuple(command),
        kernel=kernel,
        initrd=initrd,
        append=append,
        memory=memory,
        cpus=cpus,
        engine=engine,
        cpu=cpu,
        kaslr=kaslr,
        virtio=virtio,
        timeout=timeout,
        tty=tty,
        env=tuple(env or ()),
        cwd=cwd,
        device=tuple(device or ()),
        disk=tuple(disk or ()),
        mount=tuple(mount or ()),
        vsock=vsock,
        net=tuple(net or ()),
        publish=tuple(publish or ()),
        persist=persist,
        user=user,
        ssh_key=tuple(ssh_key or ()),
        hostname=hostname,
        user_data=user_data,
        stats=stats,
        trace=trace,
        verbose=verbose,
        no_translation_cache=no_translation_cache,
    )
    raise typer.Exit(run_guest(options))
