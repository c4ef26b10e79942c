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
    from ringzero.images.debian import KERNELS

    cache = ImageCache()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("IMAGE", "HERE", "MADE FROM", "WHAT IT IS"):
        table.add_column(heading, overflow="fold")
    table.add_row("hello", "built in", "ringzero", IMAGES["hello"])
    for series in KERNELS:
        name = f"debian:{series}"
        here = find(name) is not None
        manifest = cache.manifest(f"debian-{series}")
        made = (
            ", ".join(f"{k} {v}" for k, v in manifest.made_from.items() if "-" in k)
            if manifest and here
            else ""
        )
        words = "the default of 'debian'" if series == KERNELS[0] else "Debian's cloud kernel and busybox"
        table.add_row(name, "yes" if here else f"no: ringzero pull {name}", made, words)
    console = Console()
    console.print(table)
    console.print(f"cache: {cache.root}", highlight=False)
