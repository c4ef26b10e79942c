"""Devices that come and go, on a core played by the test: what is refused, and what the guest is asked to do."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from ringzero.errors import GuestError, InputError
from ringzero.machine.hotplug import Attached, Plugs
from ringzero.machine.machine import Machine
from ringzero.machine.mount import Mount
from ringzero.machine.network import Networks, mac_of
from ringzero.machine.ports import Ports


class FakeVm:
    """Takes devices, and lets go of those that `lets_go` says."""

    lets_go: ClassVar[bool] = True

    def __init__(self) -> None:
        self.devices: list[object] = []

    def attach(self, device: object) -> None:
        self.devices.append(device)

    def detach(self, device: object, timeout: float) -> bool:
        assert timeout == 7.0
        if self.lets_go:
            self.devices.remove(device)
        return self.lets_go


class Guest:
    """Answers scripts: with what is in `says`, by a word of the script."""

    def __init__(self) -> None:
        self.scripts: list[str] = []
        self.says: dict[str, tuple[int, str]] = {"insmod": (0, "2\n")}

    def __call__(self, script: str) -> tuple[int, str]:
        self.scripts.append(script)
        return next((answer for word, answer in self.says.items() if word in script), (0, ""))


def plugs(
    vm: FakeVm, *, net: str | None = None, mounts: tuple[Mount, ...] = (), ports: tuple[str, ...] = ()
) -> Plugs:
    made: Any = vm
    return Plugs(made, 1, Networks.parse("web", net, ()), mounts, Ports(ports))


def test_one_device_at_a_time(tmp_path: Path) -> None:
    mine = plugs(FakeVm())
    with pytest.raises(InputError, match="not 0"):
        mine.attach(None)
    with pytest.raises(InputError, match="not 2"):
        mine.attach(None, net="nat", ports=["one"])
    with pytest.raises(InputError, match="name a net"):
        mine.attach(None, mount=f"{tmp_path}:/there", publish="80:80")
    with pytest.raises(InputError, match="is not a file"):
        mine.attach(None, disk=tmp_path / "absent")
    with pytest.raises(InputError, match="without a network"):
        mine.attach(None, net="none")
    with pytest.raises(InputError, match="hvc0"):
        mine.attach(None, ports=["hvc0"])
    assert mine.attached == []


def test_what_the_machine_has_is_not_given_twice(tmp_path: Path) -> None:
    mine = plugs(FakeVm(), net="nat", mounts=tuple(Mount.parse_all([f"{tmp_path}:/there"])), ports=("one",))
    with pytest.raises(InputError, match="one network of a machine"):
        mine.attach(None, net="nat")
    with pytest.raises(InputError, match="a place of its own"):
        mine.attach(None, mount=f"{tmp_path}:/there")
    with pytest.raises(InputError, match="'one' already"):
        mine.attach(None, ports=["one"])
    taken = mac_of("web", 0).hex(":")
    with pytest.raises(InputError, match="each its own"):
        mine.attach(None, net=f"switch=lan,mac={taken}")
    one, two = mine.attach(None, net="switch=lan"), mine.attach(None, net="switch=lan")
    macs = [card.mac for attached in (one, two) for card in getattr(attached.what, "networks", ())]
    assert macs == [mac_of("web", 1), mac_of("web", 2)]
    mine.attach(None, ports=["two"])
    with pytest.raises(InputError, match="'two' already"):
        mine.attach(None, ports=["two"])
    found = mine.ports_with("two")
    assert found is not None and found.names == ("two",)
    assert mine.ports_with("one") is None, "the machine's own"


def test_a_folder_is_mounted_and_unmounted(tmp_path: Path) -> None:
    vm, guest = FakeVm(), Guest()
    mine = plugs(vm)
    folder = mine.attach(guest, mount=f"{tmp_path}:/there:ro")
    assert "virtiofs.ko" not in guest.scripts[0] and "virtiofs" in guest.scripts[0]
    assert "-gt 2" in guest.scripts[1], "one driver more than there was"
    assert "mount -t virtiofs -o ro mount0 /there" in guest.scripts[2]
    guest.says["umount"] = (1, "umount: can't unmount /there: Device or resource busy\n")
    with pytest.raises(GuestError, match="busy"):
        mine.detach(guest, folder, 7.0)
    assert vm.devices == [folder.device]
    del guest.says["umount"]
    mine.detach(guest, folder, 7.0)
    assert vm.devices == [] and mine.attached == []


def test_a_guest_without_a_driver_keeps_the_device_until_it_lets_go() -> None:
    vm, guest = FakeVm(), Guest()
    mine = plugs(vm)
    guest.says['until [ "$'] = (1, "")
    with pytest.raises(GuestError, match="no driver"):
        mine.attach(guest, ports=["one"])
    (port,) = mine.attached
    vm.lets_go = False  # type: ignore[misc]
    with pytest.raises(GuestError, match="within 7 s"):
        mine.detach(None, port, 7.0)
    assert mine.attached == [port]
    vm.lets_go = True  # type: ignore[misc]
    mine.detach(None, port, 7.0)
    with pytest.raises(InputError, match="does not have that device"):
        mine.detach(None, Attached(port.what, port.device), 7.0)


def test_a_machine_that_was_not_started_takes_devices_when_it_is_made() -> None:
    machine = Machine("hello")
    with pytest.raises(InputError, match="not started"):
        machine.attach(net="nat")
