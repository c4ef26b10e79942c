"""`ringzero images`: which images there are, and which of them are on this machine."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def images() -> None:
    """List the images: what can be run, and what of it is on this machine already."""
    from rich.console import Console
    from rich.table import Table

    from ringzero.images import IMAGES, find
    from ringzero.images.cache import ImageCache
    from ringzero.images.debian import DEFAULT_KERNEL, KERNELS, cache_name

    cache = ImageCache()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("IMAGE", "HERE", "KERNEL", "WHAT IT IS"):
        table.add_column(heading, overflow="fold")
    table.add_row("hello", "yes", "", IMAGES["hello"])
    for series in KERNELS:
        manifest = cache.manifest(cache_name(series))
        here = find(f"debian:{series}") is not None
        release = manifest.made_from.get("release", "") if manifest is not None and here else ""
        words = "Debian's cloud kernel, busybox and a shell"
        if series == DEFAULT_KERNEL:
            words += "; 'debian' for short"
        table.add_row(f"debian:{series}", "yes" if here else "no", release, words)
    full = find("debian-full")
    manifest = cache.manifest("debian-full")
    release = manifest.made_from.get("release", "") if manifest is not None and full is not None else ""
    table.add_row("debian-full", "yes" if full is not None else "no", release, IMAGES["debian-full"])
    console = Console()
    console.print(table)
    console.print(f"\nringzero pull debian fetches one into {cache.root}", highlight=False, soft_wrap=True)
