"""How the image `debian-full` is made: Debian's packages, installed by Debian's dpkg in a guest of ours.

A package's scripts want to be root, to chroot and to mount; a guest may do all of that in the process of any user, so
neither root nor user namespaces nor mmdebstrap are needed, and the image is the same on every host. mke2fs(8) makes the
file systems, as files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ringzero.errors import FetchError, RingzeroError
from ringzero.images import Image
from ringzero.images.apt import Apt, Progress, System, no_progress
from ringzero.images.cache import ImageCache
from ringzero.images.debian_full import NAME, RECIPE, find_full, recipe_mark

__all__ = ["PACKAGES", "ext4_tool", "make_ext4", "pull_full"]

PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "zstd", "kmod", "udev", "e2fsprogs"),
    *("systemd", "systemd-sysv", "systemd-resolved", "dbus", "login", "passwd", "procps", "util-linux"),
    *("openssh-server", "iproute2", "iputils-ping", "apt", "debian-archive-keyring", "ca-certificates"),
    *("less", "nano", "sudo"),
)
"""What is installed beside the essential packages; each brings what it depends on, and nothing that it recommends."""

DISK_SIZE = 2 << 30
"""Bytes of the root disk: a file with holes, of which about a quarter is there."""
INSTALL_TIMEOUT = 1800.0
"""Seconds: a minute or two on a machine with nothing else to do."""

RunGuest = Callable[[Image, Sequence[Path], Sequence[str], Callable[[bytes], None], float], int | None]
"""Boots an image with these raw disks, runs a command there and powers off; its output goes to the function.

