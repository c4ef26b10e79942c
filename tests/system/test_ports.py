"""Named ports of a virtio console, with the driver that the kernel's package brings."""

import time
from collections.abc import Iterator

import pytest

from ringzero import Machine
from ringzero.errors import InputError

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian

ECHO, OTHER = "org.example.echo", "org.example.other"


@pytest.fixture(scope="module", params=["debian:6.1", "debian:6.12"])
def guest(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Give a booted guest with two ports."""
    with Machine(request.param, engine=ENGINE, ports=[ECHO, "hvc0", OTHER]) as machine:
        machine.wait_ready(300)
        yield machine


def test_ports_are_found_by_name_and_carry_bytes_both_ways(guest: Machine) -> None:
    names = guest.run(["sh", "-c", "cat /sys/class/virtio-ports/*/name"], check=True, text=True).stdout
    assert names.split() == [ECHO, OTHER, "org.ringzero.agent"]
    with guest.port(ECHO) as line:
        line.settimeout(60)
        echo = guest.spawn(["sh", "-c", "exec cat <>/dev/vport2p1 >&0"], stdin=False)
        line.sendall(b"ping\n")
        assert line.recv(100) == b"ping\n"
        assert guest._ports.is_open(ECHO) and not guest._ports.is_open(OTHER)
        # More than any buffer on the way holds, both ways at once.
        sent = bytes(at * 7 % 251 for at in range(1 << 20))
        line.setblocking(False)
        got, at, begin = bytearray(), 0, time.monotonic()
        while len(got) < len(sent):
            assert time.monotonic() - begin < 60
            try:
                at += line.send(sent[at : at + 65536])
            except BlockingIOError:
                time.sleep(0.0005)
            try:
                got += line.recv(65536)
            except BlockingIOError:
                time.sleep(0.0005)
        assert got == sent
        with pytest.raises(InputError, match="already has its socket"):
            guest.port(ECHO)
    # The far end is gone: the program reads the end of the stream.
    assert echo.wait(60) is not None


def test_a_port_that_is_not_there_is_refused(guest: Machine) -> None:
    with pytest.raises(InputError, match="no port 'x'"):
        guest.port("x")
    with pytest.raises(InputError, match='cannot be named "a/b"'), Machine("debian", ports=["a/b"]):
        pass
    with pytest.raises(InputError, match="two ports"):
        Machine("debian", ports=["a", "a"])
    with pytest.raises(InputError, match="from hvc0 on"):
        Machine("debian", ports=["hvc1"])
    with pytest.raises(InputError, match="not started"):
        Machine("debian", ports=["a"]).port("a")


def test_a_terminal_has_a_size(guest: Machine) -> None:
    with guest.port("hvc0") as line:
        line.settimeout(60)
        guest._ports.resize("hvc0", 33, 101)
        script = "exec <>/dev/hvc0 >&0; stty raw -echo; stty size; read word; echo got $word"
        shell = guest.spawn(["sh", "-c", script], stdin=False)
        told = b""
        while not told.endswith(b"\n"):
            told += line.recv(100)
        assert told == b"33 101\n"
        line.sendall(b"this\n")
        told = b""
        while not told.endswith(b"\n"):
            told += line.recv(100)
        assert told == b"got this\n"
        assert shell.wait(60) == 0
