"""The initramfs and its agent in another machine: what fails here is not the fault of our engines."""

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from ringzero import images
from ringzero.machine.console import Console
from ringzero.machine.exec import AgentLink

pytestmark = [pytest.mark.needs_debian, pytest.mark.needs_qemu]


@pytest.fixture(scope="module", params=["6.1", "6.12"])
def guest(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], Console, AgentLink]]:
    image = images.pull("debian", request.param)
    lines = [socket.socketpair() for _ in range(2)]
    command = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-M",
        "pc",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
    ]
    command += ["-m", "256M", "-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    command += ["-append", f"{image.append} quiet ringzero.agent ringzero.shell"]
    for number, (_, theirs) in enumerate(lines):
        command += [
            "-chardev",
            f"socket,id=line{number},fd={theirs.fileno()}",
            "-serial",
            f"chardev:line{number}",
        ]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno() for _, theirs in lines])
    for _, theirs in lines:
        theirs.close()
    console, link = Console(lines[0][0]), AgentLink(lines[1][0])
    try:
        assert link.wait_ready(300)
        yield process, console, link
    finally:
        process.kill()
        process.wait()
        link.close()
        console.close()


def test_commands_and_streams(guest: tuple[subprocess.Popen[bytes], Console, AgentLink]) -> None:
    process, console, link = guest
    out: list[bytes] = []
    err: list[bytes] = []
    command = link.start(["sh", "-c", "cat; echo err >&2; exit 7"], stdout=out.append, stderr=err.append)
    data = os.urandom(200_000)
    command.write(data)
    command.close_stdin()
    assert command.wait(300) == 7
    assert b"".join(out) == data
    assert b"".join(err) == b"err\n"
    with pytest.raises(FileNotFoundError):
        link.start(["nonesuch"]).wait(60)
    console.write("\n")
    console.expect("# ", timeout=60)
    link.resize_console(40, 132)
    console.write("stty size\n")
    console.expect("40 132", timeout=60)
    link.power_off()
    assert process.wait(60) == 0
