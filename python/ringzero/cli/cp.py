"""`ringzero cp HERE VM:/there` and back: files and trees between this host and a VM of it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringzero.errors import InputError

if TYPE_CHECKING:
    from ringzero.host.client import HostVm
    from ringzero.machine.tar import Progress

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExamples:\n  ringzero cp notes.txt web:/root/\n  ringzero cp -r web:/var/log ./logs",
)
def cp(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A path here, or VM:PATH.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The other: VM:PATH, or a path here.")],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Copy a folder and all in it.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Copy a file or a tree into a VM of the host, or out of one: modes, times and links go with it.

    Into a folder that is there it goes under its own name, as with cp.
    """
    from ringzero.host.client import Host

    here, there = _split(source), _split(target)
    if (here is None) == (there is None):
        raise InputError("one of the two is in a VM, written VM:PATH (a path here with a colon in it: ./a:b)")
    with Host.connect() as host:
        try:
            if there is not None:
                _put(host.vm(there[0]), source, there[1], recursive, quiet)
            elif here is not None:
                _get(host.vm(here[0]), here[1], target, recursive, quiet)
        except OSError as error:
            place = f" {os.fsdecode(error.filename)}:" if error.filename is not None else ""
            raise InputError(f"cannot copy {source} to {target}:{place} {error.strerror or error}") from error


def _split(path: str) -> tuple[str, str] | None:
    """Return VM and path of `VM:PATH`; None for a path of this host."""
    name, colon, rest = path.partition(":")
    if not colon or not name or "/" in name:
        return None
    return name, rest or "."


def _put(vm: HostVm, source: str, target: str, recursive: bool, quiet: bool) -> None:
    facts = os.stat(source)
    _refuse_folder(source, facts.st_mode, recursive)
    there = vm.path(target)
    if target.endswith("/") or there.is_dir():
        there = there / os.path.basename(os.path.abspath(source))
    total = facts.st_size
    if stat.S_ISDIR(facts.st_mode):
        total = sum(path.lstat().st_size for path in Path(source).rglob("*") if path.is_file())
    with _progress(source, total, quiet) as progress:
        vm.files.put(source, there, progress=progress)


def _get(vm: HostVm, source: str, target: str, recursive: bool, quiet: bool) -> None:
    facts = vm.path(source).stat()
    _refuse_folder(source, facts.st_mode, recursive)
    here = Path(target)
    if target.endswith("/") or here.is_dir():
        # The guest names nothing here: the name is what the operator wrote.
        here = here / (os.path.basename(source.rstrip("/")) or vm.name)
    total = None if stat.S_ISDIR(facts.st_mode) else facts.st_size
    with _progress(source, total, quiet) as progress:
        vm.files.get(source, here, progress=progress)


def _refuse_folder(source: str, mode: int, recursive: bool) -> None:
    if stat.S_ISDIR(mode) and not recursive:
        raise InputError(f"{source} is a folder: say -r to copy it with all that is in it")


@contextmanager
def _progress(name: str, total: int | None, quiet: bool) -> Iterator[Progress | None]:
    """Show a bar on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(os.path.basename(name.rstrip("/")), total=total)
        yield lambda _, size: bar.advance(task, size)
