"""What `ringzero run` does: boot a guest, give it the terminal or a command, and end with its status.

Exit statuses, without a command:

    0    the guest powered off, or was left with Ctrl-]
    1    a defect of ours
    2    input that cannot be used, and standard output closed early
    3    the guest asked for a reboot
    4    its kernel panicked
    5    triple fault
    124  --timeout passed
    odd  the guest ended the machine by --device debug-exit: twice its number and one, as under QEMU

With `-- CMD`, the command's own status (128+N when signal N ended it, 127 when there is no such command and
126 when it cannot be executed), or one of the above when the guest ended first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringzero.cli import fail, output_closed
from ringzero.cli.command_io import environment, feed
from ringzero.errors import GuestEnded, InputError
from ringzero.images import is_disk as is_disk_image
from ringzero.machine.machine import Machine, write_all
from ringzero.machine.seed import Seed

if TYPE_CHECKING:
    from ringzero.machine.guest_process import GuestProcess
    from ringzero.machine.network import Switches

STATUS = {"poweroff": 0, "stopped": 0, "reboot": 3, "panic": 4, "triple-fault": 5}
TIMED_OUT = 124
NOT_EXECUTABLE, NOT_FOUND = 126, 127


@dataclass(frozen=True)
class RunOptions:
    """The options of `ringzero run`, as they were given. `command` is what came after `--`."""

    image: str | None = None
    command: tuple[str, ...] | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    memory: str = "256M"
    cpus: int = 1
    engine: str = "direct"
    cpu: str = ""
    kaslr: bool = False
    virtio: str = "pci"
    timeout: float | None = None
    tty: bool = False
    env: tuple[str, ...] = ()
    cwd: str | None = None
    device: tuple[str, ...] = ()
    disk: tuple[str, ...] = ()
    mount: tuple[str, ...] = ()
    vsock: str | None = None
    net: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()
    persist: str | None = None
    user: str | None = None
    ssh_key: tuple[str, ...] = ()
    hostname: str | None = None
    user_data: str | None = None
    stats: bool = False
    trace: str | None = None
    verbose: bool = False
    no_translation_cache: bool = False


@dataclass
class Outcome:
    """How a run ended, and the moment at which it must have: None for never."""

    deadline: float | None
    timed_out: bool = False
    output_closed: bool = False

    def left(self) -> float | None:
        """Return the seconds that are left, or None when there is no limit."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


def _switches(net: tuple[str, ...]) -> Switches | None:
    """Return what joins a machine to the switches of this user, if it is to be on one: its process has no others."""
    if not any(network.startswith("switch=") for network in net):
        return None
    from ringzero.host.switches import HostSwitches

    return HostSwitches()


def run_guest(options: RunOptions) -> int:
    """Run a guest to its end and return the exit status. Raises InputError for what cannot be run."""
    command = options.command
    if options.image is None and options.kernel is None:
        raise InputError(
            "what is to run? An image (ringzero run debian, ringzero run hello) or --kernel FILE"
        )
    if command == ():
        raise InputError("after -- comes the command to run in the guest")
    if options.timeout is not None and not 0 < options.timeout < 1e9:
        raise InputError(f"--timeout {options.timeout:g}: give a number of seconds above 0")
    image, kernel = _kernel(options.image, options.kernel)
    variables = environment(options.env)
    outcome = Outcome(None if options.timeout is None else time.monotonic() + options.timeout)
    is_disk = image is not None and is_disk_image(image)
    has_agent = image is not None and (image.startswith("debian") or is_disk) and options.initrd is None
    # A shell that cannot be typed at reads commands from its input, like any other: `ringzero run debian <
    # file`.
    if command is None and has_agent and not is_disk and not os.isatty(0):
        command = ("sh",)
    if command is not None and not has_agent:
        raise InputError(
            "-- CMD needs an image with our agent in it: ringzero run debian [--kernel FILE] -- CMD"
        )
    machine: Machine | None = None

    def show(fd: int) -> Callable[[bytes], None]:
        def sink(data: bytes) -> None:
            try:
                write_all(fd, data)
            except OSError:
                outcome.output_closed = True
                if machine is not None:
                    machine.request_stop()
                raise

        return sink

    machine = Machine(
        image,
        memory=options.memory,
        cpus=options.cpus,
        engine=options.engine,
        cpu=options.cpu,
        kaslr=options.kaslr,
        transport=options.virtio,
        kernel=kernel,
        initrd=options.initrd,
        devices=options.device,
        disks=options.disk,
        mounts=options.mount,
        vsock=False if options.vsock is None else options.vsock,
        net=options.net,
        switches=_switches(options.net),
        publish=options.publish,
        persist=options.persist,
        seed=Seed.parse(options.user, options.ssh_key, options.hostname, options.user_data),
        append=_terminal_words(options.append, command),
        console=show(1) if command is None else show(2) if options.verbose else None,
        shell=command is None,
        quiet=not options.verbose,
        # Code that runs as it stands cannot be counted.
        count_instructions=options.stats and options.engine != "direct",
        profile=options.stats and "RINGZERO_PROFILE" in os.environ,
        trace=options.trace,
        translation_cache=not options.no_translation_cache,
    )
    if image is not None and not is_disk:
        _ensure(image)
    with machine:
        if options.disk:
            from ringzero.cli.trouble import mind_disks

            mind_disks(machine)
        if command is not None:
            status = _run_command(machine, command, outcome, show, options.tty, variables, options.cwd)
        else:
            status = _run_console(machine, outcome)
        if options.stats:
            from ringzero.cli.stats import show_stats

            if machine.wait(0) is None:
                machine.pause()
            show_stats(machine.stats())
    return status


