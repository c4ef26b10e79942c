"""A cloud image that ringzero did not make: its own kernel is found on it, and its cloud-init takes our seed.

The image is made from packages once and kept in the cache of the tests; where it is not, that takes two minutes, and is
done when RINGZERO_TEST_CLOUD says so.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import Machine, images
from ringzero.errors import ImageError, InputError
from ringzero.images.cache import ImageCache, cache_root
from ringzero.machine.disk_image import disk_image
from ringzero.machine.seed import Seed

from . import cloud_image
from .conftest import ENGINE

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBeOSmM8sAvU8R7pCz8mCs5nYhHqnv1TnWq5PEY4Gx5T me@here"
USER_DATA = b"""#cloud-config
write_files:
  - {path: /root/written, content: by cloud-init}
runcmd:
  - [sh, -c, "echo $(hostname) > /root/ran"]
"""


@pytest.fixture(scope="module")
def cloud() -> Path:
    """The image, if it is in the cache or shall be made."""
    full = images.find("debian-full")
    is_there = ImageCache(cache_root() / "tests").find(cloud_image.NAME) is not None
    if full is None or not (is_there or os.environ.get("RINGZERO_TEST_CLOUD")):
        pytest.skip(
            "no cloud image in the cache: RINGZERO_TEST_CLOUD=1 makes one from debian-full and packages"
        )
    return cloud_image.cloud_image(full)


@pytest.fixture(scope="module")
def booted(cloud: Path) -> Iterator[Machine]:
    """The image with a seed, its cloud-init done."""
    seed = Seed(user="ana", ssh_keys=(KEY,), hostname="box", user_data=USER_DATA)
    with Machine(str(cloud), memory="512M", engine=ENGINE, net="nat", seed=seed) as machine:
        machine.run(["cloud-init", "status", "--wait"], timeout=300)
        yield machine


def test_its_kernel_boots_its_root_with_its_words(cloud: Path, booted: Machine) -> None:
    image = disk_image(str(cloud))
    words = booted.run(["cat", "/proc/cmdline"], text=True, check=True).stdout
    assert "root=PARTUUID=" in words and words.startswith(image.append)
    assert "console=tty0" not in words
    assert "/dev/vda1" in booted.run(["findmnt", "--noheadings", "--output", "SOURCE", "/"], text=True).stdout
    release = booted.run(["uname", "-r"], text=True).stdout.strip()
    assert booted.path(f"/boot/vmlinuz-{release}").read_bytes() == image.kernel.read_bytes()


def test_cloud_init_takes_the_seed(booted: Machine) -> None:
    assert "DataSourceNoCloud" in booted.path("/run/cloud-init/result.json").read_text()
    assert booted.path("/root/written").read_text() == "by cloud-init"
    assert booted.path("/root/ran").read_text() == "box\n"
    assert KEY in booted.path("/home/ana/.ssh/authorized_keys").read_text()
    assert booted.run(["sudo", "-n", "id", "-u"], user="ana", text=True).stdout == "0\n"


def test_the_image_is_not_written(cloud: Path, booted: Machine) -> None:
    booted.run(["sh", "-c", "touch /new && sync"], check=True)
    assert ImageCache(cache_root() / "tests").find(cloud_image.NAME, thorough=True) is not None


def test_cloud_init_takes_what_the_metadata_tells(cloud: Path) -> None:
    """From 169.254.169.254, when it is told that this is a cloud like EC2."""
    seed = Seed(ssh_keys=(KEY,), hostname="box")
    with Machine(
        str(cloud), memory="512M", engine=ENGINE, net="nat", seed=seed, append="ci.ds=Ec2"
    ) as machine:
        machine.run(["cloud-init", "status", "--wait"], timeout=300)
        assert "DataSourceEc2" in machine.path("/run/cloud-init/result.json").read_text()
        assert machine.run(["hostname"], text=True).stdout == "box\n"
        assert KEY in machine.path("/home/debian/.ssh/authorized_keys").read_text()


def test_what_it_writes_can_be_kept_and_its_own_kernel_then_counts(cloud: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.qcow2"
    command = "cp vmlinuz-* vmlinuz-9 && echo more >> vmlinuz-9 && sed -i 's/vmlinuz-6[^ ]*/vmlinuz-9/' grub/grub.cfg"
    with Machine(str(cloud), memory="512M", engine=ENGINE, persist=kept) as machine:
        machine.run(["sh", "-c", command], cwd="/boot", check=True)
        machine.power_off()
    assert disk_image(str(cloud), kept).kernel.read_bytes().endswith(b"more\n")
    assert not disk_image(str(cloud)).kernel.read_bytes().endswith(b"more\n")


def test_a_disk_without_a_system_is_told_of(tmp_path: Path) -> None:
    """By a guest, which finds no file system on one, and no kernel in the other's."""
    (tmp_path / "empty.raw").write_bytes(bytes(1 << 20))
    with pytest.raises(ImageError, match="no ext4 file system"):
        disk_image(f"{tmp_path}/empty.raw")
    bare = tmp_path / "bare.raw"
    with bare.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", str(bare)], check=True)
    with pytest.raises(ImageError, match="no kernel on the disk"):
        disk_image(str(bare))


def test_a_kernel_of_absurd_size_and_a_loop_of_links_are_refused(tmp_path: Path) -> None:
    """A hostile image costs a sentence."""
    tree = tmp_path / "tree"
    (tree / "boot" / "grub").mkdir(parents=True)
    (tree / "boot" / "grub" / "grub.cfg").write_text("linux /boot/vmlinuz root=/dev/vda\n")
    (tree / "boot" / "vmlinuz").symlink_to("vmlinuz")
    with pytest.raises(InputError, match="no kernel on the disk"):
        disk_image(_disk(tmp_path / "loop.raw", tree))
    (tree / "boot" / "vmlinuz").unlink()
    with (tree / "boot" / "vmlinuz").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="which no kernel has"):
        disk_image(_disk(tmp_path / "vast.raw", tree))


def _disk(path: Path, tree: Path) -> str:
    with path.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(path)], check=True)
    return str(path)
