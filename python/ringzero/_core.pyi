"""The boundary between the Python package and its Rust core, written once and checked by stubtest.

Addresses are guest physical, in bytes, unless a name says otherwise. Sizes are bytes. Every call that may
wait releases the GIL. What the operator must know is raised as `CoreError`, one sentence a message.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypedDict, final, type_check_only

from typing_extensions import (
    Buffer,  # collections.abc has it from 3.12 on
    disjoint_base,
)

__all__ = [
    "Console",
    "CoreError",
    "Disk",
    "HostSwitch",
    "NetworkCard",
    "Sharer",
    "Switch",
    "VirtioDevice",
    "Vm",
    "Vsock",
    "cable_card",
    "engines",
    "enter_jail",
    "host_features",
    "image_check",
    "image_commit",
    "image_convert",
    "image_create",
    "image_info",
    "image_resize",
    "image_snapshot",
    "nat_card",
    "prepare",
    "serve_folder",
    "shared_folder",
    "tap_card",
]

class CoreError(Exception):
    """The core refused or failed: the message is one sentence and says what to do."""

@type_check_only
class PortDevice(Protocol):
    """What the bus asks of a slow device that is written in Python; called from one dispatcher thread a VM."""

    def read(self, offset: int, size: int) -> int:
        """Return the value of `size` (1, 2 or 4) bytes at `offset` from the device's first port."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take `value` of `size` bytes at `offset` from the device's first port."""

@final
class Vm:
    """A virtual machine: its memory, processors, and devices. Not started until `start`."""

    def __new__(
        cls,
        memory: int,
        *,
        cpus: int = 1,
        engine: str = "direct",
        cpu_features: Sequence[str] = (),
        count_instructions: bool = False,
        profile: bool = False,
        trace_path: str | None = None,
        translations: str | None = None,
        translation_bytes: int | None = None,
        devices: Sequence[VirtioDevice] = (),
        transport: str = "pci",
    ) -> Self:
        """Put a machine together. `devices` are on its PCI bus, in this order, behind those that every machine has;
        with the transport "mmio" each is at an address of its own instead."""

    def memory_map(self) -> list[tuple[int, int, str]]:
        """Return (first address, size, kind) rows; kind is 'ram' or 'mmio'. RAM has a hole below 4 GiB."""
    def read_memory(self, address: int, size: int) -> bytes:
        """Read guest physical memory of a VM that is not started, paused or ended. Raises CoreError outside RAM."""
    def write_memory(self, address: int, data: Buffer) -> None:
        """Write guest physical memory, under the same conditions as `read_memory`."""
    def remap_page(self, address: int) -> bool:
        """Move the page at `address` to another machine page while the guest runs, which does not notice. False when
        the guest used it all the time, so that it stayed."""
    def map_image(self, fd: int, runs: Sequence[tuple[int, int, int]]) -> None:
        """Have pages of RAM begin as pages of a file in memory that is sealed against writing and shrinking, which
        many VMs map: (address, page in the file, number of pages) of each run. Before `start`, and before anything
        is written there. The guest's first write to a page makes a copy of it."""
    def memory_counts(self) -> dict[str, int]:
        """Return how many pages of 4 KiB are in each state: zero (no machine page; also never touched), private,
        shared, image, ballooned, compressed and swapped. Their sum is the guest's memory."""
    def memory_states(self) -> bytes:
        """Return the state of every page by address: a byte each, the place of the state in `memory_counts`."""
    def memory_scan(self, pages: int) -> dict[str, int]:
        """Read up to `pages` private pages, from where the last scan ended: pages of zeroes are dropped, pages that
        were the same at the last scan are shared with those who have them, too. Return how many were `scanned`,
        `shared`, `zeroed`, and `different` though their hashes are equal; `ended` is 1 at the end of memory, `alone`
        is 1 when no sharer answers. The guest runs meanwhile."""
    def memory_sample(self, pages: int) -> tuple[int, int]:
        """End a sampling period: return how many of its pages were touched, and how many there were. Begin the next,
        with `pages` random ones."""
    def memory_evict(self, pages: int) -> tuple[int, str | None]:
        """Put up to `pages` private pages into the swap store, those first that nobody used since the last call.
        Return how many went, and why not more if the store is full. 0 without a store."""
    def memory_swap(self) -> dict[str, int]:
        """Return what the swap store holds and did: pages `compressed` (in `compressed_bytes` of memory), pages
        `in_file`, and how often pages were spilled, refused, loaded, or lost."""
    def memory_audit(self) -> list[str]:
        """Derive every invariant of the guest's memory again, while the guest stands still: a sentence for each that
        does not hold."""
    def memory_trim(self) -> int:
        """Give memory back to the system that was taken for the guest and is not used; return how many pages."""
    def set_swap(self, compressed_bytes: int, folder: str | None = None, file_bytes: int = 0) -> None:
        """Give the VM a swap store, once: so many bytes of memory for compressed pages, and a file of up to
        `file_bytes` in `folder`, encrypted, without a name."""
    def attach_sharer(self, socket: int, pool: int | None = None) -> None:
        """Join the VM to the sharer at the other end of a stream socket, which is told what the VM uses of the group's
        pool. The first time, before `start`, `pool` is the descriptor that `Sharer.join` returned; later, with another
        sharer, the VM brings the pool along. The descriptors are copied; close yours: as long as one of the socket is
        open, the sharer takes the VM for alive. Raises CoreError when the sharer refuses, and changes nothing then."""
    def shared_pool(self) -> tuple[int, int] | None:
        """Return which file the pool of the VM's sharing group is: device and inode. None when it is in none."""
    def registers(self, cpu: int = 0) -> dict[str, int]:
        """Return the registers of a processor that is not running: rax..r15, rip, rflags, cr0, cr2, cr3, cr4, cr8,
        efer, and cs, ss, ds, es, fs, gs, tr, ldtr as NAME (selector), NAME_base, NAME_limit, NAME_attributes
        (bits 0-7 and 12-15 as in bytes 5 and 6 of the descriptor), gdtr_base, gdtr_limit, idtr_base, idtr_limit."""
    def set_registers(self, values: dict[str, int], cpu: int = 0) -> None:
        """Set some registers by the names of `registers`. Raises CoreError for an unknown name."""
    def add_port_device(self, first: int, count: int, device: PortDevice) -> None:
        """Give `count` I/O ports from `first` to a Python device. Before `start` only. An exception in the device ends
        the VM with the reason 'error: device NAME: ...'. When the VM ends, the guest reads all ones at once, even
        while the device is being called. A device that refers to its VM keeps it until the VM has ended."""
    def add_scratch(self, first: int, size: int) -> None:
        """Give `size` bytes (at most 1 MiB) of addresses from `first`, where no RAM is, to memory-mapped registers that
        keep what is written to them and do nothing else. Before `start` only."""
    def serial_fd(self, index: int) -> int:
        """Return a stream socket joined to serial port `index` (0-3: ttyS0-ttyS3), once a port. The caller owns and
        closes it. Bytes written to it reach the guest in order, with back pressure; none is dropped. When the VM has
        ended, it reads to the last byte that the guest sent, and then the end of the stream."""
    def start(self) -> None:
        """Run the processors, each in a thread of its own. Returns at once."""
    def pause(self) -> None:
        """Stop the processors between two instructions; returns when they stand still. Raises CoreError when a device
        of the same VM calls it: its processor waits for the device."""
    def resume(self) -> None: ...
    def stop(self) -> None:
        """End the VM from outside, without waiting for that. `wait` then returns 'stopped'."""
    def wait(self, timeout: float | None = None) -> str | None:
        """Wait until the VM ends and return why: 'poweroff', 'reboot', 'panic', 'triple-fault', 'stopped', or
        'error: ...' (a defect of ours, a device that raised, or what no engine supports yet). None when `timeout`
        (seconds) passed first. Raises CoreError before `start`, and when a device of the same VM calls it."""
    def request_end(self, reason: str) -> None:
        """End the VM from a device, with the reason that `wait` returns."""
    def raise_irq(self, line: int, level: bool) -> None:
        """Drive an ISA interrupt line (0-15) from a Python device."""
    def attach(self, device: VirtioDevice) -> None:
        """Put a device on the PCI bus of a machine that has started, and tell the guest."""

    def detach(self, device: VirtioDevice, timeout: float) -> bool:
        """Ask the guest to let a device go, and wait for it up to `timeout` seconds; False when it has not by then. It
        may do so later still; the device can be asked for again.
        """

    def balloon_target(self, pages: int) -> None:
        """Ask the guest to have `pages` pages (4096 bytes each) in its balloon, all of its RAM at most; 0 gives all
        back. Returns at once. A guest whose driver is not loaded is asked when it is; one may give less than it is
        asked for."""
    def balloon_stats(self, ask: bool = True) -> dict[str, int]:
        """Return what is known of the balloon, and with `ask` have the guest send fresh statistics of its own, which a
        later call returns (they come within milliseconds of a guest that is not busy; `updates` counts them).

        target, actual: pages wanted, and pages that the driver says are in it; driver: 1 when a driver is there.
        inflated, deflated: pages that went in and out since the start; unasked: those of `deflated` that the guest took
        because it was out of memory. reported, discarded: pages that the guest told of as free, and those of them that
        had content, which went back to the host. refused_inflations, refused_deflations, malformed: page numbers that
        made no sense (no RAM, there already, never given), and requests that did not.

        Of the guest, as far as it sends them: guest_free, guest_total, guest_available, guest_caches, guest_swap_in and
        guest_swap_out in bytes; numbers of guest_major_faults, guest_minor_faults, guest_huge_allocations and
        guest_huge_failures, and since Linux 6.12 of guest_oom_kills, guest_allocation_stalls, and pages of
        guest_background_scans, guest_direct_scans, guest_background_reclaims and guest_direct_reclaims."""
    def stats(self) -> dict[str, int]:
        """Return the counters, by dotted name. A VM that runs is stopped for it, between two instructions."""