Returns the command's status, or None when the time (seconds) was over first. See `ringzero.machine.installer`.
"""


def pull_full(
    cache: ImageCache,
    installer: Image,
    run_guest: RunGuest,
    progress: Progress = no_progress,
    *,
    force: bool = False,
    waiting: AbstractContextManager[None] | None = None,
) -> dict[str, Path]:
    """Return the files of the image, fetched and built when the cache has no whole copy (or `force` asks).

    `installer` is an image with our agent and busybox, in which `run_guest` installs the packages. Raises
    FetchError when the image cannot be had.
    """
    with cache.locked(waiting=waiting):
        files = None if force else find_full(cache, thorough=True)
        if files is not None:
            return files
        try:
            _build(cache, installer, run_guest, progress)
        except OSError as error:
            raise FetchError(
                f"the image could not be written to {cache.root}: {error.strerror or error}"
            ) from error
        built = find_full(cache)
    if built is None:
        raise FetchError(f"the image in {cache.root / NAME} changed while it was written: pull it again")
    return built


def _build(cache: ImageCache, installer: Image, run_guest: RunGuest, progress: Progress) -> None:
    for tool in ("mke2fs", "debugfs"):
        ext4_tool(tool)  # before minutes of work that would be in vain
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache.root) as scratch_name:
        scratch = Path(scratch_name)
        apt = Apt(scratch, progress)
        system = apt.fetch_system(PACKAGES, scratch / "debs")
        kernels = [
            deb
            for deb in system.others
            if deb.name.startswith("linux-image-") and "-cloud-amd64_" in deb.name
        ]
        kernel_deb = max(kernels, key=lambda deb: deb.stat().st_size, default=None)
        if kernel_deb is None:
            raise FetchError("the apt sources of this machine have no Debian cloud kernel")
        apt.unpack(kernel_deb, scratch / "kernel")
        vmlinuz = next(iter(sorted((scratch / "kernel").glob("boot/vmlinuz-*"))), None)
        if vmlinuz is None:
            raise FetchError(f"{kernel_deb.name} does not hold a kernel")
        release = vmlinuz.name.removeprefix("vmlinuz-")
        pack = scratch / "pack.ext4"
        _stage(system, scratch / "pack")
        size = sum(path.stat().st_size for path in (scratch / "pack").rglob("*"))
        make_ext4(pack, size + size // 8 + (32 << 20), content=scratch / "pack", label="pack")
        made_from = {
            "recipe": recipe_mark(),
            "release": release,
            "packages": str(len(system.essential + system.others)),
        }
        with cache.writing(NAME, made_from) as directory:
            make_ext4(directory / "disk.raw", DISK_SIZE, label="ringzero")
            _install(
                installer,
                run_guest,
                directory / "disk.raw",
                pack,
                system,
                cache.root / f"{NAME}.log",
                progress,
            )
            shutil.copyfile(vmlinuz, directory / "vmlinuz")
            _dump(directory / "disk.raw", f"/boot/initrd.img-{release}", directory / "initrd")


def _stage(system: System, into: Path) -> None:
    """Lay out what install.sh expects on its second disk."""
    for group, debs in (("essential", system.essential), ("others", system.others)):
        (into / "debs" / group).mkdir(parents=True)
        for deb in debs:
            os.link(deb, into / "debs" / group / deb.name)
    shutil.copytree(RECIPE / "root", into / "root")
    for name in ("install.sh", "finish.sh"):
        shutil.copyfile(RECIPE / name, into / name)
    for path in into.rglob("*"):
        if path.is_file() and "debs" not in path.parts:
            # However the package came onto this machine: what begins with #! is a program.
            path.chmod(0o755 if path.read_bytes()[:2] == b"#!" else 0o644)
        elif path.is_dir():
            path.chmod(0o755)


def _install(
    installer: Image,
    run_guest: RunGuest,
    disk: Path,
    pack: Path,
    system: System,
    log: Path,
    progress: Progress,
) -> None:
    """Run install.sh in a guest, with the two disks, and tell of dpkg's steps as they pass."""
    total = sum(deb.stat().st_size for deb in (*system.essential, *system.others))
    steps = 2 * len(system.essential + system.others)  # each is unpacked, and each configured
    passed = 0
    label = "installing Debian, in a guest"
    script = "mkdir /mnt/pack && mount -t ext4 -o ro /dev/vdb /mnt/pack && sh /mnt/pack/install.sh"
    with log.open("wb") as kept:

        def read(data: bytes) -> None:
            nonlocal passed
            kept.write(data)
            kept.flush()
            passed += data.count(b"Unpacking ") + data.count(b"Setting up ")
            progress(label, total * min(passed, steps) // steps, total)

        progress(label, 0, total)
        try:
            status = run_guest(installer, [disk, pack], ["sh", "-c", script], read, INSTALL_TIMEOUT)
        except FetchError:
            raise
        except RingzeroError as error:
            raise FetchError(f"the guest that installs the packages failed: {error}") from error
    if status != 0:
        why = "took too long" if status is None else f"ended with status {status}"
        raise FetchError(f"the installation of the packages {why}: {log} has what was said")
    log.unlink()


def make_ext4(path: Path, size: int, *, label: str, content: Path | None = None) -> None:
    """Make a file of `size` bytes with an ext4 named `label` in it, and the files below `content` in that."""
    size = -(-size // 4096) * 4096
    with path.open("wb") as file:
        file.truncate(size)
    # The tables are holes in the file, so zero already: the guest need not write them while it runs.
    options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    command = [ext4_tool("mke2fs"), "-q", "-F", "-t", "ext4", "-L", label, "-E", options]
    command += ["-d", str(content)] if content is not None else []
    result = subprocess.run([*command, str(path)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        raise FetchError(
            f"mke2fs could not make {path}: {' '.join(result.stderr.split()) or 'no reason was given'}"
        )


def _dump(disk: Path, name: str, into: Path) -> None:
    """Copy a file out of an ext4."""
    command = [ext4_tool("debugfs"), "-R", f"dump {name} {into}", str(disk)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if not into.is_file() or into.stat().st_size == 0:
        raise FetchError(f"the installed system has no {name}: {' '.join(result.stderr.split())}")


def ext4_tool(name: str) -> str:
    """Return the path of a program of e2fsprogs, which many users do not have on their PATH. Raises FetchError."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise FetchError(
            f"a root disk is made with {name}, which is not on this machine: apt install e2fsprogs"
        )
    return found
