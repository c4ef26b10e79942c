"""What the operator asked of one VM: `GuestSpec`, checked, and as JSON for sockets and the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from ringzero.errors import InputError
from ringzero.host.runtime import checked_name
from ringzero.machine.disk import Disk
from ringzero.machine.machine import Machine
from ringzero.machine.mount import Mount
from ringzero.machine.network import Networks, Switches
from ringzero.machine.seed import Seed
from ringzero.machine.spec import MachineSpec, format_size, parse_size
from ringzero.policy import PAGE
from ringzero.policy.counters import MOST_SHARES

__all__ = ["DEFAULT_GROUP", "DEFAULT_SHARES", "GuestSpec"]

DEFAULT_SHARES = 1000
DEFAULT_GROUP = "default"
MOST_USER_DATA = 16 << 10
"""Bytes: what clouds take, too. The spec goes from process to process with it."""
LEAST_PART = 4
"""Without a min, a VM can always have this part of its size in machine memory."""


@dataclass(frozen=True)
class GuestSpec:
    """A VM of a host. Make one with `checked`. Sizes are bytes, whole pages."""

    name: str
    image: str | None
    memory: int
    min: int
    max: int
    shares: int = DEFAULT_SHARES
    group: str = DEFAULT_GROUP
    """Pages are shared by content within a group only."""
    cpus: int = 1
    engine: str = "direct"
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    shell: bool = True
    net: tuple[str, ...] = ()
    """As `Machine` has it; a switch is that of all VMs of the group that name it."""
    publish: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    mounts: tuple[Mount, ...] = ()
    persist: str | None = None
    seed: Seed | None = None

    @classmethod
    def checked(
        cls,
        *,
        name: str,
        image: str | None = None,
        memory: str | int = "128M",
        min: str | int | None = None,
        max: str | int | None = None,
        shares: int = DEFAULT_SHARES,
        group: str = DEFAULT_GROUP,
        cpus: int = 1,
        engine: str = "direct",
        kernel: str | None = None,
        initrd: str | None = None,
        append: str | None = None,
        shell: bool = True,
        net: str | Sequence[str] | None = None,
        publish: Sequence[str] = (),
        disks: Sequence[Disk | str] = (),
        mounts: Sequence[Mount | str] = (),
        persist: str | None = None,
        seed: Seed | None = None,
    ) -> Self:
        """Return a spec of which every field makes sense; sizes are bytes, or text like "128M".

        Whether files are there is seen when the VM starts: a spec outlives them. Without `min` a VM can always have a
        quarter of its memory, without `max` all of it. Raises InputError.
        """
        if image is None and kernel is None:
            image = "debian"
        machine = MachineSpec.checked(memory=memory, cpus=cpus, engine=engine, linux=False)
        size = machine.memory
        least = size // LEAST_PART if min is None else parse_size(min, "min")
        most = size if max is None else parse_size(max, "max")
        least, most = least - least % PAGE, most - most % PAGE
        if not 0 < least <= most <= size:
            raise InputError(
                f"min {format_size(least)}, max {format_size(most)} and memory {format_size(size)} must rise from one"
                " to the next"
            )
        if isinstance(shares, bool) or not isinstance(shares, int) or not 1 <= shares <= MOST_SHARES:
            raise InputError(f"{shares!r:.40} shares cannot be: give a number from 1 to {MOST_SHARES}")
        nets = (net,) if isinstance(net, str) else tuple(net or ())
        if any(network.tenant for network in Networks.parse(name, nets, publish).networks):
            raise InputError("--net: a vm of a host has its share group's switches: leave tenant= away")
        read = tuple(disk if isinstance(disk, Disk) else Disk.read(disk) for disk in disks)
        folders = tuple(mount if isinstance(mount, Mount) else Mount.read(mount) for mount in mounts)
        files: list[str | Path | None] = [kernel, initrd, persist]
        files += [file for disk in read for file in (disk.path, disk.overlay, disk.backing)]
        files += [mount.here for mount in folders]
        for file in files:
            if file is not None and not Path(file).is_absolute():
                raise InputError(
                    f"{file} is a relative path, and the daemon is elsewhere: give an absolute one"
                )
        if seed is not None and len(seed.user_data or b"") > MOST_USER_DATA:
            raise InputError(f"the user-data of a host's vm is {MOST_USER_DATA >> 10} KiB long at most")
        return cls(
            name=checked_name(name),
            image=image,
            memory=size,
            min=least,
            max=most,
            shares=shares,
            group=checked_name(group),
            cpus=cpus,
            engine=engine,
            kernel=kernel,
            initrd=initrd,
            append=append,
            shell=bool(shell),
            net=nets,
            publish=tuple(publish),
            disks=read,
            mounts=folders,
            persist=persist,
            seed=seed,
        )

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return the spec that `as_json` made, or that a client sent. Raises InputError for anything else."""
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise InputError(f"a vm is described by an object with a name, not by {values!r:.60}")
        known = {field.name: field.type for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise InputError(f"a vm has no {key!r:.40}: there is {', '.join(known)}")
            if key in ("image", "kernel", "initrd", "append", "group", "engine", "persist"):
                if value is not None and not isinstance(value, str):
                    raise InputError(f"{key} is {value!r:.40}, and must be text")
            elif key == "net" and isinstance(value, str):
                pass  # as an earlier daemon kept it
            elif key in ("net", "publish", "disks", "mounts"):
                if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
                    raise InputError(f"{key} is {value!r:.40}, and must be a list of texts")
            elif key in ("memory", "min", "max") and isinstance(value, bool | float | list | dict):
                raise InputError(f"{key} is {value!r:.40}, and must be a size")
        given = {key: value for key, value in values.items() if value is not None}
        if "seed" in given:
            given["seed"] = Seed.from_json(given["seed"])
        return cls.checked(**given)

    def as_json(self) -> dict[str, Any]:
        """Return the fields, as JSON knows them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "disks": [str(disk) for disk in self.disks],
            "mounts": [str(mount) for mount in self.mounts],
            "seed": None if self.seed is None else self.seed.as_json(),
        }

    def switched(self) -> list[tuple[int, str, bytes]]:
        """Return the cards that are on switches: number, switch and address."""
        networks = Networks.parse(self.name, self.net, self.publish)
        return [
            (number, network.switch, networks.mac(number))
            for number, network in enumerate(networks.networks)
            if network.kind == "switch"
        ]

    def machine(self, switches: Switches | None = None) -> Machine:
        """Return the machine, not started; `switches` has its cards' cables. Raises InputError for what cannot be."""
        return Machine(
            self.image,
            memory=self.memory,
            cpus=self.cpus,
            engine=self.engine,
            kernel=self.kernel,
            initrd=self.initrd,
            append=self.append,
            shell=self.shell,
            net=self.net or None,
            publish=self.publish,
            disks=self.disks,
            mounts=self.mounts,
            persist=self.persist,
            seed=self.seed,
            name=self.name,
            switches=switches,
        )
