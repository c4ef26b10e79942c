"""A disk as an image: an existing system, such as a distribution's cloud image, with the kernel that is on it.

A PC's firmware would start the disk's boot loader; ringzero has none, and starts the kernel itself. To find it,
somebody has to read partitions and file systems that whoever made the image wrote, and that is not this process: a
guest does it, which has the disk with an overlay that is thrown away, and gives back kernel and initramfs on another
disk. What that guest says is not trusted more than the image: names go back to it alone, and sizes are bounded. It
takes some seconds; what it found is kept in the cache until a file of the disk changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ringzero import images
from ringzero.errors import GuestError, ImageError, InputError
from ringzero.images.bootloader import Entry, entry_of_grub, entry_of_kernels, newest_entry
from ringzero.images.cache import ImageCache, cache_root
from ringzero.images.debian_full import with_agent
from ringzero.machine.chain import format_by_name
from ringzero.machine.disk import Disk

__all__ = ["disk_image"]

QCOW2_MAGIC = b"QFI\xfb"
# Not the image's own words: what stands for the console in its configuration is for other machines.
APPEND = images.DEBIAN_APPEND
MOST_KEPT = 16
"""Disks whose kernels are in the cache: those used last."""
MOST_BYTES = 512 << 20
"""Of a kernel or an initramfs."""
MOST_TEXT = 1 << 20
PATIENCE = 120.0
"""Seconds for any of the guest's steps."""
STEP = 1 << 20
GRUB = ("boot/grub/grub.cfg", "boot/grub2/grub.cfg", "grub/grub.cfg", "grub2/grub.cfg")
ENTRIES = ("boot/loader/entries", "loader/entries")
KERNELS = ("boot", "")

# Every partition, and the disk itself when it has none. One that was not unmounted is put right, in the overlay.
MOUNT = """
for place in /sys/class/block/vda /sys/class/block/vda[0-9]*; do
    [ -e "$place" ] || continue
    part=${place##*/}
    mkdir -p "/mnt/$part"
    mount -t ext4 -o ro "/dev/$part" "/mnt/$part" 2>/dev/null && echo "$part"
done
true
"""
Look = Callable[..., bytes]
"""Runs a program in the guest and returns its output, at most so much of it."""


def disk_image(text: str, persist: str | os.PathLike[str] | None = None) -> images.Image:
    """Return the system that is on the disk "FILE" or "FILE,format=FORMAT", as it is with the overlay `persist`.

    Raises InputError for a file that cannot be used, and ImageError when no kernel is found on it.
    """
    disk = _named(text)
    seen = disk
    if persist is not None and os.path.exists(persist):
        seen = Disk(Path(persist), format="qcow2", backing=disk.path.absolute())
    mark = _mark(seen)
    cache = ImageCache(cache_root() / "disks")
    found = cache.find(mark)
    if found is None:
        with cache.locked():
            found = cache.find(mark)
            if found is None:
                with cache.writing(mark, made_from := {"disk": os.path.abspath(disk.path)}) as directory:
                    made_from |= _look_into(seen, directory)
                found = cache.find(mark)
                _forget_old(cache)
    manifest = cache.manifest(mark)
    if found is None or manifest is None:
        raise InputError(f"the files in {cache.root / mark} changed while they were written: try again")
    facts = manifest.made_from
    initrd, has_agent = found.get("initrd"), facts["agent"] == "yes"
    if initrd is not None and has_agent:
        initrd = with_agent(initrd, manifest.files["initrd"].sha256)
    with contextlib.suppress(OSError):
        os.utime(cache.root / mark)
    return images.Image(
        str(disk.path),
        found["vmlinuz"],
        initrd,
        f"{facts['words']} {APPEND}".strip(),
        agent=has_agent and initrd is not None,
        disk=disk.path,
        disk_format=disk.format or format_by_name(disk.path),
        has_cloud_init=True,
    )


def _named(text: str) -> Disk:
    disk = Disk.read(text)
    if replace(disk, format="") != Disk(disk.path):
        raise InputError(
            f"the image {text} has options of a disk: only format=qcow2 or format=raw can be said"
        )
    try:
        with disk.path.open("rb") as file:
            begins = file.read(len(QCOW2_MAGIC))
    except OSError as error:
        raise InputError(f"the image {disk.path} cannot be read: {error.strerror}") from error
    if begins == QCOW2_MAGIC and not disk.format and not disk.path.name.endswith(".qcow2"):
        # Not taken for one by itself: what is in a raw file may be a guest's.
        raise InputError(
            f"the image {disk.path} looks like a qcow2: if it is, write {disk.path},format=qcow2"
        )
    return disk


def _mark(disk: Disk) -> str:
    """Return what tells the files of a disk from others, and from what they were before."""
    digest = hashlib.blake2b(digest_size=16)
    for path, image_format in disk.files():
        facts = os.stat(path)
        digest.update(
            f"{os.path.realpath(path)}\0{image_format}\0{facts.st_ino}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode()
        )
    return digest.hexdigest()


