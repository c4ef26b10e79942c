"""`network`: how fast a guest's TCP is to its host and back, and from VM to VM, by Debian's iperf3; and how often a
byte goes there and back in a second, by NetPIPE.

Guests and programs are the same for both monitors, and so is the far end of the host: iperf3 from the same package, at
this host's 127.0.0.1, behind our NAT and behind QEMU's user network. Two guests are joined by a switch here, in one
process or over the host's from one process to another, and by QEMU's networks over sockets, of which its best for an
item counts. All have an MTU of 1500 bytes, as networks have; two
guests are also measured with the largest there is, which spares QEMU's most of their frames and ours none.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from ringzero.bench import guests
from ringzero.bench.clocked import clock_complaint
from ringzero.bench.engines import Guest, Run, qemu_command, ringzero_command, run
from ringzero.bench.figures import Sample, sample
from ringzero.bench.io.network_guest import READY, Programs, Words, network_initramfs
from ringzero.bench.memory.item import Figure, Outcome
from ringzero.errors import GuestError
from ringzero.machine.machine import Machine

__all__ = ["NetworkBench", "measured"]

ITEMS = {
    "up": ("TCP, guest to host, user NAT", "Gbit/s"),
    "down": ("TCP, host to guest, user NAT", "Gbit/s"),
    "between": ("TCP, VM to VM, switch of a process", "Gbit/s"),
    "between processes": ("TCP, VM to VM, switch of the host", "Gbit/s"),
    "between, MTU 65520": ("TCP, VM to VM, MTU of 65520", "Gbit/s"),
    "latency": ("a byte to the host and back", "a second"),
    "latency between": ("a byte to another VM and back, switch of a process", "a second"),
    "latency between processes": ("a byte to another VM and back, switch of the host", "a second"),
}
BARRED = ("up", "down", "between", "between processes")
ACROSS = " processes"
"""Ends the names of what is measured over the host's switch. QEMU has no other: it always takes a process a guest."""
BAR = 2.0
SERIES = "6.12"
NAT = "virtio-net-pci,netdev=net,mac=52:54:00:00:00:01"
USER = {
    "qemu user": NAT,
    "qemu user, long queue": f"{NAT},rx_queue_size=1024",
}
ITEM = re.compile(r"NETWORK-ITEM (\w+)\n(.*?)\nNETWORK-STATUS (\d+)", re.DOTALL)
HALF_TRIP = re.compile(r"1 bytes +\d+ times --> .* in +([0-9.]+) usec")
LARGE = "MTU 65520"
SERVER, CLIENT = "192.168.7.1", "192.168.7.2"

Command = Callable[[Guest], list[str]]
Ends = tuple[list[str], list[str]]
"""What a monitor is told of the network of a guest that serves, and of its client's."""


