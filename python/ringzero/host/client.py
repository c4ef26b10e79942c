"""The Python API of a host with many guests: `Host`, and the VMs it has.

    from ringzero import Host
    with Host.connect(start=True) as host:
        vm = host.up("debian", memory="128M")
        print(vm.run(["uname", "-a"], check=True, text=True).stdout)
        print(vm.memory.pages)

A `Host` is a connection to the daemon of this user (ringzero.host.daemon); a `HostVm` is a name on it, and talks to
the VM's own process where it can, so that consoles and commands go on when the daemon does not.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ringzero.errors import GuestEnded, GuestError, InputError, InternalError
from ringzero.host.runtime import Runtime
from ringzero.host.spec import DEFAULT_GROUP, DEFAULT_SHARES, GuestSpec
from ringzero.host.state import Event
from ringzero.host.wire import Channel, connect
from ringzero.machine.disk import Disk
from ringzero.machine.drive import Driven
from ringzero.machine.exec import AgentLink
from ringzero.machine.mount import Mount
from ringzero.policy import PAGE

__all__ = ["Event", "Host", "HostVm", "VmMemoryFacts"]

_BOOT_LIMIT = 600.0
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
_AGENT_LIMIT = 30.0
"""Seconds that a VM's process may take to answer for the guest's agent."""
_DYING = 1.0
"""Seconds that a daemon which is being killed may still hold its lock."""


class Host:
    """A connection to the host daemon. One thread at a time; make another one for another thread."""

    def __init__(self, channel: Channel, runtime: Runtime) -> None:
        self._channel = channel
        self._runtime = runtime
        self._links: dict[str, AgentLink] = {}

    @classmethod
    def connect(
        cls, root: str | os.PathLike[str] | None = None, *, start: bool = False, **options: Any
    ) -> Host:
        """Connect to the daemon whose runtime folder is `root`; this user's own without.

        With `start` one is started where none runs, with the options of `start_daemon`. Raises InputError when no
        daemon runs.
        """
        runtime = Runtime.default() if root is None else Runtime(Path(root).absolute())
        end = time.monotonic() + _DYING
        while True:
            try:
                channel = Channel(connect(runtime.socket, timeout=None))
                channel.ask("status")  # one that is being killed lets connect, and says no more
                return cls(channel, runtime)
            except OSError:
                if not start:
                    raise InputError(
                        f"no host daemon runs (with the runtime folder {runtime.root}): `ringzero host start` starts"
                        " one"
                    ) from None
            from ringzero.host.launch import start_daemon

            try:
                start_daemon(runtime, **options)
            except InputError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        """Close the connection; the daemon and its VMs go on."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._channel.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Ask the daemon for anything (ringzero.host.daemon has the list). Raises InputError, InternalError."""
        try:
            return self._channel.ask(do, **fields)
        except OSError as error:
            raise InputError(f"the host daemon has ended: {error}; its vms go on") from error

    # --- VMs

    def up(
        self,
        image: str | None = None,
        *,
        name: str | None = None,
        memory: str | int = "128M",
        min: str | int | None = None,
        max: str | int | None = None,
        shares: int = DEFAULT_SHARES,
        share_group: str = DEFAULT_GROUP,
        wait: bool = True,
        **machine: Any,
    ) -> HostVm:
        """Start a VM; with `wait`, wait until its guest has booted (or, without our agent in it, has started).

        Sizes are bytes, or text like "128M". `min` is what it can always have of the host's memory (a quarter of
        `memory` if nothing is said), `max` what it never has more of. VMs of one `share_group` share pages of equal
        content. `machine` are `cpus`, `engine`, `kernel`, `initrd`, `append`, `net`, `publish`, `disks`, `mounts`,
        `persist` and `seed` as `Machine` has them. Raises InputError when the host cannot keep what it would promise,
        with the sum.
        """
        (vm,) = self.up_many(
            1,
            image,
            name=name,
            memory=memory,
            min=min,
            max=max,
            shares=shares,
            share_group=share_group,
            wait=wait,
            **machine,
        )
        return vm

    def up_many(
        self,
        count: int,
        image: str | None = None,
        *,
        name: str | None = None,
        share_group: str = DEFAULT_GROUP,
        wait: bool = True,
        **options: Any,
    ) -> list[HostVm]:
        """Start `count` VMs, all of them or none; options as `up` has them. Their names are NAME-1, NAME-2 ..."""
        specs = self.specs(count, image, name=name, group=share_group, **options)
        answer = self.ask("up", specs=[spec.as_json() for spec in specs], wait=wait)
        vms = [HostVm(self, row["name"]) for row in answer["vms"]]
        for row in answer["vms"]:
            if row["phase"] == "ended":
                raise GuestEnded(f"vm {row['name']!r} ended as it started: {row['reason']}", row["reason"])
        return vms

    def specs(
        self, count: int, image: str | None = None, *, name: str | None = None, **options: Any
    ) -> list[GuestSpec]:
        """Return the specs of `count` VMs with names that are free; the image is fetched if need be."""
        if not 1 <= count <= 1000:
            raise InputError(f"{count} vms cannot be started: give a number from 1 to 1000")
        if image is None and options.get("kernel") is None:
            image = "debian"
        if image is not None:
            from ringzero import images

            if images.is_disk(image):
                from ringzero.machine.disk_image import disk_image

                # Here, too, so that what is wrong with it is told at once; the daemon finds it in the cache.
                found = disk_image(image, options.get("persist"))
                image = f"{os.path.abspath(found.name)},format={found.disk_format}"
            elif images.find(image) is None:
                from ringzero.machine.installer import run_guest

                images.pull(image, run_guest=run_guest)
        for file in ("kernel", "initrd"):
            if options.get(file) is not None:
                options[file] = os.path.abspath(options[file])
                if not os.path.isfile(options[file]):
                    raise InputError(f"{file} {options[file]} is not a regular file: check the path")
        # The daemon is elsewhere: what is a relative path here means nothing there.
        options["disks"] = [Disk.read(str(Disk.parse(disk))) for disk in options.get("disks") or ()]
        options["mounts"] = [Mount.read(str(Mount.parse(mount))) for mount in options.get("mounts") or ()]
        if options.get("persist") is not None:
            options["persist"] = os.path.abspath(options["persist"])
        written = [os.fspath(disk.path) for disk in options["disks"] if disk.is_for_one]
        if count > 1 and (written or options.get("persist") is not None):
            raise InputError(
                f"{count} vms cannot all write to {(written or [options['persist']])[0]}: add ,overlay or ,ro to the"
                " disk, or start them one by one"
            )
        base = name or _name_of(image)
        if count == 1 and name is not None:
            names = [name]
        else:
            taken = {row["name"] for row in self.ask("list")["vms"]}
            free = (one for number in range(1, 1_000_000) if (one := f"{base}-{number}") not in taken)
            names = [next(free) for _ in range(count)]
        return [GuestSpec.checked(name=one, image=image, **options) for one in names]

    def vms(self) -> list[HostVm]:
        """Return all VMs, those that have ended and were not taken down as well."""
        return [HostVm(self, row["name"]) for row in self.ask("list")["vms"]]

    def vm(self, name: str) -> HostVm:
        """Return a VM by its name. Raises InputError when there is none."""
        self.ask("list", names=[name])
        return HostVm(self, name)

    def down(self, *names: str, now: bool = False) -> None:
        """Take VMs down: ask them to power off, and pull their plugs after 10 s; at once with `now`."""
        if names:
            self.ask("down", names=list(names), now=now)

    # --- to see it

    def top(self) -> dict[str, Any]:
        """Return what `ringzero host top` shows: "host", whose amounts are in pages of 4 KiB, and "vms"."""
        return self.ask("list", closely=True)

    def metrics(self) -> str:
        """Return metrics in the text format of Prometheus."""
        return str(self.ask("metrics")["text"])

    def audit(self) -> dict[str, list[str]]:
        """Have every VM derive the invariants of its memory again, and the sharer those of its pools: by name, that of
        the sharer being "sharer", a sentence for each that does not hold.
        """
        found = {"sharer": [str(fault) for fault in self.ask("audit")["faults"]]}
        for vm in self.vms():
            with contextlib.suppress(GuestEnded), vm.channel() as channel:
                channel.connection.settimeout(60.0)
                found[vm.name] = [str(fault) for fault in channel.ask("audit")["faults"]]
        return found

    # --- what happens

    def events(self, after: int = 0, *, most: int = 1000) -> list[Event]:
        """Return what happened, the newest `most` behind event number `after`, the oldest first."""
        return [Event(**one) for one in self.ask("events", after=after, most=most)["events"]]

    def watch(self, timeout: float | None = None) -> Iterator[Event]:
        """Give each event as it happens, on a connection of its own; ends when none came for `timeout` seconds, or
        the daemon has ended.
        """
        with Channel(connect(self._runtime.socket, timeout=None)) as channel:
            channel.ask("watch")
            channel.connection.settimeout(timeout)
            while True:
                try:
                    got = channel.receive()
                except TimeoutError:
                    return
                if got is None:
                    return
                message = dict(got[0])
                if message.pop("event", None) == "event":
                    yield Event(**message)

    def status(self) -> dict[str, Any]:
        """Return what the daemon says of itself: pid, fork server, memory (bytes), VMs by phase."""
        return self.ask("status")

    def stop(self) -> int:
        """End the daemon, and return how many VMs go on without it."""
        living = int(self.ask("stop")["vms"])
        with contextlib.suppress(OSError, InternalError):
            self._channel.connection.settimeout(10.0)
            while self._channel.receive() is not None:
                pass
        return living