def _ensure(image: str) -> None:
    """Fetch an image that is not on this machine, showing progress."""
    from ringzero import images

    if images.find(image) is None:
        from ringzero.cli.pull import fetch

        fetch(image)


def _run_console(machine: Machine, outcome: Outcome) -> int:
    """Give the console this process's standard input and output, until the guest ends."""
    from ringzero.machine.terminal import RawTerminal, pump_keys, window_size

    left = threading.Event()

    def leave() -> None:
        left.set()
        machine.request_stop()

    if not os.isatty(0):
        pump_keys(machine.console.write, escape=False, left=leave)
        return _wait(machine, outcome)

    def tell_size() -> None:
        try:
            ready = machine.has_agent and machine.wait_ready()
        except GuestEnded:
            return
        size = window_size(0)
        if ready and size is not None:
            machine.resize_console(*size)

    with RawTerminal(0, machine.resize_console):
        threading.Thread(target=tell_size, name="ringzero-window", daemon=True).start()
        pump_keys(machine.console.write, escape=True, left=leave)
        status = _wait(machine, outcome)
    if left.is_set():
        write_all(2, b"\r\nringzero: left the guest, which is gone\n")
        return 0
    return status


def _run_command(
    machine: Machine,
    command: Sequence[str],
    outcome: Outcome,
    show: Callable[[int], Callable[[bytes], None]],
    tty: bool,
    env: dict[str, str],
    cwd: str | None,
) -> int:
    """Run one command in the guest with our standard streams, and return its status."""
    from ringzero.machine.frames import DEFAULT_ENVIRONMENT
    from ringzero.machine.terminal import RawTerminal, pump_keys, window_size

    process: GuestProcess | None = None

    def forward(number: int, _frame: object) -> None:
        # The first goes to the command, as from a terminal; who asks again means the machine.
        nonlocal process
        if process is None:
            sys.exit(128 + number)
        target, process = process, None
        threading.Thread(target=target.send_signal, args=(number,), daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    terminal = tty and os.isatty(0)
    window = (window_size(0) or (24, 80)) if tty else None
    try:
        if not machine.wait_ready(outcome.left()):
            outcome.timed_out = True
            return _status(machine, outcome)
        process = started = machine.spawn(
            command, stdout=show(1), stderr=show(2), env=DEFAULT_ENVIRONMENT | env, cwd=cwd, window=window
        )
        if terminal:
            with RawTerminal(0, started.resize):
                pump_keys(started.write, escape=True, left=machine.request_stop)
                code = started.wait(outcome.left())
        else:
            threading.Thread(target=feed, args=(started,), name="ringzero-stdin", daemon=True).start()
            code = started.wait(outcome.left())
    except GuestEnded:
        return _status(machine, outcome, while_running=command[0])
    except OSError as error:
        if outcome.output_closed:
            return output_closed()
        name = error.filename or command[0]
        if isinstance(error, FileNotFoundError):
            return fail(
                f"there is no command {name!r} in the guest (or no directory {cwd!r})"
                if cwd
                else f"there is no command {name!r} in the guest",
                NOT_FOUND,
            )
        return fail(f"{name!r} cannot be run in the guest: {error.strerror}", NOT_EXECUTABLE)
    if code is None:
        outcome.timed_out = True
        return _status(machine, outcome)
    return code if code >= 0 else 128 - code


def _wait(machine: Machine, outcome: Outcome) -> int:
    outcome.timed_out = machine.wait(outcome.left()) is None
    return _status(machine, outcome)


def _status(machine: Machine, outcome: Outcome, while_running: str | None = None) -> int:
    """Say what happened, if it needs saying, and return the exit status for it."""
    if outcome.output_closed:
        return output_closed()
    if outcome.timed_out:
        machine.stop()
        return fail("--timeout passed before the guest was done", TIMED_OUT)
    reason = machine.wait(5.0) or "error: the guest did not end"
    during = f" while {while_running!r} ran in it" if while_running is not None else ""
    if reason.startswith("error"):
        return fail(f"this is a defect of ringzero, please report it: {reason.partition(':')[2].strip()}", 1)
    if reason == "panic":
        message = machine.panic_message()
        return fail(f"the guest's kernel panicked{during}{': ' + message if message else ''}", STATUS[reason])
    if reason == "triple-fault":
        return fail(f"the guest ended by a triple fault{during}", STATUS[reason])
    from ringzero.devices.debug_exit import exit_status

    if (number := exit_status(reason)) is not None:
        return number
    if reason == "reboot" and during:
        return fail(f"the guest asked for a reboot{during}", STATUS[reason])
    return STATUS.get(reason, 1)


def _kernel(image: str | None, kernel: str | None) -> tuple[str | None, Path | None]:
    """Tell --kernel FILE from a series of an image: `run debian --kernel 6.12` is `run debian:6.12`."""
    if kernel is None:
        return image, None
    if image == "debian" and not Path(kernel).exists():
        from ringzero.images.debian import KERNELS

        if kernel in KERNELS:
            return f"debian:{kernel}", None
    if kernel == "":
        raise InputError("--kernel needs the name of a file")
    return image, Path(kernel)


def _terminal_words(append: str | None, command: Sequence[str] | None) -> str | None:
    """Add the kind of our terminal to the command line: the agent gives it to the shell as TERM."""
    term = os.environ.get("TERM", "")
    if command is not None or not term.replace("-", "").isalnum() or not os.isatty(0):
        return append
    return f"TERM={term} {append or ''}".strip()