@dataclass(frozen=True)
class NetworkBench:
    """What to measure: `seconds` of TCP and `trips` of a byte an item; the median of the `runs` counts."""

    runs: int = 5
    seconds: int = 5
    trips: int = 10000
    memory: int = 256
    timeout: float = 300.0

    def measure(self, console: Console) -> Outcome:
        """Run all, interleaved."""
        rates: dict[str, dict[str, list[float]]] = {}
        complaints: list[str] = []
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-") as name:
            folder = Path(name)
            (folder / "initrd").write_bytes(network_initramfs(SERIES))
            programs = Programs(folder)
            ways = self._ways(folder, programs)
            for turn in range(self.runs):
                for way in ways if turn % 2 == 0 else reversed(ways):
                    with console.status(f"network: run {turn + 1} of {self.runs}, {way}"):
                        done = ways[way]()
                    try:
                        found, complaint = measured(done), clock_complaint(done, "NETWORK")
                    except GuestError as error:
                        raise GuestError(f"run {turn + 1}, {way}: {error}") from error
                    if complaint is not None:
                        complaints.append(f"run {turn + 1}, {way}: {complaint}")
                    for item, rate in found.items():
                        rates.setdefault(_label(item, way), {}).setdefault(way, []).append(rate)
        samples = {
            item: {way: sample(values) for way, values in ways.items()} for item, ways in rates.items()
        }
        return self._outcome(samples, complaints)

    def _ways(self, folder: Path, programs: Programs) -> dict[str, Callable[[], Run]]:
        """Return the ways to measure: by name, what runs a guest of each and returns what that said."""

        def user(command: Command) -> Callable[[], Run]:
            def once() -> Run:
                with far_end(programs, folder) as (port, latency):
                    words = self._words("up,down,latency", "10.0.2.15/24", "10.0.2.2", port, latency)
                    return run(command(self._guest(folder, words)), timeout=self.timeout)

            return once

        def apart(command: Command, networks: Callable[[], Ends], mtu: int = 1500) -> Callable[[], Run]:
            items = "up" if mtu != 1500 else "up,latency"

            def once() -> Run:
                first, second = networks()
                served = self._words("serve", f"{SERVER}/24", mtu=mtu)
                asked = self._words(items, f"{CLIENT}/24", SERVER, mtu=mtu)
                server, client = (command(self._guest(folder, words)) for words in (served, asked))
                with serving([*server, *first], self.timeout):
                    return run([*client, *second], timeout=self.timeout)

            return once

        def pair(networks: Callable[[], Ends], mtu: int = 1500) -> Callable[[], Run]:
            card = f"virtio-net-pci,netdev=net,host_mtu={mtu},mac=52:54:00:00:00:0"

            def ends() -> Ends:
                first, second = networks()
                return [*first, "-device", f"{card}1"], [*second, "-device", f"{card}2"]

            return apart(qemu_command, ends, mtu)

        ways: dict[str, Callable[[], Run]] = {
            "ringzero user": user(lambda guest: [*ringzero_command(guest), "--net", "nat,host-loopback"]),
            "ringzero switch": lambda: self._switched(folder),
            f"ringzero switch{ACROSS}": apart(ringzero_command, _by_host),
        }
        for name, device in USER.items():
            options = ["-netdev", "user,id=net", "-device", device]
            ways[name] = user(partial(_qemu_with, options))
        joined: dict[str, Callable[[], Ends]] = {
            "qemu socket": _by_socket,
            "qemu stream": partial(_by_stream, folder),
            "qemu dgram": partial(_by_dgram, folder),
        }
        ways |= {name: pair(networks) for name, networks in joined.items()}
        ways[f"ringzero switch, {LARGE}"] = lambda: self._switched(folder, 65520)
        ways |= {f"{name}, {LARGE}": pair(networks, 65520) for name, networks in joined.items()}
        return ways

    def _words(self, do: str, ip: str, peer: str = "", *ports: int, mtu: int = 1500) -> Words:
        words = Words(do, ip, peer, *ports)
        return replace(words, seconds=self.seconds, trips=self.trips, mtu=mtu)

    def _guest(self, folder: Path, words: Words) -> Guest:
        return Guest(guests.kernel(SERIES), folder / "initrd", words.append(), self.memory)

    def _switched(self, folder: Path, mtu: int = 1500) -> Run:
        """Run both guests in this process, as a switch of a process joins them."""

        def machine(do: str, ip: str, peer: str, sink: Callable[[bytes], None]) -> Machine:
            guest = self._guest(folder, self._words(do, f"{ip}/24", peer, mtu=mtu))
            return Machine(
                kernel=guest.kernel,
                initrd=guest.initrd,
                append=guest.append,
                memory=f"{guest.memory}M",
                name=do,
                net=f"switch=ringzero-bench,mtu={mtu}",
                console=sink,
            )

        served, said = _Lines(), _Lines()
        with machine("serve", SERVER, "", served.take):
            served.wait_for(READY, self.timeout)
            began = time.perf_counter()
            with machine("up" if mtu != 1500 else "up,latency", CLIENT, SERVER, said.take) as client:
                reason = client.wait(self.timeout)
        seconds = time.perf_counter() - began
        return Run(seconds, 0 if reason == "poweroff" else 1, reason is None, said.lines)

    def _outcome(self, samples: dict[str, dict[str, Sample]], complaints: Sequence[str]) -> Outcome:
        figures, notes = [], []
        for item, (title, unit) in ITEMS.items():
            ours = next(found for way, found in samples[item].items() if way.startswith("ringzero"))
            rivals = samples[item.removesuffix(ACROSS)]
            theirs = {way: found for way, found in rivals.items() if way.startswith("qemu")}
            best = max(theirs, key=lambda way: theirs[way].median)
            ratio = ours.median / theirs[best].median
            figures.append(Figure(title, ours.median, unit, theirs=theirs[best].median))
            figures.append(Figure("  times QEMU's best", ratio, "x", BAR if item in BARRED else None))
            notes.append(
                f"{item}: QEMU's best is {best!r}; half of the range is {ours.spread:.0%} of our median, "
                f"{theirs[best].spread:.0%} of its"
            )
        figures.append(Figure("complaints", len(complaints), bar=0, at_most=True))
        details = {
            item: {way: one.as_json() for way, one in found.items()} for item, found in samples.items()
        }
        title = f"one processor a guest, {self.seconds} s an item, medians of {self.runs}"
        return Outcome("network", title, figures, [*notes, *complaints], details)


