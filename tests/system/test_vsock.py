"""Sockets between programs of the guest and of the host, with the driver that the kernel's package brings."""

import hashlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringzero import Machine
from ringzero.errors import InputError

from .conftest import ENGINE

pytestmark = [
    pytest.mark.needs_debian,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the guest's program with"),
]

SOURCE = Path(__file__).with_name("vsock.c")
PATTERN = bytes(at * 31 % 253 for at in range(3 << 20))


@pytest.fixture(scope="module", params=["debian:6.1", "debian:6.12"])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Give a guest that echoes on port 7, whose socket has a name."""
    folder = tmp_path_factory.mktemp("vsock")
    program = folder / "vsock"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-o", str(program), str(SOURCE)], check=True)
    with Machine(request.param, engine=ENGINE, vsock=folder / "name") as machine:
        script = "cat > /root/vsock && chmod +x /root/vsock"
        machine.run(["sh", "-c", script], input=program.read_bytes(), check=True)
        ready = threading.Event()
        machine.spawn(["/root/vsock", "echo", "7"], stdout=lambda data: ready.set(), stdin=False)
        assert ready.wait(60)
        yield machine


def answers(stream: socket.socket, sent: bytes) -> bytes:
    """Send all, and the end, while another thread reads to the end."""
    got = bytearray()

    def read() -> None:
        while piece := stream.recv(1 << 16):
            got.extend(piece)

    stream.settimeout(60)
    reader = threading.Thread(target=read)
    reader.start()
    stream.sendall(sent)
    stream.shutdown(socket.SHUT_WR)
    reader.join(60)
    assert not reader.is_alive()
    return bytes(got)


def test_this_process_reaches_a_program_of_the_guest(guest: Machine) -> None:
    with guest.vsock.connect(7) as stream:
        assert answers(stream, PATTERN) == PATTERN
    with guest.vsock.connect(7) as stream:
        assert answers(stream, b"again") == b"again"
    with pytest.raises(ConnectionRefusedError, match="listens on port 8"):
        guest.vsock.connect(8)


def test_others_reach_it_by_name(guest: Machine) -> None:
    path = guest.vsock.path
    assert path is not None
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(path)
        stream.sendall(b"CONNECT 7\nhello")
        stream.settimeout(60)
        told = b""
        while not told.endswith(b"hello"):
            told += stream.recv(100)
        assert told.startswith(b"OK ")
    with pytest.raises(InputError, match="another machine has the socket"), Machine("debian", vsock=path):
        pass


def talk(guest: Machine, serve: Callable[[], None], port: int) -> bytes:
    server = threading.Thread(target=serve)
    server.start()
    done = guest.run(["/root/vsock", "talk", str(port)], input=PATTERN, timeout=120)
    server.join(60)
    assert done.returncode == 0, done.stderr
    return bytes(done.stdout)


def test_a_program_of_the_guest_reaches_us(guest: Machine) -> None:
    wanted = hashlib.sha256(PATTERN).hexdigest().encode()

    def digest(stream: socket.socket) -> None:
        found = hashlib.sha256()
        stream.settimeout(60)
        with stream:
            while piece := stream.recv(1 << 16):
                found.update(piece)
            stream.sendall(found.hexdigest().encode())

    with guest.vsock.listen(52) as listener:

        def serve() -> None:
            stream, port = listener.accept(60)
            assert port >= 1024
            digest(stream)

        assert talk(guest, serve, 52) == wanted
        with pytest.raises(InputError, match="port 52"):
            guest.vsock.listen(52)
    done = guest.run(["/root/vsock", "talk", "52"], text=True)
    assert "reset" in done.stderr, "nobody listens any more"

    with socket.socket(socket.AF_UNIX) as named:
        named.bind(f"{guest.vsock.path}_53")
        named.listen()
        named.settimeout(60)
        assert talk(guest, lambda: digest(named.accept()[0]), 53) == wanted


def test_many_at_once(guest: Machine) -> None:
    # The program takes one after the other; the others wait with what they have sent.
    streams = [guest.vsock.connect(7) for _ in range(5)]
    for number, stream in enumerate(streams):
        stream.sendall(b"%d" % number)
    for number, stream in enumerate(streams):
        with stream:
            stream.settimeout(60)
            assert stream.recv(10) == b"%d" % number


def test_the_end_of_a_machine_is_the_end_of_its_streams(tmp_path: Path) -> None:
    with Machine("debian", engine=ENGINE, vsock=tmp_path / "name") as machine:
        machine.wait_ready(300)
        listener = machine.vsock.listen(1)
        with pytest.raises(TimeoutError):
            listener.accept(0.01)
        assert (tmp_path / "name").exists()
    with pytest.raises(ConnectionError, match="has ended"):
        listener.accept(30)
    assert not (tmp_path / "name").exists()
    with pytest.raises(InputError, match="no vsock"):
        Machine("debian").vsock.connect(1)
