"""Guest images: where they come from, and what a machine needs to start one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringzero.errors import InputError, InternalError

if TYPE_CHECKING:
    from ringzero.images.apt import Progress
    from ringzero.images.debian_full_build import RunGuest

__all__ = ["DEBIAN_APPEND", "IMAGES", "Image", "find", "is_disk", "pull", "resolve"]

IMAGES = {
    "debian": "Debian's cloud kernel (6.1; debian:6.12 for 6.12), busybox and a shell",
    "debian-full": "a whole Debian with systemd, on a disk of its own",
    "hello": "a guest of our own, inside the package: says what machine it found itself on",
}
"""Every image by name, with a line about it."""


@dataclass(frozen=True)
class Image:
    """What a machine starts from."""

    name: str
    kernel: Path
    initrd: Path | None = None
    append: str = ""
    """Words for the kernel command line that the image itself needs."""
    agent: bool = False
    """Whether the image holds our agent, which runs commands for the host."""
    disk: Path | None = None
    """The root disk, the first of the machine's. Runs have overlays: this file stays as it is."""
    disk_format: str = "raw"
    has_cloud_init: bool = False
    """Whether it may be expected to have cloud-init, which takes other user-data than scripts."""


# `panic=-1`: a panic restarts the guest at once, and the monitor tells the operator.
# `ttyS0,115200`: at the default of 9600 baud the kernel would wait for bytes to leave a wire that is not there.
# `cryptomgr.notests`: the kernel's tests of its own ciphers are two thirds of a boot (6.1.192: 1339 million
# instructions with them, 464 million without).
DEBIAN_APPEND = "console=ttyS0,115200 panic=-1 8250.nr_uarts=4 cryptomgr.notests"
# The disk has one file system and no partitions. `rw` spares a remount, for the initramfs has checked it.
FULL_APPEND = f"{DEBIAN_APPEND} root=/dev/vda rw"


def is_disk(name: str) -> bool:
    """Say whether an image is named as a file: a disk with a system on it (ringzero.machine.disk_image)."""
    file = name.partition(",format=")[0]
    return "/" in file or file.endswith((".qcow2", ".raw", ".img"))


def resolve(name: str, kernel: str | None = None) -> tuple[str, str | None]:
    """Split NAME or NAME:KERNEL. Raises InputError for an unknown image, with what there is."""
    base, _, series = name.partition(":")
    if base not in IMAGES:
        from difflib import get_close_matches

        close = get_close_matches(base, IMAGES, n=1, cutoff=0.5)
        meant = f", did you mean {close[0]!r}?" if close else ":"
        raise InputError(f"there is no image {name!r}{meant} there is {', '.join(IMAGES)}")
    if series and base != "debian":
        raise InputError(f"the image {base!r} has no versions: write {base!r} alone")
    return base, kernel or series or None


def find(name: str, kernel: str | None = None) -> Image | None:
    """Return an image that is on this machine, whole; None when it must be pulled first."""
    base, series = resolve(name, kernel)
    if base == "hello":
        return _hello()
    from ringzero.images.cache import ImageCache

    if base == "debian-full":
        from ringzero.images.debian_full import find_full

        files = find_full(ImageCache())
        return _full(files) if files is not None else None
    from ringzero.images.debian import DEFAULT_KERNEL, find_debian

    series = series or DEFAULT_KERNEL
    files = find_debian(series, ImageCache())
    return _debian(series, files) if files is not None else None


def pull(
    name: str,
    kernel: str | None = None,
    progress: Progress | None = None,
    *,
    force: bool = False,
    waiting: AbstractContextManager[None] | None = None,
    run_guest: RunGuest | None = None,
) -> Image:
    """Return an image, fetched and built first when this machine has no whole copy of it.

    `progress` is told of the steps; `waiting` is entered while another pull holds the cache. `run_guest` is what makes
    debian-full (ringzero.machine.installer).
    """
    base, series = resolve(name, kernel)
    if base == "hello":
        return _hello()
    from ringzero.images.apt import no_progress
    from ringzero.images.cache import ImageCache

    if base == "debian-full":
        from ringzero.images.debian_full_build import pull_full

        if run_guest is None:
            raise InputError("debian-full is installed in a guest: make it with `ringzero pull debian-full`")
        installer = find("debian") or pull("debian", None, progress, waiting=waiting)
        return _full(
            pull_full(
                ImageCache(), installer, run_guest, progress or no_progress, force=force, waiting=waiting
            )
        )
    from ringzero.images.debian import DEFAULT_KERNEL
    from ringzero.images.debian_build import pull_debian

    series = series or DEFAULT_KERNEL
    files = pull_debian(series, ImageCache(), progress or no_progress, force=force, waiting=waiting)
    return _debian(series, files)


def _debian(series: str, files: dict[str, Path]) -> Image:
    return Image(f"debian:{series}", files["vmlinuz"], files["initrd"], DEBIAN_APPEND, agent=True)


def _full(files: dict[str, Path]) -> Image:
    return Image(
        "debian-full", files["vmlinuz"], files["initrd"], FULL_APPEND, agent=True, disk=files["disk.raw"]
    )


def _hello() -> Image:
    path = Path(__file__).parent / "builtin" / "hello.elf"
    if not path.is_file():
        raise InternalError(
            f"the guest 'hello' is missing from the package ({path}): build it with guests/build.py"
        )
    return Image("hello", path)