@dataclass(frozen=True)
class HostVm(Driven):
    """A VM of a host."""

    host: Host
    name: str

    def row(self) -> dict[str, Any]:
        """Return what the daemon knows of it: phase, pid, began and ended (seconds since 1970), reason, spec."""
        return self._row()

    def _row(self, **how: bool) -> dict[str, Any]:
        (row,) = self.host.ask("list", names=[self.name], **how)["vms"]
        return dict(row)

    @property
    def phase(self) -> str:
        """How it goes: "waiting", "booting", "running", or "ended"."""
        return str(self.row()["phase"])

    @property
    def reason(self) -> str | None:
        """Why it ended; None while it has not."""
        reason = self.row()["reason"]
        return None if reason is None else str(reason)

    def wait_ready(self, timeout: float = _BOOT_LIMIT) -> None:
        """Wait until its guest has booted. Raises GuestEnded, and GuestError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (row := self.row())["phase"] != "running":
            if row["phase"] == "ended":
                raise GuestEnded(f"vm {self.name!r} has ended: {row['reason']}", row["reason"])
            if time.monotonic() > end:
                raise GuestError(f"vm {self.name!r} has not booted within {timeout:g} s")
            time.sleep(0.05)

    def down(self, *, now: bool = False) -> None:
        """Take it down; see `Host.down`."""
        self.host.down(self.name, now=now)

    @property
    def memory(self) -> VmMemoryFacts:
        """Its memory, as the daemon last heard of it: every few seconds, and more often while somebody looks."""
        row = self._row(closely=True)
        target = row["target"]
        return VmMemoryFacts(
            size=row["spec"]["memory"],
            min=row["spec"]["min"],
            max=row["spec"]["max"],
            target=None if target is None else target * PAGE,
            pages=row["pages"],
            stats=row["done"]
            | {f"balloon_{key}": value for key, value in row["balloon"].items()}
            | row["swap"],
            active=row["active"],
            own=row["own"],
        )

    def memory_states(self) -> bytes:
        """Return the state of every page, by address: a byte each, its place in `ringzero.host.vm_memory.STATES`."""
        from ringzero.host.map import unpacked_states

        with self.channel() as channel:
            return unpacked_states(str(channel.ask("states")["states"]))

    def channel(self) -> Channel:
        """Return a connection to its process (ringzero.host.vm_process). Raises GuestEnded when there is none."""
        try:
            return Channel(connect(self.host._runtime.control(self.name)))
        except OSError:
            raise GuestEnded(f"vm {self.name!r} has no process", None) from None

    def open_console(self) -> tuple[socket.socket, bytes]:
        """Return a stream joined to the guest's console, both ways, and what was read from it already; it begins with
        what the guest last printed. Many may have it open at once. The caller closes it.
        """
        channel = self.channel()
        try:
            channel.ask("console")
        except BaseException:
            channel.close()
            raise
        channel.connection.settimeout(None)
        return channel.connection, channel.rest()

    def agent_link(self) -> AgentLink:
        """Return a line to the guest's agent, through the VM's process: one for each VM of a `Host`, until it ends.

        The guest must have booted. Raises GuestEnded, and InputError when it has no agent or has not booted.
        """
        link = self.host._links.get(self.name)
        if link is None or link.ended:
            channel = self.channel()
            try:
                channel.ask("agent")
            except BaseException:
                channel.close()
                raise
            channel.connection.settimeout(None)
            link = self.host._links[self.name] = AgentLink(channel.connection, channel.rest())
        if not link.wait_ready(_AGENT_LIMIT):
            raise GuestEnded(f"vm {self.name!r} has ended", self.why_ended())
        return link

    def why_ended(self) -> str | None:
        """Return why it ended, as the daemon knows it; None while it has not heard of it."""
        end = time.monotonic() + 1.0
        with contextlib.suppress(InputError):
            while (reason := self.reason) is None and time.monotonic() < end:
                time.sleep(0.02)
            return reason
        return None


@dataclass(frozen=True)
class VmMemoryFacts:
    """The memory of a VM. Sizes are bytes; pages have 4 KiB."""

    size: int
    """What the guest believes to have."""
    min: int
    """What it can always have, in machine memory."""
    max: int
    """What it never has more of."""
    target: int | None
    """What it is entitled to now; None before the policy has decided."""
    pages: dict[str, int]
    """Pages by state: zero (they take nothing), private, shared, image, ballooned, compressed, swapped."""
    stats: dict[str, int]
    """What was done with its pages since its start, and what the balloon and the swap store tell."""
    active: float
    """The part of its memory that it uses, from samples."""
    own: int | None
    """What the monitor takes beside the guest's pages; None before it was weighed."""


def _name_of(image: str | None) -> str:
    """Return what VMs of an image are called if nothing is said: by its name, or that of its file."""
    if image is None:
        return "vm"
    base = os.path.basename(image.partition(",format=")[0]).partition(".qcow2")[0]
    return _NOT_IN_NAMES.sub("-", base.lower()).strip("-._")[:40] or "vm"