def _forget_old(cache: ImageCache) -> None:
    places = sorted(cache.names(), key=lambda name: (cache.root / name).stat().st_mtime)
    for name in places[:-MOST_KEPT]:
        cache.remove(name)


def _look_into(disk: Disk, into: Path) -> dict[str, str]:
    """Have a guest find the kernel of a disk and copy it, with its initramfs, to the folder `into`."""
    from ringzero.machine.machine import Machine

    image = images.find("debian") or images.pull("debian")
    with tempfile.NamedTemporaryFile(dir=into, prefix=".out") as out:
        out.truncate(4 * MOST_BYTES)
        disks = [replace(disk, temporary=True), Disk(Path(out.name), format="raw")]
        with Machine(image, memory="256M", disks=disks, shell=False) as vm:

            def look(*command: str, most: int = MOST_TEXT) -> bytes:
                result = vm.run(list(command), timeout=PATIENCE)
                return result.stdout[:most] if result.returncode == 0 else b""

            facts, files = _found(look, str(disk.path))
            at = 0
            for name, paths in files.items():
                with (into / name).open("wb") as file:
                    for path in paths:
                        # Archives that follow each other begin at multiples of four bytes, as GRUB has it.
                        file.write(bytes(-os.fstat(file.fileno()).st_size % 4))
                        file.flush()
                        at = _copy(look, path, out.fileno(), at, file.fileno())
    return facts


def _found(look: Look, name: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return what is known of the system, and the guest's paths of its files."""
    parts = look("sh", "-c", MOUNT).decode("ascii", "replace").split()
    if not parts:
        raise ImageError(f"there is no ext4 file system on the disk {name}, and no other can be read")
    roots = [part for part in parts if look("ls", f"/mnt/{part}/etc/os-release", f"/mnt/{part}/sbin")]
    for part in parts:
        entry = _entry_on(look, f"/mnt/{part}")
        if entry is None:
            continue
        paths = [_there(look, parts, part, path) for path in (entry.kernel, *entry.initrds)]
        if None in paths:
            continue
        words = entry.command_line
        if not entry.has_root:
            # The root disk is the first of the machine's.
            words = f"root=/dev/{roots[0] if roots else part} ro {words}".strip()
        tools = [look("ls", f"/mnt/{root}/usr/share/initramfs-tools") for root in roots]
        facts = {"words": words, "agent": "yes" if any(tools) else "no"}
        kernel, *initrds = (path for path in paths if path is not None)
        return facts, {"vmlinuz": [kernel]} | ({"initrd": initrds} if initrds else {})
    raise ImageError(
        f"there is no kernel on the disk {name}, or its boot loader is not known: say --kernel, --initrd and --append"
    )


def _entry_on(look: Look, root: str) -> Entry | None:
    """Return what would be started from a partition."""
    for path in GRUB:
        text = look("head", "-c", str(MOST_TEXT), f"{root}/{path}").decode("utf-8", "replace")
        if text and (entry := entry_of_grub(text)) is not None:
            return entry
    for folder in ENTRIES:
        names = look("ls", f"{root}/{folder}").decode("utf-8", "replace").splitlines()
        files = [f"{root}/{folder}/{one}" for one in names if one.endswith(".conf")][:64]
        texts = [look("head", "-c", str(MOST_TEXT), one).decode("utf-8", "replace") for one in files]
        if (entry := newest_entry(texts)) is not None:
            return entry
    for folder in KERNELS:
        names = look("ls", f"{root}/{folder}").decode("utf-8", "replace").splitlines()
        if (entry := entry_of_kernels(f"/{folder}".rstrip("/"), names)) is not None:
            return entry
    return None


def _there(look: Look, parts: list[str], first: str, path: str) -> str | None:
    """Return where the guest has a file: on the partition whose configuration names it, or on another."""
    for part in [first, *(part for part in parts if part != first)]:
        for place in (f"/mnt/{part}{path}", f"/mnt/{part}/boot{path}"):
            if look("stat", "-L", "-c", "%s", place):
                return place
    return None


def _copy(look: Look, path: str, disk: int, at: int, into: int) -> int:
    """Append a file of the guest's; it comes over a disk, from byte `at` on. Returns where the next one may be."""
    size = int(look("stat", "-L", "-c", "%s", path) or 0)
    if not 0 < size <= MOST_BYTES or at + size > 4 * MOST_BYTES:
        raise ImageError(f"{path.partition('/mnt/')[2]} of the disk has {size} bytes, which no kernel has")
    copy = f'dd if="$1" of=/dev/vdb bs={STEP} seek={at // STEP} conv=notrunc,fsync && echo done'
    if not look("sh", "-c", copy, "-", path):
        raise GuestError(f"the guest could not copy {path}")
    left, place = size, at
    while left:
        data = os.pread(disk, min(left, STEP), place)
        if not data:
            raise ImageError("the guest gave fewer bytes than it said")
        os.write(into, data)
        left, place = left - len(data), place + len(data)
    return at + -(-size // STEP) * STEP
