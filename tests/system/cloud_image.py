"""A cloud image for the tests, where none can be had: as Debian's own are, made from Debian's packages.

A disk with a GPT whose partitions have Debian's numbers (1 root, 14 BIOS boot, 15 EFI), an ext4 root with cloud-init,
and the grub.cfg that update-grub(8) writes there. It begins as a copy of debian-full's root disk; nothing of ours is
left on it.
"""

from __future__ import annotations

import os
import struct
import tempfile
import uuid
import zlib
from pathlib import Path

from ringzero import _core
from ringzero.images import Image
from ringzero.images.apt import Apt
from ringzero.images.cache import ImageCache, cache_root
from ringzero.images.debian_full_build import PACKAGES, make_ext4
from ringzero.machine.installer import run_guest

NAME = "cloud"
SECTOR, MIB = 512, 1 << 20
# Guest and host agree about them: UEFI 2.10, section 5.3 "GUID Partition Table (GPT) Disk Layout".
LINUX_ROOT = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
BIOS_BOOT = uuid.UUID("21686148-6449-6e6f-744e-656564454649")
EFI_SYSTEM = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
ENTRIES, ENTRY_SIZE = 128, 128
ROOT_START = 128 * MIB
MORE = ("cloud-init", "python3", "grub2-common", "grub-pc-bin")

INSTALL = r"""set -eu
target=/mnt/target pack=/mnt/pack
mkdir -p $target
mount -t ext4 -o noatime,nobarrier /dev/vda1 $target
rm -rf $target/usr/lib/ringzero $target/etc/systemd/system/ringzero-* $target/etc/systemd/system/ssh-host-keys.service \
    $target/etc/systemd/system/*/ringzero-* $target/etc/systemd/system/*/ssh-host-keys.service \
    $target/etc/systemd/network/80-dhcp.network
mkdir -p $target/mnt/pack $target/dev/pts
mount -t devtmpfs devtmpfs $target/dev
mount -t devpts devpts $target/dev/pts
mount -t proc proc $target/proc
mount -t sysfs sysfs $target/sys
mount -t tmpfs tmpfs $target/run
mount -o bind $pack $target/mnt/pack
printf '#!/bin/sh\nexit 101\n' > $target/usr/sbin/policy-rc.d
chmod 755 $target/usr/sbin/policy-rc.d
inside() {
    chroot $target /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true "$@"
}
inside sh -c "dpkg --force-depends --force-confold --force-unsafe-io --unpack /mnt/pack/debs/*.deb"
inside dpkg --force-confold --force-unsafe-io --configure --pending
sed -i 's/^root:[^:]*:/root:*:/' $target/etc/shadow
sed -i "s/^LABEL=[^ ]*/UUID=$(inside blkid -s UUID -o value /dev/vda1)/" $target/etc/fstab
: > $target/etc/machine-id
echo localhost > $target/etc/hostname
cat > $target/etc/default/grub <<END
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0"
END
mkdir -p $target/boot/grub
inside update-grub 2>&1
# As on the real ones; links to disks by their names are udev's to make, and it does not run here.
sed -i "s:root=/dev/vda1:root=PARTUUID=$(inside blkid -s PARTUUID -o value /dev/vda1):" $target/boot/grub/grub.cfg
rm -f $target/usr/sbin/policy-rc.d
# There are no locales, which take long to make.
echo 'locale: false' > $target/etc/cloud/cloud.cfg.d/10_no_locale.cfg
rm -rf $target/var/lib/cloud $target/etc/ssh/ssh_host_*
for name in mnt/pack run sys proc dev/pts dev; do umount $target/$name; done
rmdir $target/mnt/pack
inside /sbin/fstrim / 2>/dev/null || true
umount $target
sync
"""


def cloud_image(full: Image) -> Path:
    """Return the image, a qcow2 file, made from debian-full when the cache of the tests has none."""
    cache = ImageCache(cache_root() / "tests")
    with cache.locked():
        files = cache.find(NAME)
        mark = f"{zlib.crc32(repr((INSTALL, MORE, ROOT_START)).encode()):08x}"
        known = cache.manifest(NAME)
        if not files or known is None or known.made_from.get("recipe") != mark:
            with (
                tempfile.TemporaryDirectory(prefix=".cloud.", dir=cache.root) as scratch,
                cache.writing(NAME, {"recipe": mark}) as directory,
            ):
                _build(full, Path(scratch), directory / "cloud.qcow2")
            files = cache.find(NAME)
    assert files is not None
    return files["cloud.qcow2"]


