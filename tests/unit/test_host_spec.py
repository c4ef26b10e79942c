"""What a VM of a host is described by: it goes from process to process, and means the same in each."""

import json
from pathlib import Path

import pytest

from ringzero.errors import InputError
from ringzero.host.spec import MOST_USER_DATA, GuestSpec
from ringzero.machine.disk import Disk
from ringzero.machine.mount import Mount
from ringzero.machine.seed import Seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBeOSmM8sAvU8R7pCz8mCs5nYhHqnv1TnWq5PEY4Gx5T me@here"


def test_a_spec_with_disks_folders_and_a_seed_comes_back_as_it_was() -> None:
    spec = GuestSpec.checked(
        name="web",
        image="debian-full",
        disks=["/a/b,c.raw,ro,serial=x1,cache=none", "/d.qcow2,overlay=/e.qcow2,iops=7"],
        mounts=["/here:/there:ro"],
        persist="/kept.qcow2",
        seed=Seed("ana", (KEY,), "box", b"#!/bin/sh\n\xff\n"),
    )
    assert [disk.path for disk in spec.disks] == [Path("/a/b,c.raw"), Path("/d.qcow2")]
    assert (spec.disks[1].overlay, spec.disks[1].iops) == (Path("/e.qcow2"), 7)
    assert GuestSpec.from_json(json.loads(json.dumps(spec.as_json()))) == spec


@pytest.mark.parametrize(
    "text", ["a.raw", "a.raw,ro", "b.raw,overlay", "a.raw,serial=0,bps=512,on-error=pause", "a.raw,backing=x"]
)
def test_a_disk_says_what_it_was_read_from_with_absolute_paths(text: str) -> None:
    disk = Disk.read(text)
    again = Disk.read(str(disk))
    assert again.path.is_absolute()
    assert str(again) == str(disk)
    assert (again.read_only, again.temporary, again.serial) == (disk.read_only, disk.temporary, disk.serial)


def test_a_mount_says_what_it_was_read_from_with_an_absolute_path() -> None:
    mount = Mount.read("some:folder:/there:ro")
    assert str(mount) == f"{Path.cwd()}/some:folder:/there:ro"


def test_what_only_means_something_in_another_folder_is_refused() -> None:
    for wrong in (
        {"disks": ["a.raw"]},
        {"mounts": ["./a:/b"]},
        {"persist": "p"},
        {"disks": ["/a,overlay=b"]},
    ):
        with pytest.raises(InputError, match="relative"):
            GuestSpec.checked(name="web", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"disks": "/a.raw"}, "list of texts"),
        ({"disks": [7]}, "list of texts"),
        ({"disks": ["/a.raw,iops=red"]}, "whole number"),
        ({"mounts": ["/a"]}, "HERE:THERE"),
        ({"mounts": ["/a:b"]}, "cannot be mounted"),
        ({"persist": 7}, "must be text"),
        ({"seed": "ana"}, "a seed is not"),
        ({"seed": {"ssh_keys": "x"}}, "a seed is not"),
        ({"seed": {"user": 7}}, "a seed is not"),
        ({"seed": {"user_data": "\xff"}}, "a seed is not"),
        ({"seed": {"user": "ROOT ROOT"}}, "cannot be a user"),
    ],
)
def test_what_a_client_may_send_is_judged(fields: dict[str, object], why: str) -> None:
    with pytest.raises(InputError, match=why):
        GuestSpec.from_json({"name": "web", **fields})


def test_user_data_has_a_limit() -> None:
    with pytest.raises(InputError, match="16 KiB"):
        GuestSpec.checked(name="web", seed=Seed(user_data=b"#!" + bytes(MOST_USER_DATA)))
