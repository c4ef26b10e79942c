"""A machine to start, drive, watch and stop: the class that most users of ringzero need.

    with Machine("debian", memory="512M") as vm:
        print(vm.run(["uname", "-a"], capture_output=True, check=True, text=True).stdout)

A `Machine` lives once: made, started, ended. It holds a core VM, the console on the first serial port, and,
when the image has our agent, a link to it on the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ringzero.errors import GuestEnded, GuestError, InputError, InternalError
from ringzero.machine.agent_way import AGENT_NAME, AgentWay
from ringzero.machine.console import Console, Sink
from ringzero.machine.disk import Disk
from ringzero.machine.drive import Driven
from ringzero.machine.firmware import virtio_mmio
from ringzero.machine.hotplug import PATIENCE, Attached, Plugs
from ringzero.machine.memory import MachineMemory
from ringzero.machine.mount import Mount
from ringzero.machine.network import GuestListener, Network, Networks, Publish, Switches
from ringzero.machine.ports import Ports
from ringzero.machine.seed import SEED_WORD, Seed
from ringzero.machine.spec import MachineSpec, parse_size
from ringzero.machine.translations import translation_folder
from ringzero.machine.vsock import Vsock

if TYPE_CHECKING:
    from ringzero import _core
    from ringzero.images import Image
    from ringzero.machine.agent_lines import Lines
    from ringzero.machine.assemble import BootFiles
    from ringzero.machine.exec import AgentLink
    from ringzero.machine.metadata_server import MetadataServer

CONSOLE_PORT = 0
# A guest boots in seconds when translated and in minutes when interpreted; a host may be busy as well.
READY_TIMEOUT = 600.0
# An agent that was there and was lost is started again at once, where it is.
AGAIN_TIMEOUT = 20.0
# How long a panicked kernel must have been silent before we believe that it stands still for ever.
PANIC_SILENCE = 0.5

_UNNAMED = itertools.count()
"""Tells machines of this process apart that have no name."""

# Printed by the kernel's panic() (kernel/panic.c, Linux 6.1): the first line always, the last one only when
# it does not restart the machine but stops for good. Both may begin with the time, or with the level of a raw
# kernel message.
PANIC_LINE = re.compile(rb"^(?:<\d+>)?(?:\[[ \d.]+\] ?)?(Kernel panic - not syncing: [^\r\n]*)", re.MULTILINE)
PANIC_END = re.compile(
    rb"^(?:<\d+>)?(?:\[[ \d.]+\] ?)?---\[ end Kernel panic - not syncing[^\n]*\s*\Z", re.MULTILINE
)


class Machine(Driven):
    """A virtual machine with its guest."""

    def __init__(
        self,
        image: str | Image | None = None,
        *,
        memory: str | int = "256M",
        cpus: int = 1,
        engine: str = "direct",
        cpu: str = "",
        kaslr: bool = False,
        transport: str = "pci",
        kernel: str | os.PathLike[str] | None = None,
        initrd: str | os.PathLike[str] | None = None,
        append: str | None = None,
        devices: Sequence[Any] = (),
        disks: Sequence[Disk | str | os.PathLike[str]] = (),
        mounts: Sequence[Mount | str] = (),
        persist: str | os.PathLike[str] | None = None,
        seed: Seed | None = None,
        ports: Sequence[str] = (),
        vsock: bool | str | os.PathLike[str] = False,
        net: str | Network | Sequence[str | Network] | None = None,
        publish: str | Publish | Sequence[str | Publish] = (),
        name: str | None = None,
        switches: Switches | None = None,
        console: Sink | None = None,
        agent: bool | str = True,
        shell: bool = True,
        quiet: bool = True,
        count_instructions: bool = False,
        profile: bool = False,
        trace: str | os.PathLike[str] | None = None,
        translation_cache: bool | str | os.PathLike[str] = True,
        translation_memory: str | int | None = None,
    ) -> None:
        """Describe a machine; nothing runs yet. Raises InputError for what can be seen to be wrong already.

        `image` is a name ("debian", "debian:6.12", "hello"), fetched at `start` when it is not on this
        machine, or a disk with a system on it ("./debian-12-genericcloud-amd64.qcow2"); the default is "debian",
        unless a `kernel` file is given: then that boots, with `initrd` and `append`, and with an image too it takes
        the place of the image's kernel. `append` adds words to the kernel's command line. `memory` is bytes, or a
        size like "512M". `cpu` adds features to the processors, each of which makes a guest that uses it slower:
        "+pku,+pks". `devices` are slow devices in Python (ringzero.devices.Device), or names of ours ("debug-exit").
        `disks` are files ("FILE", "FILE,ro", or a Disk:
        docs/disks.md), virtio disks in the guest, in this order: our images have /dev/vda and so on before the
        first command, with the kernel that belongs to them. `mounts` are folders of this host ("./here:/there",
        "./here:/there:ro"), which our images mount before the first command. `ports` are names of channels to
        programs of the guest (see `port`); with `vsock` there are sockets between the two (see `vsock`), by the
        name of a Unix socket as well if that is what it is. `net` is a network, or several with a card each: "nat",
        "allow=192.0.2.0/24:443" (see ringzero.machine.network); `publish` are ports of this host that lead to the
        guest: "8080:80". `name` is what the guest's network calls it, and what the addresses of its cards come from.
        `switches` joins its cards to the switches of this user's other processes (ringzero.host.switches.HostSwitches).
        `console` is given every piece of console output.
        An image with a root disk (debian-full, a disk of yours) has it as the first disk, with an overlay that is gone
        when the machine is; with `persist`, the overlay is the qcow2 image of that name, made when it is not there yet.
        `seed` says what the guest shall be made into when it first boots, on a read-only disk after the others.
        `agent` and `shell` choose what an image with our agent starts: commands for `run`, and a login shell on the
        console. The agent begins on a serial port, which is there at once, and goes on over a virtio port; "serial",
        "port" and "vsock" have it keep to one of these. Without `quiet` the kernel's messages show. With `kaslr` a
        bzImage unpacks itself, at a random address, and no translations are kept; otherwise it is unpacked before it
        starts, and runs where it was linked to run. `trace` names a file for a trace of every instruction. With
        `profile` the counters named profile.* say what the processors did, in samples. `translation_cache` keeps
        translations for later machines: in this user's cache, in a folder of its own, or not at all.
        `translation_memory` (bytes, or a size) limits what translated code takes of the host; by itself it is an
        eighth of `memory`.
        """
        if image is None and kernel is None:
            image = "debian"
        if isinstance(image, str):
            from ringzero.images import is_disk, resolve

            if not is_disk(image):
                resolve(image)
        self._image = image
        # The kernel and its command line are filled in at `start`, when an image is known to be here.
        self.spec = MachineSpec.checked(
            memory=memory, cpus=cpus, engine=engine, cpu=cpu, kaslr=kaslr, transport=transport, linux=False
        )
        self._kernel = Path(kernel) if kernel is not None else None
        self._initrd = Path(initrd) if initrd is not None else None
        self._append = append or ""
        self._devices = list(devices)
        self._disks = [Disk.parse(disk) for disk in disks]
        self._mounts = Mount.parse_all(mounts)
        self._opened_disks: list[_core.Disk] = []
        self._persist = persist
        self._seed = seed
        if AGENT_NAME in ports:
            raise InputError(f"the port {AGENT_NAME} is the agent's own: agent='port' has it use no other")
        self._ports = Ports(ports)
        self._way = AgentWay(agent)
        self._vsock = Vsock.parse(vsock or self._way.needs_vsock)
        self.networks = Networks.parse(name or "ringzero", net, publish)
        if switches is not None:
            self.networks.switches = switches
            # Machines of several processes that have no name do not share an address.
            self.networks.salt = "" if name else f"\0{os.getpid()} {next(_UNNAMED)}"
        self._metadata: MetadataServer | None = None
        if names := [device for device in self._devices if isinstance(device, str)]:
            from ringzero.devices import check_names

            check_names(names)
        self._sink = console
        self._with_shell = shell
        self._quiet = quiet
        self._count_instructions = count_instructions
        self._profile = profile
        self._trace = os.fspath(trace) if trace is not None else None
        # At a random address no later machine finds them, and they would displace those that are found.
        self._translations = None if kaslr else translation_folder(translation_cache)
        self._translation_bytes = None if translation_memory is None else parse_size(translation_memory)
        self._core_vm: _core.Vm | None = None
        self._plugs: Plugs | None = None
        self._console: Console | None = None
        self._has_agent = False
        self._agent: AgentLink | None = None
        self._running = False
        self._ended = threading.Event()
        self._end_reason: str | None = None
        self._lock = threading.Lock()

    # --- life
    # -------------------------------------------------------------------------------------------------

    def start(self) -> Machine:
        """Fetch the image if need be, put the machine together and let it run. Returns at once, with
        itself.
        """
        with self._lock:
            if self._core_vm is not None:
                raise InputError("this machine was started already: make another one")
            image = self.resolved_image()
            with core_errors(), self._with_disks_of(image):
                vm = self._assembled(image)
                self._console = Console(_line(vm, CONSOLE_PORT), self._sink)
                lines = self.agent_lines(vm)
                if lines is not None:
                    from ringzero.machine.exec import AgentLink

                    self._agent = AgentLink(lines)
                vm.start()
            if self._metadata is not None:
                self._metadata.start()
            self._plugs = Plugs(vm, self.spec.cpus, self.networks, self._mounts, self._ports)
            self._core_vm = vm
            self._running = True
        threading.Thread(target=self._watch, name="ringzero-watch", daemon=True).start()
        return self

    def wait(self, timeout: float | None = None) -> str | None:
        """Wait until the machine ends and return why (see `end_reason`); None when `timeout` (seconds) passed
        first.
        """
        self._vm  # noqa: B018 - raises when it was not started
        return self._end_reason if self._ended.wait(timeout) else None

    def stop(self) -> None:
        """End the machine, at once, as if its plug were pulled. Does nothing when it has ended or was not
        started.
        """
        vm = self._core_vm
        if vm is None:
            return
        if not self._ended.is_set():
            with core_errors():
                vm.stop()
            self._ended.wait()
        if self._agent is not None:
            self._agent.close()
        if self._console is not None:
            self._console.close()

    def request_stop(self) -> None:
        """Ask for what `stop` does without waiting for it: from a sink, or a signal handler."""
        if self._core_vm is not None:
            self._core_vm.stop()

    def power_off(self, timeout: float | None = 30.0) -> str | None:
        """Ask the guest to power itself off, through its agent, and wait for it as `wait` does."""
        self._link().power_off()
        return self.wait(timeout)

    def pause(self) -> None:
        """Stop the processors between two instructions: registers and memory can be read then."""
        with core_errors():
            self._vm.pause()

    def resume(self) -> None:
        """Let a paused machine go on; what it was paused for, if a disk could not be written, is tried again."""
        with core_errors():
            self.retry_disks()
            self._vm.resume()

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The disks; with the image's own, once the machine is put together."""
        return tuple(self._disks)

    def retry_disks(self) -> None:
        """Try again what could not be written. Raises the core's own errors."""
        for disk in self._opened_disks:
            disk.retry()

    def attach(
        self,
        *,
        disk: Disk | str | os.PathLike[str] | None = None,
        mount: Mount | str | None = None,
        net: str | Network | None = None,
        publish: str | Publish | Sequence[str | Publish] = (),
        ports: Sequence[str] = (),
    ) -> Attached:
        """Give the running machine one device more, and return it for `detach`.

        The values are those that a machine starts with. Waits until a guest with our agent has a driver for it, and has
        mounted the folder or has an address on the network: a disk is the next /dev/vdX. Of another guest it is only
        known that it was told. Raises GuestError when the guest has no driver.
        """
        with core_errors():
            return self._plugged.attach(
                self._shell(), disk=disk, mount=mount, net=net, publish=publish, ports=ports
            )

    def detach(self, device: Attached, timeout: float = PATIENCE) -> None:
        """Have the guest let a device go that `attach` returned, and wait for that up to `timeout` seconds.

        A file system on a disk should be unmounted first, as with a real disk: the guest is not asked whether it likes
        to. Raises GuestError when the guest does not let go in time; it can be asked again.
        """
        with core_errors():
            self._plugged.detach(self._shell(), device, timeout)

    @property
    def attached(self) -> list[Attached]:
        """The devices that came while the machine ran."""
        return list(self._plugged.attached)

    @property
    def _plugged(self) -> Plugs:
        if self._plugs is None:
            raise InputError("the machine was not started: devices can be given to it when it is made")
        if self._ended.is_set():
            raise GuestEnded(
                f"the machine has ended ({self._end_reason}): it takes no devices", self._end_reason
            )
        return self._plugs

    def _shell(self) -> Callable[[str], tuple[int, str]] | None:
        """Return how a script is run in this guest; None when it has no agent."""
        if self._agent is None:
            return None

        def run(script: str) -> tuple[int, str]:
            done = self.run(["sh", "-c", script], capture_output=True, text=True)
            return done.returncode, done.stdout

        return run

    def disk_troubles(self) -> list[str]:
        """Return a sentence for each disk that the host cannot write to as the guest wants: the machine is paused until
        `resume`, and nothing is lost.
        """
        pairs = list(zip(self._disks, self._opened_disks, strict=False))
        pairs += self._attached_disks()
        return [
            f"the disk {disk.path}: {why}" for disk, opened in pairs if (why := opened.trouble()) is not None
        ]

    def _attached_disks(self) -> list[tuple[Disk, _core.Disk]]:
        attached = self._plugs.attached if self._plugs is not None else []
        return [(one.what, cast("_core.Disk", one.device)) for one in attached if isinstance(one.what, Disk)]

    def disk_stats(self) -> list[dict[str, int]]:
        """Return what was done with each disk: numbers of requests by kind, and bytes."""
        return [disk.stats() for disk in self._opened_disks]

    def limit_disk(self, number: int, *, iops: int = 0, bps: int = 0) -> None:
        """Set how many operations and bytes a second a disk, counted from 0, may do from now on; 0 for no limit."""
        if not 0 <= number < len(self._opened_disks):
            raise InputError(
                f"there is no disk {number}: the machine has {len(self._opened_disks)}, counted from 0"
            )
        with core_errors():
            self._opened_disks[number].limit(iops=iops, bps=bps)

    def __enter__(self) -> Machine:
        return self.start() if self._core_vm is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def end_reason(self) -> str | None:
        """Why the machine ended: 'poweroff', 'reboot', 'panic', 'triple-fault', 'stopped', 'error: ...'; None
        before.
        """
        return self._end_reason

    # --- the guest
    # --------------------------------------------------------------------------------------------

    @property
    def console(self) -> Console:
        """The guest's first serial port: read, write, expect."""
        if self._console is None:
            raise InputError("the machine was not started: its console is not there yet")
        return self._console

    def expect(
        self, pattern: str | bytes | re.Pattern[str] | re.Pattern[bytes], timeout: float = 30.0
    ) -> re.Match[str] | re.Match[bytes]:
        """Wait until the console shows a pattern; see Console.expect. For guests without our agent."""
        return self.console.expect(pattern, timeout)

    def port(self, name: str) -> socket.socket:
        """Return a stream socket joined to one of the machine's `ports`: once, and again when it is closed.

        What is sent waits until a program of the guest has opened the port (/dev/virtio-ports/NAME with udev,
        /dev/vport0pN elsewhere, or a terminal: /dev/hvc0); what the guest sends while nobody is joined is gone.
        """
        attached = self._plugs.ports_with(name) if self._plugs is not None else None
        with core_errors():
            return (attached or self._ports).join(name)

    @property
    def vsock(self) -> Vsock:
        """Sockets between programs of the guest and this process: `connect(port)` and `listen(port)`."""
        if self._vsock is None:
            raise InputError("this machine has no vsock: make it with vsock=True")
        return self._vsock

    @property
    def has_agent(self) -> bool:
        """Whether the guest was started with our agent, so that it can run commands."""
        return self._agent is not None

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the guest has booted and its agent takes commands; False when `timeout` (seconds) passed
        first.

        Raises GuestEnded when the guest ends instead.
        """
        link = self._link()
        if link.wait_ready(timeout):
            return True
        if link.ended and self._ended.wait(5.0):
            raise GuestEnded(
                f"the guest ended ({self._end_reason}) before it took a command", self._end_reason
            )
        return False

    def agent_link(self) -> AgentLink:
        """Return the line to the guest's agent, once that has said that it is there."""
        limit = AGAIN_TIMEOUT if self._link().was_ready else READY_TIMEOUT
        if not self.wait_ready(limit):
            raise GuestError(f"the guest's agent did not answer within {limit:g} s")
        return self._link()

    def why_ended(self) -> str | None:
        """Return why the guest ended, which may be known a moment after its lines have."""
        self._ended.wait(1.0)
        return self._end_reason

    def resize_console(self, rows: int, columns: int) -> None:
        """Tell the guest the size of the console's window; without an agent in it, it cannot be told."""
        if self._agent is not None and not self._ended.is_set() and self._agent.wait_ready(0):
            self._agent.resize_console(rows, columns)

    # --- looking inside
    # ---------------------------------------------------------------------------------------

    def registers(self, cpu: int = 0) -> dict[str, int]:
        """Return the registers of a processor of a machine that is paused or has ended."""
        with core_errors():
            return self._vm.registers(cpu)

    def read_memory(self, address: int, size: int) -> bytes:
        """Read `size` bytes at a guest physical address of a machine that is paused or has ended."""
        with core_errors():
            return self._vm.read_memory(address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """Write to guest physical memory of a machine that is paused."""
        with core_errors():
            self._vm.write_memory(address, data)

    def memory_map(self) -> list[tuple[int, int, str]]:
        """Return (first address, size, kind) rows of the guest's physical addresses."""
        with core_errors():
            return self._vm.memory_map()

    @property
    def memory(self) -> MachineMemory:
        """The guest's memory: its size, its pages by state, its balloon."""
        return MachineMemory(self._vm, self.spec.memory)

    def stats(self) -> dict[str, int]:
        """Return the counters by dotted name."""
        with core_errors():
            return self._vm.stats()

    def panic_message(self) -> str | None:
        """Return the kernel's own line about its panic, if the console has shown one."""
        found = PANIC_LINE.findall(self._console.tail()) if self._console is not None else []
        return found[-1].decode("utf-8", "replace") if found else None

    # --- inside
    # -----------------------------------------------------------------------------------------------

    def _assembled(self, image: Image, files: BootFiles | None = None) -> _core.Vm:
        """Put the machine together. Raises the core's own errors, too."""
        from ringzero.machine.assemble import assemble

        self._metadata = self._metadata_server()
        self._has_agent = image.agent and bool(self._way)
        if self._has_agent and self._way.needs_port:
            self._ports.add_own(AGENT_NAME)
        return assemble(
            self._completed_spec(image),
            self._devices,
            count_instructions=self._count_instructions,
            profile=self._profile,
            trace=self._trace,
            translations=self._translations,
            translation_bytes=self._translation_bytes,
            disks=self._disks,
            mounts=self._mounts,
            opened=self._opened_disks,
            ports=self._ports,
            vsock=self._vsock,
            networks=self.networks,
            files=files,
        )

    def _metadata_server(self) -> MetadataServer | None:
        """Return the service that tells the guest about itself, if its network leads there and nobody else is there."""
        told = self.networks.told()
        if told is None:
            return None
        from ringzero.machine.metadata import InstanceMetadata, instance_of
        from ringzero.machine.metadata_server import ADDRESS, MetadataServer

        if any(service.address == ADDRESS for service in self.networks.services):
            return None
        listener = GuestListener(ADDRESS)
        self.networks.services.append(listener)
        address, mac = told
        seed = self._seed or Seed()
        instance = seed.instance if self._seed is not None else instance_of(self.networks.name)
        name = seed.hostname or self.networks.name
        return MetadataServer(
            listener, InstanceMetadata(instance, name, address, mac, seed.ssh_keys, seed.user_data)
        )

    @property
    def metadata(self) -> MetadataServer | None:
        """What answers the guest at 169.254.169.254, from `start` or `assembled` on: `start` gives it a thread, and who
        has called `assembled` calls its `work`.
        """
        return self._metadata

    def file_names(self) -> tuple[Path | None, Path | None]:
        """Return the kernel and the initramfs that this machine starts from; the image is fetched if need be."""
        image = self.resolved_image()
        return (image.kernel, image.initrd)

    def boot_files(self, known: BootFiles | None = None) -> BootFiles:
        """Read the files that this machine starts from, for `assembled`; they fit other machines of this image, which
        then have the pages of the files in common, until they write to them. `known` are the same files, read before
        for another machine: only the plan of this one's start is made.
        """
        from ringzero.machine.assemble import share_boot_files

        spec = self._completed_spec(self.resolved_image())
        return (known or share_boot_files(spec)).prepared(spec)

    def assembled(self, files: BootFiles | None = None) -> _core.Vm:
        """Return the core VM of this machine, ready to start, for who looks after it himself: its console (serial
        port 0), its agent (`agent_lines`) and its end. No thread is started, and this object stays unused.
        """
        image = self.resolved_image()
        with core_errors(), self._with_disks_of(image):
            return self._assembled(image, files)

    def agent_lines(self, vm: _core.Vm) -> Lines | None:
        """Return what leads to the agent of a VM that was `assembled`: once. None when it has none."""
        return self._way.lines(vm, self._ports, self._vsock) if self._has_agent else None

    @contextlib.contextmanager
    def _with_disks_of(self, image: Image) -> Iterator[None]:
        """Have the image's root disk as the first of the disks, and the seed as the last, while all is put together."""
        if image.disk is not None:
            kept = Path(self._persist) if self._persist is not None else None
            root = Disk(image.disk, format=image.disk_format, temporary=kept is None, overlay=kept)
            self._disks.insert(0, root)
        elif self._persist is not None:
            raise InputError(
                f"{image.name} has no root disk to keep: persist is for debian-full and for disks as images"
            )
        if self._seed is None:
            yield
            return
        if image.disk is not None and self._seed.needs_cloud_init and not image.has_cloud_init:
            raise InputError(
                f"{image.name} has no cloud-init to read that user-data: give a script that begins with #!"
            )
        file = os.memfd_create("ringzero-seed", os.MFD_CLOEXEC)
        try:
            os.write(file, self._seed.image())
            self._disks.append(Disk(Path(f"/proc/{os.getpid()}/fd/{file}"), read_only=True))
            yield
        finally:
            os.close(file)  # the device has it open

    def _completed_spec(self, image: Image) -> MachineSpec:
        words = self._command_line(image)
        return dataclasses.replace(
            self.spec, kernel=image.kernel, initrd=image.initrd, command_line=words, linux=image.agent
        )

    def _command_line(self, image: Image) -> str:
        """Return the kernel's command line: the image's words, then ours, then the caller's, which win."""
        words = [image.append]
        if image.agent:
            words += ["quiet"] if self._quiet else []
            words += [self._way.word] if self._way else []
            words += ["ringzero.shell"] if self._with_shell else []
            words += ["ringzero.disks"] if self._disks and image.disk is None else []
            words += ["ringzero.ports"] if self._ports else []
            words += ["ringzero.vsock"] if self._vsock else []
            words += [mount.word for mount in self._mounts]
            words += self.networks.words()
        words += [SEED_WORD] if self._seed is not None else []
        if self.spec.transport == "mmio":
            words += ["ringzero.mmio"] if image.agent else []
            words += virtio_mmio.words(self._device_count())
        return " ".join(word for word in [*words, self._append] if word)

    def _device_count(self) -> int:
        """Return how many virtio devices this machine has, with the two that every machine has."""
        single = [self._ports or self._way is not None, self._vsock]
        return 2 + len(self._disks) + len(self._mounts) + sum(map(bool, single)) + len(self.networks.networks)

    def resolved_image(self) -> Image:
        """Return what boots: the image, fetched if need be, with the caller's own files in the place of its."""
        from ringzero import images

        image = self._image
        if isinstance(image, str) and images.is_disk(image):
            from ringzero.machine.disk_image import disk_image

            image = self._image = disk_image(image, self._persist)
        elif isinstance(image, str):
            from ringzero.machine.installer import run_guest

            image = images.find(image) or images.pull(image, run_guest=run_guest)
        if image is None:
            if self._kernel is None:
                raise InternalError("a machine was made with neither an image nor a kernel")
            return images.Image(str(self._kernel), self._kernel, self._initrd)
        return images.Image(
            image.name,
            self._kernel or image.kernel,
            self._initrd or image.initrd,
            image.append,
            agent=image.agent and self._initrd is None,
            disk=image.disk,
            disk_format=image.disk_format,
            has_cloud_init=image.has_cloud_init,
        )

    @property
    def _vm(self) -> _core.Vm:
        if self._core_vm is None:
            raise InputError("the machine was not started")
        return self._core_vm

    def _link(self) -> AgentLink:
        if self._core_vm is None:
            raise InputError("the machine was not started: it cannot run a command")
        if self._agent is None:
            raise InputError("this guest has no agent, so it cannot run commands: use its console")
        return self._agent

    def _watch(self) -> None:
        """Wait for the end, on a thread of its own, and find out what it was."""
        vm = self._vm
        reason: str | None = None
        try:
            while reason is None:
                reason = vm.wait(None if self._console is None else 1.0)
                if reason is None and self._stands_in_panic():
                    vm.request_end("panic")
        except Exception as error:
            reason = f"error: {error}"
        if self._console is not None:
            self._console.finish()
        # A kernel that restarts after a panic (panic=N) asks for a plain reset: its console tells them apart.
        if reason == "reboot" and self.panic_message() is not None:
            reason = "panic"
        if self._metadata is not None:
            self._metadata.close()
        self._end_reason = reason
        self._ended.set()

    def _stands_in_panic(self) -> bool:
        console = self.console
        return console.quiet_for() > PANIC_SILENCE and PANIC_END.search(console.tail()) is not None


def _line(vm: _core.Vm, port: int) -> socket.socket:
    return socket.socket(fileno=vm.serial_fd(port))


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`; a descriptor that someone made non-blocking is waited for."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            import select

            select.select([], [fd], [])


@contextlib.contextmanager
def core_errors() -> Iterator[None]:
    """Turn what the core refuses into an InputError: its message is fit to be shown."""
    try:
        yield
    except Exception as error:
        core = sys.modules.get("ringzero._core")  # not imported here: whoever got an error from it did
        if core is not None and isinstance(error, core.CoreError):
            raise InputError(str(error)) from error
        raise
