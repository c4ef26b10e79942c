"""Disks as images: which names are files, and files that cannot be used. What is on one: tests/system/test_cloud.py."""

from pathlib import Path

import pytest

from ringzero import Machine, _core, images
from ringzero.errors import InputError
from ringzero.host.client import _name_of
from ringzero.machine.disk_image import disk_image


@pytest.mark.parametrize("name", ["./x", "x.qcow2", "a/b", "/x,format=raw", "x.img,format=qcow2", "x.raw"])
def test_a_path_is_a_disk(name: str) -> None:
    assert images.is_disk(name)
    Machine(name)


@pytest.mark.parametrize(
    "name", ["debian", "debian:6.12", "debian-full", "hello", "debian-ful", "x,format=raw"]
)
def test_a_name_is_none(name: str) -> None:
    assert not images.is_disk(name)


def test_files_that_cannot_be_used_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        disk_image(f"{tmp_path}/none.qcow2")
    disguised = tmp_path / "ubuntu.img"
    _core.image_create(str(tmp_path / "a.qcow2"), 1 << 20)
    (tmp_path / "a.qcow2").rename(disguised)
    with pytest.raises(InputError, match="looks like a qcow2"):
        disk_image(str(disguised))
    with pytest.raises(InputError, match="only format="):
        disk_image(f"{disguised},ro")
    raw = tmp_path / "a.qcow2"
    raw.write_bytes(bytes(4096))
    with pytest.raises((InputError, _core.CoreError), match=r"a\.qcow2"):
        disk_image(str(raw))


def test_vms_of_a_disk_are_called_by_its_file() -> None:
    assert _name_of("/x/Debian 12_amd64.qcow2,format=qcow2") == "debian-12_amd64"
    assert _name_of("debian:6.12") == "debian-6.12"
    assert _name_of(None) == "vm"
    assert _name_of("/x/--.raw") == "raw"
