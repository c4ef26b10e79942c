"""Seeds: what a guest is told at its first boot, on a disk that others can read."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ringzero.errors import InputError
from ringzero.images.iso9660 import iso9660
from ringzero.machine.seed import Seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBeOSmM8sAvU me@here"


def test_options_become_cloud_init_and_our_own_facts(tmp_path: Path) -> None:
    """One seed, in the terms of both of its readers."""
    (tmp_path / "id.pub").write_text(f"# mine\n{KEY}\n")
    seed = Seed.parse("ana", (str(tmp_path / "id.pub"),), "box.lan")
    assert seed is not None
    files = seed.files()
    assert files["ringzero"].decode().splitlines()[1:] == ["user ana", f"key {KEY}", "hostname box.lan"]
    assert json.loads(files["meta-data"])["local-hostname"] == "box.lan"
    first, _, rest = files["vendor-data"].partition(b"\n")
    assert first == b"#cloud-config"
    (user,) = json.loads(rest)["users"]
    assert (user["name"], user["ssh_authorized_keys"], user["lock_passwd"]) == ("ana", [KEY], True)


def test_another_seed_is_another_instance() -> None:
    """What a guest does once for an instance, it does again for a changed seed."""
    instances = {
        json.loads(seed.files()["meta-data"])["instance-id"]
        for seed in (Seed(hostname="a"), Seed(hostname="b"), Seed(user_data=b"#!/bin/sh\n"))
    }
    assert len(instances) == 3


def test_only_a_script_needs_no_cloud_init() -> None:
    """debian-full runs scripts, and says so of anything else."""
    assert not Seed(user_data=b"#!/bin/sh\n").needs_cloud_init
    assert Seed(user_data=b"#cloud-config\n").needs_cloud_init
    assert not Seed(user="ana").needs_cloud_init


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"user": "root"}, "cannot be a user"),
        ({"user": "a b"}, "cannot be a user"),
        ({"user": "ana\nkey x"}, "cannot be a user"),
        ({"hostname": "-x"}, "cannot be a host name"),
        ({"hostname": "x" * 65}, "cannot be a host name"),
        ({"hostname": "x\n"}, "cannot be a host name"),
        ({"ssh_keys": ("/none/id.pub",)}, "cannot be read"),
        ({"user_data": "/none"}, "user-data /none cannot be read"),
    ],
)
def test_what_cannot_be_is_told(options: dict[str, str], words: str) -> None:
    """No fact of a seed can bring another line with it."""
    with pytest.raises(InputError, match=words):
        Seed.parse(**options)  # type: ignore[arg-type]


def test_a_key_is_one_line() -> None:
    """A file with something else in it is refused."""
    with pytest.raises(InputError, match="not an SSH public key"):
        Seed(ssh_keys=(f"{KEY}\nuser mallory",))
    with pytest.raises(InputError, match="not an SSH public key"):
        Seed(ssh_keys=("-----BEGIN OPENSSH PRIVATE KEY-----",))


def test_no_options_are_no_seed() -> None:
    """Without a word there is no disk."""
    assert Seed.parse() is None


def test_an_image_is_laid_out_as_ecma_119_says() -> None:
    """The fields by which a reader finds a file, taken by hand."""
    image = iso9660("CIDATA", {"user-data": b"u" * 3000, "meta-data": b"m"})
    descriptor = image[16 * 2048 : 17 * 2048]
    assert descriptor[:7] == b"\x01CD001\x01"
    assert descriptor[40:72] == b"CIDATA".ljust(32)
    assert int.from_bytes(descriptor[80:84], "little") * 2048 == len(image)
    assert int.from_bytes(descriptor[84:88], "big") * 2048 == len(image)
    root = int.from_bytes(descriptor[158:162], "little") * 2048
    found, at = {}, root
    while image[at]:
        length, name = image[at], image[at + 33 : at + 33 + image[at + 32]]
        place, size = (int.from_bytes(image[at + skip : at + skip + 4], "little") for skip in (2, 10))
        found[name] = image[place * 2048 : place * 2048 + size]
        at += length
    assert found.pop(b"\x00") == found.pop(b"\x01") == image[root : root + 2048]
    assert found == {b"meta-data": b"m", b"user-data": b"u" * 3000}
    assert image[17 * 2048 : 17 * 2048 + 7] == b"\xffCD001\x01"


def test_more_files_than_a_sector_holds() -> None:
    """No record goes over the end of a sector, and the directory grows by whole ones."""
    files = {f"file-{number:03}": b"%d" % number for number in range(100)}
    image = iso9660("MANY", files)
    descriptor = image[16 * 2048 :]
    root, size = (int.from_bytes(descriptor[at : at + 4], "little") for at in (158, 166))
    names = []
    for sector in range(size // 2048):
        at = (root + sector) * 2048
        while at < (root + sector + 1) * 2048 and image[at]:
            names.append(image[at + 33 : at + 33 + image[at + 32]])
            at += image[at]
    assert names[2:] == sorted(name.encode() for name in files)


@pytest.mark.skipif(shutil.which("blkid", path="/usr/sbin:/sbin:/usr/bin") is None, reason="no blkid")
def test_blkid_finds_the_label(tmp_path: Path) -> None:
    """The guest looks for the disk by its label, with the same program."""
    path = tmp_path / "seed.iso"
    path.write_bytes(Seed(hostname="x").image())
    blkid = shutil.which("blkid", path="/usr/sbin:/sbin:/usr/bin")
    said = subprocess.run(
        [str(blkid), "-p", "-o", "export", path], capture_output=True, text=True, check=True
    )
    assert "LABEL=CIDATA" in said.stdout
    assert "TYPE=iso9660" in said.stdout


@pytest.mark.parametrize(
    ("label", "name"), [("", "a"), ("X" * 33, "a"), ("X", ""), ("X", "a/b"), ("X", "n" * 31)]
)
def test_names_that_an_image_cannot_have(label: str, name: str) -> None:
    """A defect of ours, so no InputError."""
    with pytest.raises(ValueError, match="not a"):
        iso9660(label, {name: b""})
