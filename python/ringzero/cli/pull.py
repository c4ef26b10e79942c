"""`ringzero pull`: fetch and build an image, with a progress bar."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ringzero.images import Image

EPILOG = """\
\b
Examples:
  ringzero pull debian                  the default kernel (6.1)
  ringzero pull debian --kernel 6.12
  ringzero pull debian-full             a whole Debian on a root disk; takes minutes
  ringzero pull debian --force          fetch it again, for a newer kernel of the same series
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
def pull(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="debian, debian:6.12, debian-full.")],
    kernel: Annotated[str | None, typer.Option(metavar="SERIES", help="Kernel series: 6.1 or 6.12.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch it even if it is here, whole.")] = False,
) -> None:
    """Fetch an image into the cache, through this machine's own apt, without root.

    Says nothing, and needs no network, when the image is there and whole.
    """
    from ringzero import images
    from ringzero.machine.installer import run_guest

    if force or images.find(image, kernel) is None:
        fetch(image, kernel, force=force)
    else:
        images.pull(image, kernel, run_guest=run_guest)  # every sum is checked; only damage makes it fetch


def fetch(name: str, kernel: str | None = None, *, force: bool = False) -> Image:
    """Pull an image with a progress bar on standard error (a line a step when that is not a terminal)."""
    from ringzero import images
    from ringzero.machine.installer import run_guest

    if not os.isatty(2):
        said: set[str] = set()

        def say(step: str, done: int, total: int | None) -> None:
            if step not in said:
                said.add(step)
                with contextlib.suppress(OSError):
                    os.write(2, f"ringzero: {step}\n".encode())

        return images.pull(name, kernel, say, force=force, run_guest=run_guest)

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, int] = {}

        def report(step: str, done: int, total: int | None) -> None:
            for other, task in tasks.items():
                if other != step:
                    progress.update(progress.task_ids[task], visible=False)
            if step not in tasks:
                progress.add_task(step, total=total)
                tasks[step] = len(tasks)
            progress.update(progress.task_ids[tasks[step]], completed=done, total=total, visible=True)

        @contextlib.contextmanager
        def waiting() -> Iterator[None]:
            report("another pull is under way: waiting for it", 0, None)
            yield

        image = images.pull(name, kernel, report, force=force, waiting=waiting(), run_guest=run_guest)
    console.print(f"[green]{image.name}[/green] is in {image.kernel.parent}")
    return image