@disjoint_base
class VirtioDevice:
    """A device that waits for its machine: `Vm` takes it, once. What it is, its subclass says."""

@final
class Console(VirtioDevice):
    """Ports that carry bytes between programs of the guest and sockets of this process, as a virtio console."""

    def __new__(cls, names: Sequence[str], *, consoles: int = 0) -> Self:
        """Make a device with so many `consoles` (terminals of the guest: hvc0 and so on), which are its first ports,
        and a port for each of `names` (/dev/virtio-ports/NAME where udev runs, /dev/vport0pN elsewhere)."""
    def port(self, index: int) -> int:
        """Return a stream socket joined to a port, counted from 0. The caller owns and closes it; then the port can be
        joined anew. Bytes written to it wait until a program of the guest has the port open, and reach it in order,
        with back pressure. What the guest sends while nobody has the socket is gone. When the VM has ended, the socket
        reads to the last byte that the guest sent, and then the end of the stream."""
    def is_open(self, index: int) -> bool:
        """Return whether a program of the guest has the port open."""
    def resize(self, index: int, rows: int, columns: int) -> None:
        """Tell the guest the size of the window that a terminal of its is shown in."""

@final
class Vsock(VirtioDevice):
    """Streams between programs of the guest (AF_VSOCK) and programs of the host, as a virtio socket device."""

    def __new__(cls, *, cid: int = 3, path: str | None = None) -> Self:
        """Make the device of a guest with this address; the host is 2. With a `path`, programs of the host connect to
        that Unix socket and say "CONNECT PORT" and a newline, and are told "OK PORT" when a program of the guest has
        taken the connection; a guest that connects to a port where nobody of this process listens reaches the Unix
        socket path_PORT. Raises CoreError for an address that is none, and a path that another machine has."""
    def connect(self, port: int) -> int:
        """Ask for a connection to a port of the guest, and return a stream socket, which is the caller's to close. It
        brings "OK PORT" and a newline when a program of the guest has taken the connection, and ends at once when none
        does. A guest whose driver is not there yet is asked when it is."""
    def listen(self, port: int) -> int:
        """Take the guest's connections to a port: return a Unix socket that brings, for each, the port of the guest's
        program (4 bytes, little-endian) and with them the descriptor of a stream socket. Closing it ends that."""

