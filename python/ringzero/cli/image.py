"""`ringzero image`: images of disks, made, looked at, copied, checked (docs/disks.md).

Exit statuses: 0; 2 for what cannot be done; `check` ends with 1 for an image with errors, and with 3 for one that only
takes more space than it needs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ringzero.errors import InputError
from ringzero.machine.chain import FORMATS, Link, chain, format_by_name
from ringzero.machine.machine import core_errors
from ringzero.machine.spec import format_size, parse_size

EPILOG = """\\b
Examples:
  ringzero image create disk.qcow2 20G              a disk that takes space as it is written to
  ringzero image create work.qcow2 --backing base.qcow2
  ringzero image convert cloud.qcow2 disk.raw       another format, by the names
  ringzero image info disk.qcow2
  ringzero image check disk.qcow2 --repair
  ringzero image snapshot disk.qcow2 create clean   and: list, apply clean, delete clean
  ringzero image commit work.qcow2                  what work has goes into base
  ringzero image resize disk.qcow2 40G
"""

app = typer.Typer(
    help="Images of disks: raw files and qcow2.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Image = Annotated[Path, typer.Argument(metavar="FILE", help="The image.", show_default=False)]
Format = Annotated[
    str, typer.Option("--format", "-f", metavar="NAME", help="raw or qcow2; by itself, by the name.")
]
Backing = Annotated[
    Path | None,
    typer.Option(
        "--allow", metavar="PATH", help="A file or folder that may lie behind the image, besides its own."
    ),
]


def _links(image: Path, image_format: str, allow: Path | None) -> list[Link]:
    if not image.is_file():
        raise InputError(f"there is no image {image}")
    return chain(image, image_format, [] if allow is None else [allow])


def _qcow2(image: Path, image_format: str, allow: Path | None, what: str) -> list[Link]:
    links = _links(image, image_format, allow)
    if links[0][1] != "qcow2":
        raise InputError(f"{image} is a raw file, which has no {what}: convert it to qcow2")
    return links


def _size(text: str) -> int:
    size = parse_size(text, "size of a disk")
    if size <= 0 or size % 512:
        raise InputError(f"a disk of {size} bytes cannot be: give a multiple of 512")
    return size


def _free(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} is there already: remove it first, or name another file")


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show how far something is, on standard error if that is a terminal."""
    if not os.isatty(2):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@app.command()
def create(
    image: Image,
    size: Annotated[
        str, typer.Argument(metavar="[SIZE]", help="20G; by itself, that of what lies behind it.")
    ] = "",
    format: Format = "",
    backing: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What lies behind it: it is only read then.")
    ] = None,
    backing_format: Annotated[
        str, typer.Option(metavar="NAME", help="Its format; by itself, by its name.")
    ] = "",
) -> None:
    """Make an image: all zeroes, or what lies behind it."""
    from ringzero import _core

    image_format = format or format_by_name(image)
    _check_format(image_format)
    _free(image)
    if backing is None:
        if not size:
            raise InputError("how large shall the disk be? ringzero image create FILE 20G")
        with core_errors():
            if image_format == "qcow2":
                _core.image_create(os.fspath(image), _size(size))
            else:
                _make_raw(image, _size(size))
        return
    if image_format != "qcow2":
        raise InputError("only a qcow2 image can have another one behind it: name it FILE.qcow2")
    with core_errors():
        # Its own chain must be whole, wherever it is: the operator names it.
        links = chain(backing, backing_format)
        total = _size(size) if size else _disk_size(links)
        # Relative to the image, as everybody reads it.
        name = os.path.relpath(backing.resolve(), image.resolve().parent)
        _core.image_create(os.fspath(image), total, backing=(name, links[0][1]))


def _make_raw(image: Path, size: int) -> None:
    try:
        with image.open("xb") as file:
            file.truncate(size)
    except OSError as error:
        raise InputError(f"{image} cannot be made: {error.strerror}") from error


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise InputError(f"there is no format {name!r}: choose one of {', '.join(FORMATS)}")


def _disk_size(links: list[Link]) -> int:
    from ringzero import _core

    path, image_format = links[0]
    if image_format == "qcow2":
        return int(_core.image_info(path)["size"])
    return os.stat(path).st_size // 512 * 512


