"""Devices that come to a running Debian and go: by ACPI's hotplug, as its own kernels know it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import GuestEnded, GuestError, InputError, Machine
from ringzero.errors import RingzeroError

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian


@pytest.fixture(scope="module", params=["debian:6.1", "debian:6.12"])
def guest(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Give a guest of two processors, which started without any device of these tests."""
    with Machine(request.param, engine=ENGINE, cpus=2) as machine:
        machine.wait_ready(300)
        yield machine


def shell(guest: Machine, script: str) -> str:
    done = guest.run(["sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_a_disk_comes_and_goes_and_comes_again(guest: Machine, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 << 20))
    one = guest.attach(disk=disk)
    shell(guest, "seq 1 20000 | dd of=/dev/vda conv=fsync 2>/dev/null")
    with pytest.raises(RingzeroError, match="another machine uses it"):
        guest.attach(disk=disk)
    assert guest.attached == [one]
    guest.detach(one)
    assert guest.attached == []
    assert "vda" not in shell(guest, "cat /proc/partitions")
    with pytest.raises(InputError, match="does not have that device"):
        guest.detach(one)
    # Nobody has it: another device can have it, read-only now.
    again = guest.attach(disk=f"{disk},ro")
    assert shell(guest, "head -n 20000 /dev/vda | tail -n 1; cat /sys/block/vda/ro") == "20000\n1\n"
    guest.detach(again)


def test_a_disk_goes_while_it_is_read(guest: Machine, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(64 << 20))
    attached = guest.attach(disk=f"{disk},iops=200")
    reader = guest.popen(["sh", "-c", "while dd if=/dev/vda of=/dev/null bs=4k 2>/dev/null; do :; done"])
    guest.detach(attached, 30)
    reader.kill()
    reader.wait(30)
    assert "vda" not in shell(guest, "cat /proc/partitions")


def test_a_network_comes_with_an_address(guest: Machine) -> None:
    card = guest.attach(net="nat")
    assert "10.0.2.15/24" in shell(guest, "ip -4 addr show eth0")
    assert "1 packets received" in shell(guest, "ping -c 1 10.0.2.2")
    with pytest.raises(InputError, match="one network"):
        guest.attach(net="nat")
    guest.detach(card)
    assert "eth0" not in shell(guest, "ls /sys/class/net")


def test_a_folder_and_a_port_come_and_go(guest: Machine, tmp_path: Path) -> None:
    (tmp_path / "said").write_text("hello\n")
    folder = guest.attach(mount=f"{tmp_path}:/there")
    assert shell(guest, "cat /there/said") == "hello\n"
    guest.detach(folder)
    assert shell(guest, "ls /there") == ""
    port = guest.attach(ports=["org.example.mine"])
    with guest.port("org.example.mine") as line:
        line.settimeout(60)
        name = "$(basename $(dirname $(grep -l org.example.mine /sys/class/virtio-ports/*/name)))"
        shell(guest, f"port={name}; echo there >/dev/$port")
        assert line.recv(100) == b"there\n"
    guest.detach(port)


def test_many_come_and_go_at_once(guest: Machine, tmp_path: Path) -> None:
    disks = [tmp_path / f"disk{number}" for number in range(6)]
    for disk in disks:
        disk.write_bytes(bytes(1 << 20))
    for _ in range(2):
        attached = [guest.attach(disk=disk) for disk in disks]
        assert shell(guest, "grep -c ' vd' /proc/partitions") == "6\n"
        for device in reversed(attached):
            guest.detach(device)
    assert shell(guest, "ls /sys/bus/virtio/drivers/virtio_blk | grep -c 'virtio[0-9]' || true") == "0\n"


def test_a_guest_cannot_eject_what_nobody_wants_back(guest: Machine, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"mine\n".ljust(1 << 20, b"\0"))
    attached = guest.attach(disk=disk)
    slot = "$(basename $(dirname $(readlink -f /sys/block/vda/device)) | cut -d : -f 3 | cut -d . -f 1)"
    shell(guest, f"echo 0 >/sys/bus/pci/slots/$((0x{slot}))/power")
    assert "vda" not in shell(guest, "cat /proc/partitions")
    shell(guest, "echo 1 >/sys/bus/pci/rescan; until [ -e /dev/vda ]; do sleep 0.01; done")
    assert shell(guest, "head -c 5 /dev/vda") == "mine\n"
    guest.detach(attached)


def test_a_guest_that_knows_no_hotplug_keeps_its_devices(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with Machine("debian", engine=ENGINE, append="acpi=off") as machine:
        machine.wait_ready(300)
        with pytest.raises(GuestError, match="no driver"):
            machine.attach(disk=disk)
        (attached,) = machine.attached
        with pytest.raises(GuestError, match=r"within 0\.2 s"):
            machine.detach(attached, 0.2)
        assert machine.attached == [attached]
        # One that ends meanwhile says so at once.
        threading.Timer(0.3, machine.stop).start()
        with pytest.raises((InputError, GuestEnded), match="ended"):
            machine.detach(attached, 300)
        machine.wait(60)
        with pytest.raises(GuestEnded, match="ended"):
            machine.attach(disk=disk)
