"""Put a machine together, in the one order that is right: files first, then the VM, its devices, its memory.

Whatever can be wrong with the operator's files is found before a byte of guest memory exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from ringzero.errors import InputError, InternalError
from ringzero.machine.boot import BootPlan, bzimage, plan_boot, read_file, unpacked_vmlinux
from ringzero.machine.boot.sealed import SealedPages
from ringzero.machine.disk import Disk
from ringzero.machine.mount import Mount
from ringzero.machine.network import Networks
from ringzero.machine.ports import Ports
from ringzero.machine.spec import MachineSpec, requested_features
from ringzero.machine.vsock import Vsock

if TYPE_CHECKING:
    from ringzero import _core
    from ringzero.devices import Device

__all__ = ["BootFiles", "assemble", "read_boot_files", "share_boot_files"]


@dataclasses.dataclass(frozen=True)
class BootFiles:
    """A machine's boot files in memory: read once, they start any number of machines."""

    kernel: bytes
    initrd: bytes | None
    vmlinux: memoryview | None
    """What a bzImage unpacks to, unless it shall unpack itself."""
    sealed: SealedPages | None = None
    """The pages that all machines have in common that start from these files."""
    planned: tuple[MachineSpec, BootPlan] | None = None
    """How one kind of machine starts from them: no other of its kind has to find out again."""

    def plan(self, spec: MachineSpec) -> BootPlan:
        """Return how a machine starts from these files. Raises as `plan_boot`."""
        if self.planned is not None and self.planned[0] == spec:
            return self.planned[1]
        return _plan(spec, self)

    def prepared(self, spec: MachineSpec) -> BootFiles:
        """Return these files with the plan for a machine. Raises as `plan_boot`."""
        spec = _checked(spec, self)
        if self.planned is not None and self.planned[0] == spec:
            return self
        return dataclasses.replace(self, planned=(spec, _plan(spec, self)))


def read_boot_files(spec: MachineSpec) -> BootFiles:
    """Read the files that a spec names. Raises InputError and ImageError for those that cannot be used."""
    if spec.kernel is None:
        raise InputError("a machine needs a kernel to start")
    kernel = read_file(spec.kernel, "kernel")
    initrd = read_file(spec.initrd, "initramfs") if spec.initrd is not None else None
    return BootFiles(kernel, initrd, None if spec.kaslr else unpacked_vmlinux(kernel, str(spec.kernel)))


def share_boot_files(spec: MachineSpec) -> BootFiles:
    """Read the files that a spec names, and have all machines that start from them map the same pages.

    Raises as `read_boot_files`, and `plan_boot`.
    """
    files = read_boot_files(spec)
    with contextlib.suppress(OSError):
        # A host that gives no such file gives each machine its own pages.
        files = dataclasses.replace(files, sealed=SealedPages(_plan(spec, files).pieces))
    return files


def _checked(spec: MachineSpec, files: BootFiles) -> MachineSpec:
    """Check a spec again: only when its files are read is it known whether this is a Linux, which needs more memory."""
    linux = spec.linux or bzimage.looks_like(files.kernel)
    return MachineSpec.checked(**(dataclasses.asdict(spec) | {"linux": linux}))


def _plan(spec: MachineSpec, files: BootFiles) -> BootPlan:
    return plan_boot(
        files.kernel,
        memory=spec.memory,
        cpus=spec.cpus,
        command_line=spec.command_line,
        initrd=files.initrd,
        name=str(spec.kernel),
        initrd_name=str(spec.initrd) if spec.initrd is not None else "initramfs",
        vmlinux=files.vmlinux,
        mmio=spec.transport == "mmio",
    )


def assemble(
    spec: MachineSpec,
    devices: Iterable[Device | str] = (),
    *,
    count_instructions: bool = False,
    profile: bool = False,
    trace: str | None = None,
    translations: str | None = None,
    translation_bytes: int | None = None,
    disks: Iterable[Disk] = (),
    mounts: Iterable[Mount] = (),
    opened: list[_core.Disk] | None = None,
    ports: Ports | None = None,
    vsock: Vsock | None = None,
    networks: Networks | None = None,
    files: BootFiles | None = None,
) -> _core.Vm:
    """Return a VM that is ready to start, with the PC's slow devices and `devices` on its bus.

    `files` are those that the spec names, when they have been read already.
    `profile` samples what the processors do, for the counters named profile; `trace` is the path of an
    instruction trace, `translations` that of the folder of kept translations; `translation_bytes` limits what
    translated code takes, where the default does not suit. `opened` is given the disks, in their order. Raises
    InputError for what cannot be used, and the core's own CoreError when that refuses.
    """
    files = files or read_boot_files(spec)
    spec = _checked(spec, files)
    plan = files.plan(spec)
    core = _load_core()
    if spec.engine not in core.engines():
        raise InputError(
            f"this build has no engine {spec.engine!r}: choose one of {', '.join(core.engines())}"
        )
    parts: list[Disk | Mount | Ports | Vsock] = [*disks, *mounts]
    parts += [ports] if ports is not None and ports.is_needed else []
    parts += [vsock] if vsock else []
    made = [part.device(spec.cpus) for part in parts]
    vm: _core.Vm = core.Vm(
        spec.memory,
        cpus=spec.cpus,
        engine=spec.engine,
        transport=spec.transport,
        cpu_features=requested_features(spec.cpu),
        count_instructions=count_instructions,
        profile=profile,
        trace_path=trace,
        translations=translations,
        translation_bytes=translation_bytes,
        devices=[*made, *(networks.devices() if networks else [])],
    )
    if opened is not None:
        opened += [device for device in made if isinstance(device, core.Disk)]
    attach_devices(vm, devices)
    plan.load(vm, files.sealed)
    return vm


def attach_devices(vm: _core.Vm, devices: Iterable[Device | str]) -> None:
    """Put the PC's slow devices on the bus, then the caller's own and those that he names."""
    from ringzero.devices import I8042, PvPanic, Rtc, attach, named

    # The keyboard controller needs its interrupt line although there is no keyboard: without its "nobody is there",
    # Linux waits 0.2 s for one while it boots.
    own: list[Device] = [I8042(vm.request_end, vm.raise_irq), PvPanic(vm.request_end), Rtc()]
    own += [named(device, vm) if isinstance(device, str) else device for device in devices]
    for device in own:
        attach(vm, device)


def _load_core() -> ModuleType:
    try:
        from ringzero import _core
    except ImportError as error:
        raise InternalError(f"the Rust core of ringzero cannot be loaded: {error}") from error
    return _core