@app.command()
def info(
    image: Image,
    format: Format = "",
    allow: Backing = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what an image is, and the files that lie behind it."""
    from ringzero import _core

    with core_errors():
        links = _links(image, format, allow)
        rows: list[dict[str, Any]] = []
        for path, image_format in links:
            facts = os.stat(path)
            row: dict[str, Any] = {
                "file": path,
                "format": image_format,
                "size": _disk_size([(path, image_format)]),
                "on_disk": facts.st_blocks * 512,
            }
            if image_format == "qcow2":
                row |= _core.image_info(path)
            rows.append(row)
    if json:
        import json as encoder

        print(encoder.dumps(rows, indent=2))
        return
    for number, row in enumerate(rows):
        print(f"{'behind it: ' if number else ''}{row['file']}")
        print(f"  format    {row['format']}")
        print(f"  disk      {format_size(row['size'])} ({row['size']} bytes)")
        print(f"  takes     {format_size(row['on_disk'])}")
        if row.get("is_dirty"):
            print("  is in use, or was when its machine ended: checked when it is next opened")
        if row.get("is_corrupt"):
            print("  is marked as corrupt: ringzero image check --repair")
        for _, name, date, _ in row.get("snapshots", ()):
            print(f"  snapshot  {name}, {datetime.fromtimestamp(date, UTC):%Y-%m-%d %H:%M} UTC")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="An image.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TO", help="A new file.", show_default=False)],
    format: Annotated[str, typer.Option("--from", metavar="NAME", help="The format of FROM.")] = "",
    to: Annotated[str, typer.Option("--to", metavar="NAME", help="The format of TO.")] = "",
    allow: Backing = None,
) -> None:
    """Copy a disk, with all that lies behind it, into one new file; zeroes take no space there."""
    from ringzero import _core

    target_format = to or format_by_name(target)
    _check_format(target_format)
    _free(target)
    with core_errors():
        links = _links(source, format, allow)
        with _bar(f"{source.name} to {target.name}") as progress:
            _core.image_convert(links, os.fspath(target), target_format, progress=progress)


@app.command()
def commit(image: Image, allow: Backing = None) -> None:
    """Put what an image has into what lies behind it, and empty the image."""
    from ringzero import _core

    with core_errors():
        links = _qcow2(image, "", allow, "file behind it")
        if len(links) < 2:
            raise InputError(f"{image} has nothing behind it")
        with _bar(f"{image.name} into {os.path.basename(links[1][0])}") as progress:
            _core.image_commit(links, progress=progress)


@app.command()
def resize(
    image: Image,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="40G.", show_default=False)],
    format: Format = "",
    allow: Backing = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Make it smaller: what lies beyond is lost.")
    ] = False,
) -> None:
    """Make a disk larger, or smaller. The file systems on it stay as large as they are."""
    from ringzero import _core

    with core_errors():
        links = _links(image, format, allow)
        new, old = _size(size), _disk_size(links)
        if new < old and not shrink:
            raise InputError(
                f"{image} has {format_size(old)}: what lies beyond {format_size(new)} would be lost (--shrink does it)"
            )
        if links[0][1] == "qcow2":
            _core.image_resize(links, new)
        else:
            os.truncate(image, new)


@app.command()
def snapshot(
    image: Image,
    action: Annotated[str, typer.Argument(metavar="ACTION", help="create, list, apply or delete.")] = "list",
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Of the snapshot.")] = "",
    allow: Backing = None,
) -> None:
    """Keep a disk as it is, inside its image; make it what it was; show what is kept."""
    from ringzero import _core

    with core_errors():
        links = _qcow2(image, "", allow, "snapshots")
        if action == "list":
            for _, title, date, size in _core.image_info(links[0][0])["snapshots"]:
                print(f"{title}\t{datetime.fromtimestamp(date, UTC):%Y-%m-%d %H:%M:%S}\t{size}")
            return
        if action not in ("create", "apply", "delete"):
            raise InputError(f"there is no action {action!r}: choose one of create, list, apply, delete")
        if not name:
            raise InputError(f"which snapshot? ringzero image snapshot {image} {action} NAME")
        _core.image_snapshot(links, action, name)


@app.command()
def check(
    image: Image,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make the counts of clusters anew from what is used.")
    ] = False,
) -> None:
    """Look whether the tables of a qcow2 image agree."""
    from ringzero import _core

    with core_errors():
        if not image.is_file():
            raise InputError(f"there is no image {image}")
        report = _core.image_check(os.fspath(image), repair=repair)
    for sentence in report["sentences"]:
        print(sentence, file=sys.stderr)
    print(f"{report['used']} clusters are used, {report['leaks']} lost, {report['errors']} errors")
    if repair and (report["errors"] or report["leaks"]):
        print("repaired")
        return
    if report["errors"]:
        raise typer.Exit(1)
    if report["leaks"]:
        raise typer.Exit(3)
