"""Virtio devices on no bus, with the driver of Debian's kernels: found by ACPI."""

from pathlib import Path

import pytest

from ringzero import GuestError, Machine

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian


@pytest.mark.parametrize("image", ["debian:6.1", "debian:6.12"])
def test_debian_has_its_devices_without_a_bus(image: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8 << 20))
    with Machine(
        image, engine=ENGINE, cpus=2, transport="mmio", disks=[disk], net="nat", mounts=[f"{tmp_path}:/there"]
    ) as guest:
        script = (
            "seq 1 20000 | dd of=/dev/vda conv=fsync 2>/dev/null; seq 1 20000 >/there/numbers; "
            "readlink -f /sys/block/vda; ping -c 1 10.0.2.2; ls /sys/bus/pci/devices"
        )
        done = guest.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert "/devices/platform/LNRO0005:" in done.stdout
        assert "1 packets received" in done.stdout
        assert "0000:00:01.0" not in done.stdout, "nothing but its bridge is on the bus"
        numbers = "".join(f"{number}\n" for number in range(1, 20001)).encode()
        assert disk.read_bytes().startswith(numbers)
        assert (tmp_path / "numbers").read_bytes() == numbers
        # What comes later comes on the bus all the same.
        other = tmp_path / "other"
        other.write_bytes(bytes(1 << 20))
        late = guest.attach(disk=other)
        assert "vdb" in guest.run(["cat", "/proc/partitions"], capture_output=True, text=True).stdout
        guest.detach(late)


def test_more_devices_than_there_is_room_for(tmp_path: Path) -> None:
    from ringzero.errors import InputError

    disks = [tmp_path / f"disk{number}" for number in range(15)]
    for disk in disks:
        disk.write_bytes(bytes(1 << 20))
    with pytest.raises((InputError, GuestError), match="room for 16 virtio devices"):
        Machine("debian", engine=ENGINE, transport="mmio", disks=disks).start()
