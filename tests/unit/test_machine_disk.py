"""Disks as the operator names them, and what is wrong with them."""

from pathlib import Path

import pytest

from ringzero import _core
from ringzero._core import CoreError, VirtioDevice, Vm
from ringzero.errors import InputError
from ringzero.machine.disk import Disk

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def test_a_disk_is_a_file_and_whether_it_is_read_only(image: Path) -> None:
    assert Disk.parse(str(image)) == Disk.parse(image) == Disk(image)
    assert Disk.parse(f"{image},ro") == Disk(image, read_only=True)
    assert Disk.parse(Disk(image, serial="a1")) == Disk(image, serial="a1")


def test_options_of_a_disk_and_commas_in_its_name(image: Path) -> None:
    text = f"{image},serial=a b,cache=none,iops=5000,bps=2M,on-error=pause,ro"
    assert Disk.parse(text) == Disk(image, True, "a b", "none", "pause", 5000, 2 << 20)
    odd = image.with_name("a,b=c,d")
    image.rename(odd)
    assert Disk.parse(f"{odd},ro") == Disk(odd, read_only=True)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("rw", "no disk option 'rw': there is ro"),
        ("ro=1", "write ro$"),
        ("cache", "write cache=VALUE"),
        ("cache=warm", "no cache mode 'warm'.*writeback"),
        ("on-error=panic", "auto, report, pause"),
        ("iops=10K", "operations a second"),
        ("bps=fast", "rate 'fast' is not a size"),
        ("ro,ro", "given twice"),
    ],
)
def test_options_that_are_not(image: Path, option: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Disk.parse(f"{image},{option}")


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere,ro"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is not a file"):
        Disk.parse(str(tmp_path / name))


@pytest.mark.parametrize("serial", ["x" * 21, "\u00e4", "a\n"])
def test_impossible_serial_numbers(image: Path, serial: str) -> None:
    with pytest.raises(InputError, match="serial number"):
        Disk(image, serial=serial)


def raw_disk(path: str, *, read_only: bool = False) -> VirtioDevice:
    return _core.Disk(path, read_only=read_only)


def find_disks(vm: Vm) -> list[int]:
    """Have a guest read the identifiers of the first four slots of the PCI bus."""
    code = b""
    for slot in range(4):
        address = 1 << 31 | slot << 11
        # mov eax,ADDRESS; mov dx,0xcf8; out dx,eax; mov dx,0xcfc; in eax,dx; mov [0x3000 + 4 * slot],eax
        code += b"\xb8" + address.to_bytes(4, "little") + bytes.fromhex("66baf80c ef 66bafc0c ed a3")
        code += (0x3000 + 4 * slot).to_bytes(4, "little")
    code += bytes.fromhex("66ba0406 66b80034 66ef")  # power off
    vm.write_memory(0x1000, code)
    registers = {"rip": 0x1000, "cr0": 0x11, "cs": 8}
    for name in ("cs", "ss", "ds", "es"):
        registers |= {f"{name}_base": 0, f"{name}_limit": 0xFFFF_FFFF}
        registers[f"{name}_attributes"] = 0xC09B if name == "cs" else 0xC093
    vm.set_registers(registers)
    vm.start()
    assert vm.wait(30) == "poweroff"
    data = vm.read_memory(0x3000, 16)
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, 16, 4)]


def test_the_guest_finds_each_disk_behind_the_entropy_device_and_the_balloon(image: Path) -> None:
    vm = Vm(16 * MIB, engine="interpret", devices=[raw_disk(str(image), read_only=True)])
    assert find_disks(vm) == [0x0008_1B36, 0x1044_1AF4, 0x1045_1AF4, 0x1042_1AF4]


def test_the_core_refuses_what_it_cannot_open_and_more_than_the_bus_holds(
    image: Path, tmp_path: Path
) -> None:
    with pytest.raises(CoreError, match=r"the disk .*nowhere cannot be used"):
        raw_disk(str(tmp_path / "nowhere"))
    with pytest.raises(CoreError, match="not a regular file"):
        raw_disk(str(tmp_path), read_only=True)
    Vm(16 * MIB, devices=[raw_disk(str(image), read_only=True) for _ in range(29)])
    with pytest.raises(CoreError, match="the PCI bus is full"):
        Vm(16 * MIB, devices=[raw_disk(str(image), read_only=True) for _ in range(30)])
    disk = raw_disk(str(image), read_only=True)
    Vm(16 * MIB, devices=[disk])
    with pytest.raises(CoreError, match="a machine has this device already"):
        Vm(16 * MIB, devices=[disk])