@final
class Disk(VirtioDevice):
    """A disk in a file, which is locked as long as its machine, or this, is there."""

    def __new__(
        cls,
        path: str,
        *,
        format: str = "raw",
        behind: Sequence[tuple[str, str]] = (),
        is_temporary: bool = False,
        read_only: bool = False,
        serial: str = "",
        queues: int = 1,
        cache: str = "writeback",
        on_error: str = "auto",
        iops: int = 0,
        bps: int = 0,
    ) -> Self:
        """Open it. `format` is raw or qcow2, and `behind` the files that lie behind it, nearest first, each with its
        format: exactly those that the images name. With `is_temporary` all are only read, and what the guest writes is
        gone with the machine. `serial` has up to 20 characters, `queues` a thread each, 1 to 16. `cache` is writeback,
        writethrough, none or unsafe; `on_error` is auto (a full host pauses the machine, the guest is told of other
        errors), report or pause; `iops` and `bps` are limits a second, 0 for none. Raises CoreError when the file
        cannot be opened, or another machine has it."""
    def trouble(self) -> str | None:
        """Return why requests wait for the operator, and the machine was paused; None when none do."""
    def retry(self) -> None:
        """Try those requests again. Resume the machine, too."""
    def limit(self, *, iops: int = 0, bps: int = 0) -> None:
        """Set other limits."""
    def stats(self) -> dict[str, int]:
        """Return what was done: numbers of requests by kind, and bytes."""

