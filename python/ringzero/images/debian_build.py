"""How the Debian image is made: the cloud kernel as Debian ships it, an initramfs of busybox and our agent."""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from ringzero.errors import FetchError
from ringzero.images.apt import Apt, Progress, no_progress
from ringzero.images.cache import ImageCache
from ringzero.images.debian import agent_mark, cache_name, find_debian
from ringzero.images.initramfs import agent_path, build_initramfs, busybox_applets, collect_modules

__all__ = ["host_kernel", "pull_debian"]

# Where else on the machine's mirrors a kernel series may be found; suites that a mirror does not have are
# passed over.
SUITES = {
    "6.1": ("bookworm", "bookworm-security"),
    "6.12": ("bookworm-backports", "trixie", "trixie-security"),
}


def pull_debian(
    kernel: str,
    cache: ImageCache,
    progress: Progress = no_progress,
    *,
    force: bool = False,
    waiting: AbstractContextManager[None] | None = None,
) -> dict[str, Path]:
    """Return the files of the image, fetched and built when the cache has no whole copy (or `force` asks).

    Raises FetchError, with what to do without a network, when it cannot be had.
    """
    name = cache_name(kernel)
    with cache.locked(waiting=waiting):
        files = None if force else find_debian(kernel, cache, thorough=True)
        if files is not None:
            return files
        try:
            _build(name, kernel, cache, progress)
        except FetchError as error:
            raise FetchError(f"{error}. {_without_network()}") from error
        except OSError as error:
            raise FetchError(
                f"the image could not be written to {cache.root}: {error.strerror or error}"
            ) from error
        built = find_debian(kernel, cache)
    if built is None:
        raise FetchError(f"the image in {cache.root / name} changed while it was written: pull it again")
    return built


def host_kernel() -> Path | None:
    """Return the newest kernel in the host's own /boot that this user may read."""
    found = []
    for path in Path("/boot").glob("vmlinuz-*"):
        try:
            with path.open("rb"):
                found.append((path.stat().st_mtime, path))
        except OSError:
            continue
    return max(found)[1] if found else None


def _build(name: str, kernel: str, cache: ImageCache, progress: Progress) -> None:
    # ABI numbers: 6.1.0-56, 6.12.117+deb12, 6.12.43+deb13; "-unsigned", "-dbg" and "-rt" variants do not
    # match.
    pattern = re.compile(rf"linux-image-{re.escape(kernel)}\.\d+[-+~.\w]*?-cloud-amd64")
    agent = agent_path()
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache.root) as scratch_name:
        scratch = Path(scratch_name)
        apt = Apt(scratch, progress)
        wanted = {f"Debian cloud kernel {kernel}": pattern, "busybox-static": re.compile("busybox-static")}
        fetched = apt.fetch(wanted, SUITES[kernel], scratch / "debs")
        kernel_tree, busybox_tree = (scratch / "tree" / package.name for package, _ in fetched)
        for package, deb in fetched:
            apt.unpack(deb, scratch / "tree" / package.name)
        images = sorted(kernel_tree.glob("boot/vmlinuz-*"))
        busyboxes = [path for path in busybox_tree.glob("**/bin/busybox") if path.is_file()]
        if not images or not busyboxes:
            raise FetchError("the fetched packages do not hold a kernel and a busybox")
        progress("building the initramfs", 0, None)
        modules = collect_modules(kernel_tree)
        initramfs = build_initramfs(
            busyboxes[0].read_bytes(), busybox_applets(busyboxes[0]), modules, agent.read_bytes()
        )
        made_from = {package.name: package.version for package, _ in fetched}
        made_from |= {"agent": agent_mark(), "release": images[0].name.removeprefix("vmlinuz-")}
        with cache.writing(name, made_from) as directory:
            shutil.copyfile(images[0], directory / "vmlinuz")
            (directory / "initrd").write_bytes(initramfs)


def _without_network() -> str:
    own = host_kernel()
    example = f"ringzero run --kernel {own if own is not None else 'VMLINUZ'}"
    where = " (this host's own)" if own is not None else ""
    return (
        f"To boot a kernel that you have{where}: {example}; "
        "to see a guest that needs no download: ringzero run hello"
    )