def _build(full: Image, scratch: Path, into: Path) -> None:
    apt = Apt(scratch)
    base = apt.fetch_system(PACKAGES, scratch / "debs")
    known = {deb.name for deb in (*base.essential, *base.others)}
    more = [
        deb for deb in apt.fetch_system((*PACKAGES, *MORE), scratch / "debs").others if deb.name not in known
    ]
    pack = scratch / "pack"
    (pack / "debs").mkdir(parents=True)
    for deb in more:
        os.link(deb, pack / "debs" / deb.name)
    (pack / "install.sh").write_text(INSTALL)
    size = sum(deb.stat().st_size for deb in more)
    make_ext4(scratch / "pack.ext4", size + size // 8 + 32 * MIB, content=pack, label="pack")
    disk = scratch / "disk.raw"
    assert full.disk is not None
    _partition(disk, full.disk)
    said = bytearray()
    script = "mkdir /mnt/pack && mount -t ext4 -o ro /dev/vdb /mnt/pack && sh /mnt/pack/install.sh"
    status = run_guest(
        full_installer(), [disk, scratch / "pack.ext4"], ["sh", "-c", script], said.extend, 900.0
    )
    if status != 0:
        raise AssertionError(
            f"the cloud image was not made ({status}): {said[-3000:].decode(errors='replace')}"
        )
    _core.image_convert([(os.fspath(disk), "raw")], os.fspath(into), "qcow2")


def full_installer() -> Image:
    from ringzero import images

    return images.find("debian") or images.pull("debian")


def _partition(disk: Path, root: Path) -> None:
    """Write a partition table, and the file system of `root` into the first partition."""
    root_size = root.stat().st_size
    total = ROOT_START + root_size + MIB
    parts = {
        1: (LINUX_ROOT, ROOT_START, root_size),
        14: (BIOS_BOOT, MIB, 3 * MIB),
        15: (EFI_SYSTEM, 4 * MIB, 124 * MIB),
    }
    entries = bytearray(ENTRIES * ENTRY_SIZE)
    for number, (kind, start, size) in parts.items():
        first, last = start // SECTOR, (start + size) // SECTOR - 1
        entry = kind.bytes_le + uuid.uuid4().bytes_le + struct.pack("<QQQ", first, last, 0)
        entries[(number - 1) * ENTRY_SIZE : (number - 1) * ENTRY_SIZE + len(entry)] = entry
    last_sector = total // SECTOR - 1
    guid = uuid.uuid4().bytes_le
    table_sectors = len(entries) // SECTOR

    def header(own: int, other: int, table: int) -> bytes:
        fields = [
            b"EFI PART",
            0x10000,
            92,
            0,
            0,
            own,
            other,
            2 + table_sectors,
            last_sector - 1 - table_sectors,
        ]
        fields += [guid, table, ENTRIES, ENTRY_SIZE, zlib.crc32(entries)]
        raw = struct.pack("<8sIIIIQQQQ16sQIII", *fields)
        return raw[:16] + struct.pack("<I", zlib.crc32(raw)) + raw[20:]

    # A protective MBR: one partition of type EE that covers the disk.
    protective = struct.pack(
        "<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last_sector, 0xFFFFFFFF)
    )
    with disk.open("wb") as file:
        file.truncate(total)
        file.write(bytes(446) + protective + bytes(48) + b"\x55\xaa")
        file.write(header(1, last_sector, 2).ljust(SECTOR, b"\0") + entries)
        file.seek((last_sector - table_sectors) * SECTOR)
        file.write(entries + header(last_sector, 1, last_sector - table_sectors).ljust(SECTOR, b"\0"))
        _copy_data(root, file.fileno(), ROOT_START)


def _copy_data(source: Path, target: int, at: int) -> None:
    """Copy a file with holes; they stay holes."""
    with source.open("rb") as file:
        position, end = 0, source.stat().st_size
        while position < end:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            stop = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            while position < stop:
                count = os.copy_file_range(file.fileno(), target, stop - position, position, at + position)
                if count == 0:
                    return
                position += count