@type_check_only
class ImageInfo(TypedDict):
    """What a qcow2 image says of itself. A snapshot is (id, name, seconds since 1970, size of the disk in bytes)."""

    size: int
    version: int
    cluster_size: int
    is_dirty: bool
    is_corrupt: bool
    backing: str | None
    backing_format: str | None
    snapshots: list[tuple[str, str, int, int]]

@type_check_only
class ImageReport(TypedDict):
    """What a check found: clusters that are used, that are lost, and errors, with sentences about the first of them."""

    used: int
    leaks: int
    errors: int
    sentences: list[str]

def image_info(path: str) -> ImageInfo:
    """Return what a qcow2 image says of itself; nothing of it is to be believed. Raises CoreError for what is none."""

def image_create(path: str, size: int, *, backing: tuple[str, str] | None = None) -> None:
    """Make an empty qcow2 image of a disk of `size` bytes; `backing` is what lies behind it: its name as the image
    shall have it, and its format. Raises CoreError when the file is there already, or cannot be made."""

def image_convert(
    source: Sequence[tuple[str, str]],
    path: str,
    format: str,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Copy a disk, given by its files and their formats, the top first, into a new file. `progress` is called with
    bytes done, and bytes in all; what it raises ends the copy."""

def image_check(path: str, *, repair: bool = False) -> ImageReport:
    """Look whether the tables of a qcow2 image agree; with `repair`, make the counts of its clusters anew."""

def image_resize(image: Sequence[tuple[str, str]], size: int) -> None:
    """Give the disk of a qcow2 image, whose files are given as for `image_convert`, another size in bytes."""

def image_snapshot(image: Sequence[tuple[str, str]], action: str, name: str) -> None:
    """Create, apply or delete a snapshot of a qcow2 image."""

def image_commit(
    image: Sequence[tuple[str, str]], *, progress: Callable[[int, int], object] | None = None
) -> None:
    """Put what a qcow2 image has into what lies behind it, and empty the image."""

@final
class NetworkCard(VirtioDevice):
    """A network card, with its cable plugged in. Made by functions such as `nat_card`."""

    def set_link(self, is_up: bool) -> None:
        """Pull the cable out, or plug it in again: the guest is told."""

    def plug_into(self, socket: int) -> None:
        """Plug the cable of a `cable_card` into another socket, which is copied. Raises CoreError for another card."""

    def ports(self) -> list[int]:
        """Return the ports of this host that lead to the guest, in the order in which they were asked for."""

    def counters(self) -> dict[str, int]:
        """Return bytes sent and received, and frames that were lost (the guest took none) or refused (nonsense); with a
        cable that leads out of this process, those that nobody took there."""

@final
class Switch:
    """Joins cards of machines of this process, and learns where addresses are. Lasts as long as a card of it does."""

    def __new__(cls) -> Self: ...
    def card(self, mac: bytes, *, mtu: int = 1500) -> NetworkCard:
        """Return a card that is plugged in, until its machine ends. Raises CoreError when another has its address."""

def cable_card(mac: bytes, socket: int, *, mtu: int = 1500) -> NetworkCard:
    """Return a card whose cable ends in a socket that keeps messages apart (SOCK_SEQPACKET; it is copied: close yours).
    Each message is a frame behind its `struct virtio_net_hdr`, both ways. When the other end goes, the card is plugged
    into nothing until `plug_into`. Raises CoreError when it is no such socket."""

def tap_card(mac: bytes, tap: str, *, mtu: int = 1500) -> NetworkCard:
    """Return a card whose cable is a tap of this host, which is made when there is none. Raises CoreError when there is
    no right to it, or somebody has it."""

@final
class HostSwitch:
    """Joins cards of several processes, over sockets; a thread that ends when the object does."""

    def __new__(cls) -> Self: ...
    def plug_in(self, mac: bytes, socket: int) -> None:
        """Plug in a card whose cable ends in a socket, which is copied. It is unplugged when the other end goes. Raises
        CoreError when there is a card with its address, or no place."""

    def report(self) -> dict[bytes, dict[str, int]]:
        """Return for each card what it sent to the switch (received), what it got, what was lost because it took none,
        what was refused (no frames, or another's address), and what was more than it may send to all others (limited).
        """

def nat_card(
    mac: bytes,
    *,
    mtu: int = 1500,
    name: str = "",
    resolvers: Sequence[str] = (),
    rules: Sequence[tuple[str, int, int | None]] | None = None,
    names: bool = True,
    host_loopback: bool = False,
    ipv6: bool = False,
    forwards: Sequence[tuple[bool, str, int]] = (),
    services: Sequence[tuple[str, int]] = (),
) -> NetworkCard:
    """Return a card on a network of its guest's own, 10.0.2.0/24, that leads out through sockets of this process.

    The guest gets its address and `name` by DHCP, and asks the first of `resolvers` for names unless `names` is false.
    Of `rules` (network, length of the prefix, port or all) one must allow what it reaches; without a list all is, but
    for this host itself: 10.0.2.2 stands for 127.0.0.1 only with `host_loopback`. `forwards` lead from a port of
    this host to one of the guest: whether it is UDP, "ADDRESS:PORT" (port 0 for any), the guest's port. Connections to
    the address of one of `services` are given away: each as a descriptor that comes with a byte over the given one.
    Raises CoreError, when a port is taken for instance."""

@final
class Sharer:
    """Counts the shared pages of a host's VMs: a thread, and for each sharing group a table and a pool, which is a file
    in memory that only the sharer writes. It ends when the object does. The VMs go on with what they have, and bring it
    to the next sharer."""

    def __new__(cls, pages: int = 16777216) -> Self:
        """Start it; `pages` is the most that the pool of a group may have."""

    def join(
        self, group: str, vm: str, socket: int, pages: int, pool: tuple[int, int] | None = None
    ) -> tuple[int | None, tuple[int, int]]:
        """Take a VM of `pages` pages into a group, which is made when there is none of this name. `socket` is the
        sharer's end of a pair of stream sockets (it is copied: close yours); the VM gets the other one. `pool` says
        which file the VM has as its pool from an earlier sharer. Return a descriptor of the pool to read, which is the
        caller's to close, and which file it is. The descriptor is None as long as only VMs have the pool. Raises
        CoreError when the group has another pool, or waits for one."""
    def recovered(self) -> None:
        """Say that all VMs that used pools of an earlier sharer have been joined, or have ended. When those have been
        attached, pages that none of them uses go back to the system."""
    def report(self) -> tuple[dict[str, dict[str, int]], list[str]]:
        """Return the counts of each group, and what has happened since the last report, a sentence for each VM that
        broke a rule and shares no more.

        members, guest_pages: VMs, and their pages. shared_pages, uses: pages of the pool that are in use, and how
        often. offered, found, added, stale, released: pages that were offered, that were in the pool already, that
        came into it, that had changed since they were offered, and uses that ended. metadata_bytes: memory that all
        tables take."""
    def audit(self) -> list[str]:
        """Compare pools, tables, and what VMs use: a sentence for all that is not as it must be. Reads all pools."""

def enter_jail(*, network: bool = False) -> None:
    """Put all threads of this process into the jail, for ever: from now on it makes only the system calls that a VM
    needs while it runs, and gains no privileges. Whatever else it tries fails with EPERM: no file, socket or program is
    opened by name. With `network` it makes sockets of the Internet. Raises CoreError where the system has no such
    filters."""

def prepare() -> None:
    """Make what all machines of a process have in common, which else the first makes: before a process forks."""

def serve_folder(path: str, socket: int, *, read_only: bool = False) -> None:
    """Serve a folder to the `shared_folder` of another process, at the other end of a socket (a descriptor), until that
    has gone; from when the folder is open in a jail, for ever: this process can do nothing else any more. Raises
    CoreError."""

def shared_folder(path: str, tag: str, *, read_only: bool = False, server: int | None = None) -> VirtioDevice:
    """Return a device by which a guest mounts a folder of this host (`mount -t virtiofs TAG /there`). It reaches
    nothing that is not below the folder, follows no symbolic link, and makes no device. Files of this process's user
    and group are root's in the guest, all others nobody's. `tag` has 1 to 36 letters, digits, dots and dashes.
    `server` is a socket (a descriptor) to a process that does all that, with `serve_folder`; without, this one does."""

def engines() -> list[str]: ...
def host_features() -> dict[str, bool | int | str]:
    """Return what `ringzero doctor` shows of the host processor."""