def _label(item: str, way: str) -> str:
    """Return which of ITEMS a way has measured."""
    if "user" in way:
        return item
    across = ACROSS if way.endswith(ACROSS) else ""
    if item == "latency":
        return f"latency between{across}"
    if across:
        return f"between{across}"
    return f"between, {LARGE}" if way.endswith(LARGE) else "between"


def _qemu_with(options: Sequence[str], guest: Guest) -> list[str]:
    return [*qemu_command(guest), *options]


def measured(done: Run) -> dict[str, float]:
    """Return what a client measured: Gbit/s, and round trips a second. Raises GuestError when an item failed.

    Bytes are those that arrived. The seconds are those of the end that is not the guest under test, where there is one:
    iperf3's server is on the host (but for two guests, whose clocks are looked after elsewhere).
    """
    text = "\n".join(line for _, line in done.lines)
    found: dict[str, float] = {}
    for item, said, status in ITEM.findall(text):
        if status != "0":
            raise GuestError(f"{item} failed with status {status}: {said[-300:]}")
        if item == "latency":
            half = HALF_TRIP.search(said)
            if half is None:
                raise GuestError(f"NetPIPE said nothing that is understood: {said[-300:]}")
            found[item] = 1e6 / (2 * float(half[1]))
        else:
            try:
                end = json.loads(said)["end"]
                received, sent = end["sum_received"], end["sum_sent"]
                seconds = received["seconds"] if item == "up" else sent["seconds"]
                found[item] = received["bytes"] * 8 / seconds / 1e9
            except (ValueError, KeyError, ZeroDivisionError) as error:
                raise GuestError(f"iperf3 said nothing that is understood: {error}: {said[-300:]}") from error
    if done.status != 0 or done.timed_out or "up" not in found:
        raise GuestError(f"it did not come to its end: {done.tail()}")
    return found


class _Lines:
    """What a machine prints, line by line, with the second at which each came."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []
        self._began = time.perf_counter()
        self._rest = b""
        self._changed = threading.Condition()

    def take(self, data: bytes) -> None:
        """Take a piece of output."""
        now = time.perf_counter() - self._began
        with self._changed:
            *whole, self._rest = (self._rest + data).split(b"\n")
            self.lines += [(now, line.decode(errors="replace").strip("\r")) for line in whole]
            self._changed.notify_all()

    def wait_for(self, words: str, timeout: float) -> None:
        """Wait for a line with some words. Raises GuestError when none comes in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: any(words in line for _, line in self.lines), timeout):
                raise GuestError(f"a guest did not say {words!r}: {[line for _, line in self.lines[-5:]]}")


@contextlib.contextmanager
def serving(command: Sequence[str], timeout: float) -> Iterator[None]:
    """Have a guest that serves, from when it is ready."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    lines = _Lines()
    assert process.stdout is not None
    output = process.stdout

    def read() -> None:
        while data := output.read(65536):
            lines.take(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        lines.wait_for(READY, timeout)
        yield
    finally:
        process.kill()
        process.wait()
        reader.join()
        output.close()


@contextlib.contextmanager
def far_end(programs: Programs, folder: Path) -> Iterator[tuple[int, int]]:
    """Have iperf3 and NetPIPE on this host, and tell their ports."""
    port, latency = _free_ports(2)
    commands = (
        programs.command("iperf3", "-s", "-B", "127.0.0.1", "-p", str(port)),
        programs.command("NPtcp", "-P", str(latency), "-o", "netpipe.out"),
    )
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(command, cwd=folder, **quiet) for command in commands]  # type: ignore[call-overload]
    try:
        yield (port, latency)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _by_host() -> Ends:
    words = ["--net", f"switch=bench-{time.monotonic_ns()}"]
    return (words, words)


def _by_socket() -> Ends:
    [port] = _free_ports(1)
    return (
        ["-netdev", f"socket,id=net,listen=127.0.0.1:{port}"],
        ["-netdev", f"socket,id=net,connect=127.0.0.1:{port}"],
    )


def _by_stream(folder: Path) -> Ends:
    path = folder / f"stream-{time.monotonic_ns()}"
    place = f"addr.type=unix,addr.path={path}"
    return (
        ["-netdev", f"stream,id=net,server=on,{place}"],
        ["-netdev", f"stream,id=net,server=off,{place}"],
    )


def _by_dgram(folder: Path) -> Ends:
    ends = [folder / f"dgram-{time.monotonic_ns()}-{end}" for end in "ab"]
    words = [
        f"dgram,id=net,local.type=unix,local.path={own},remote.type=unix,remote.path={other}"
        for own, other in (ends, ends[::-1])
    ]
    return (["-netdev", words[0]], ["-netdev", words[1]])
