"""Devices that come to a machine while it runs, and go.

The guest's own system does what is to be done: Debian's kernels have ACPI's hotplug built in. A system with udev loads
the drivers; our small images have none, so their agent is told to.
"""

from __future__ import annotations

import dataclasses
import threading
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ringzero.errors import GuestError, InputError
from ringzero.machine.disk import Disk
from ringzero.machine.mount import Mount
from ringzero.machine.network import Network, Networks, Publish, mac_of
from ringzero.machine.ports import Ports

if TYPE_CHECKING:
    import os

    from ringzero import _core

__all__ = ["Attached", "Plugs", "Shell"]

PATIENCE = 10.0
"""Seconds that a guest has to let a device go, if nothing else is said."""

Shell = Callable[[str], tuple[int, str]]
"""Runs a script in the guest, and returns its exit status and what it printed."""

_VIRTIO = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci")
# What the driver is called in /sys, and the modules that it is in, each after those that it needs.
_DRIVERS: dict[type, tuple[str, tuple[str, ...]]] = {
    Disk: ("virtio_blk", ("virtio_blk",)),
    Mount: ("virtiofs", ("fuse", "virtiofs")),
    Networks: ("virtio_net", ("failover", "net_failover", "virtio_net")),
    Ports: ("virtio_console", ("virtio_console",)),
}
# A module may be on its way in already, by the agent's own hand: then it is waited for.
_LOAD = """\
for module in {modules}; do
    tries=0
    until [ -d /sys/module/$module ] || [ ! -e /lib/modules/$module.ko ] || [ $tries = 100 ] ||
        insmod /lib/modules/$module.ko 2>/dev/null; do
        sleep 0.02
        tries=$((tries + 1))
    done
done
ls /sys/bus/virtio/drivers/{driver} 2>/dev/null | grep -c 'virtio[0-9]'
true
"""
_WAIT = """\
tries=0
until [ "$(ls /sys/bus/virtio/drivers/{driver} 2>/dev/null | grep -c 'virtio[0-9]')" -gt {count} ]; do
    [ $tries != 200 ] || exit 1
    sleep 0.02
    tries=$((tries + 1))
done
"""
_MOUNT = "mkdir -p {there} && mount -t virtiofs -o {options} {tag} {there} 2>&1"
# Only where our own script looks after cards: elsewhere the system does.
_CARD = """\
[ -x /etc/network ] || exit 0
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
card=$(basename "$(dirname "$(grep -il '^{mac}$' /sys/class/net/*/address | head -n 1)")")
ip link set "$card" up
if [ -n "{address}" ]; then
    ip addr add "{address}" dev "$card"
elif [ {kind} = nat ]; then
    udhcpc -q -n -f -t 5 -T 1 -A 1 -i "$card" -s /etc/udhcpc/default.script 2>&1
fi
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Attached:
    """A device that came to a machine while it ran: what `detach` takes."""

    what: Disk | Mount | Networks | Ports
    device: _core.VirtioDevice


class Plugs:
    """The devices of one machine that came while it ran."""

    def __init__(
        self, vm: _core.Vm, cpus: int, networks: Networks, mounts: Sequence[Mount], ports: Ports
    ) -> None:
        """`networks`, `mounts` and `ports` are those that the machine started with."""
        self._ports = ports
        self._vm = vm
        self._cpus = cpus
        self._networks = networks
        self._mounts = mounts
        self._cards = len(networks.networks)
        self._tags = len(mounts)
        self._lock = threading.Lock()
        self.attached: list[Attached] = []

    def attach(
        self,
        shell: Shell | None,
        *,
        disk: Disk | str | os.PathLike[str] | None = None,
        mount: Mount | str | None = None,
        net: str | Network | None = None,
        publish: str | Publish | Sequence[str | Publish] = (),
        ports: Sequence[str] = (),
    ) -> Attached:
        """Put one device on the bus, and have its driver loaded where `shell` says how. Raises InputError and
        GuestError, and the core's own CoreError.
        """
        given = sum(part is not None for part in (disk, mount, net)) + bool(ports)
        if given != 1:
            raise InputError(
                f"one device is attached at a time, not {given}: name a disk, mount, net or ports"
            )
        if publish and net is None:
            raise InputError("publish is for a network that comes with it: name a net, too")
        with self._lock:
            what: Disk | Mount | Networks | Ports
            if disk is not None:
                what = Disk.parse(disk)
            elif mount is not None:
                what = self._mount(mount)
            elif net is not None:
                what = self._network(net, publish)
            else:
                what = self._new_ports(ports)
            device = what.devices()[0] if isinstance(what, Networks) else what.device(self._cpus)
            driver, modules = _DRIVERS[type(what)]
            names = {"driver": driver, "modules": " ".join((*_VIRTIO, *modules))}
            count = _number(shell(_LOAD.format(**names))[1]) if shell is not None else 0
            self._vm.attach(device)
            attached = Attached(what, device)
            self.attached.append(attached)
            if shell is not None:
                status, _ = shell(_WAIT.format(driver=driver, count=count))
                if status != 0:
                    raise GuestError(
                        "the guest has found no driver for the new device: it is attached, and waits for one"
                    )
                self._begin_use(shell, what)
        return attached

    def _begin_use(self, shell: Shell, what: object) -> None:
        if isinstance(what, Mount):
            options = "ro" if what.read_only else "rw"
            status, said = shell(_MOUNT.format(there=what.there, options=options, tag=what.tag))
            if status != 0:
                raise GuestError(f"the guest cannot mount {what.tag} at {what.there}: {said.strip()}")
        elif isinstance(what, Networks):
            (network,) = what.networks
            mac = (network.mac or b"").hex(":")
            shell(_CARD.format(mac=mac, address=network.address, kind=network.kind))

    def detach(self, shell: Shell | None, attached: Attached, timeout: float) -> None:
        """Ask the guest to let a device go, and wait for that. Raises GuestError when it has not after `timeout`."""
        with self._lock:
            if attached not in self.attached:
                raise InputError("this machine does not have that device: give what its attach returned")
            if isinstance(attached.what, Mount) and shell is not None:
                there = attached.what.there
                status, said = shell(f"! grep -q ' {there} virtiofs ' /proc/mounts || umount {there} 2>&1")
                if status != 0:
                    raise GuestError(f"the guest cannot let {there} go: {said.strip()}")
            if not self._vm.detach(attached.device, timeout):
                raise GuestError(
                    f"the guest did not let the device go within {timeout:g} s: its system may not know how, or is not"
                    " up yet; when it does, the device is gone. Ask again to wait longer"
                )
            self.attached.remove(attached)

    def _of(self, kind: type) -> list[typing.Any]:
        return [attached.what for attached in self.attached if isinstance(attached.what, kind)]

    def _mount(self, text: Mount | str) -> Mount:
        mount = Mount.parse(text)
        others = [*self._mounts, *self._of(Mount)]
        mount = dataclasses.replace(mount, tag=mount.tag or f"mount{self._tags}")
        Mount.parse_all([*others, mount])  # its place and tag are its own
        self._tags += 1
        return mount

    def _network(self, net: str | Network, publish: str | Publish | Sequence[str | Publish]) -> Networks:
        asked = Networks.parse(self._networks.name, net, publish)
        if len(asked.networks) != 1:
            raise InputError("a card without a network cannot be attached: choose another one than none")
        network = asked.networks[0]
        others = [
            *self._networks.networks,
            *(card for found in self._of(Networks) for card in found.networks),
        ]
        if network.kind == "nat" and any(other.kind == "nat" for other in others):
            raise InputError("--net: one network of a machine leads out, not several")
        name = self._networks.name + self._networks.salt
        mac = network.mac or mac_of(name, self._cards)
        used = [other.mac or mac_of(name, at) for at, other in enumerate(others)]
        if mac in used:
            raise InputError(f"two cards have the address {mac.hex(':')}: give each its own")
        self._cards += 1
        card = dataclasses.replace(network, mac=mac)
        return dataclasses.replace(asked, networks=(card,), switches=self._networks.switches)

    def _new_ports(self, names: Sequence[str]) -> Ports:
        if terminals := [name for name in names if name.startswith("hvc")]:
            raise InputError(
                f"the terminal {terminals[0]} cannot be attached: the guest has it from the start"
            )
        for other in [self._ports, *self._of(Ports)]:
            if twice := set(names) & set(other.names):
                raise InputError(
                    f"this machine has a port {min(twice)!r} already: give each a name of its own"
                )
        return Ports(names)

    def ports_with(self, name: str) -> Ports | None:
        """Return the attached ports that have this one among them."""
        return next((ports for ports in self._of(Ports) if name in ports.names), None)


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0
