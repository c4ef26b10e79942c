"""The console, against a guest played by the test."""

import re
import socket
import threading
import time

import pytest

from ringzero.errors import ConsoleTimeout, GuestEnded
from ringzero.machine.console import PENDING_MAX, Console


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    console = Console(ours)
    yield console, theirs
    theirs.close()
    console.close()


def test_expect_takes_up_to_the_match_and_leaves_the_rest(pair) -> None:
    console, guest = pair
    guest.sendall(b"login: ")
    match = console.expect(r"(\w+): ")
    assert match[1] == "login"
    guest.sendall(b"one two three")
    assert console.expect("two").string.startswith("one ")
    assert console.read(20) == b" three"


def test_expect_waits_for_a_pattern_in_pieces(pair) -> None:
    console, guest = pair

    def speak() -> None:
        for piece in (b"Lin", b"ux ver", b"sion 6", b".1.0\r\n"):
            guest.sendall(piece)
            time.sleep(0.02)

    threading.Thread(target=speak).start()
    assert console.expect(r"Linux version (\d+\.\d+)\.")[1] == "6.1"


def test_bytes_that_are_no_text(pair) -> None:
    console, guest = pair
    guest.sendall(b"\xff\xfe caf\xc3\xa9 done\xff!")
    assert "caf\u00e9" in console.expect("done").string
    assert console.read(20) == b"\xff!"
    guest.sendall(b"\x00\x01\x02")
    assert console.expect(re.compile(b"\x01")).start() == 1


def test_expect_in_vain(pair) -> None:
    console, guest = pair
    guest.sendall(b"something else\n")
    began = time.monotonic()
    with pytest.raises(ConsoleTimeout, match="something else"):
        console.expect("prompt", timeout=0.3)
    assert 0.2 < time.monotonic() - began < 5
    assert console.read(0) == b"something else\n"


def test_the_guest_ends(pair) -> None:
    console, guest = pair
    guest.sendall(b"last words")
    guest.shutdown(socket.SHUT_RDWR)
    with pytest.raises(GuestEnded, match="last words"):
        console.expect("more", timeout=20)
    assert console.read(20) == b"last words"
    assert console.read(20) == b""
    with pytest.raises(GuestEnded):
        for _ in range(100):
            console.write("anyone there?")


def test_write_reaches_the_guest(pair) -> None:
    console, guest = pair
    console.write("caf\u00e9\n")
    console.write(b"\x03")
    assert guest.recv(100) in (b"caf\xc3\xa9\n\x03", b"caf\xc3\xa9\n")


def test_a_guest_that_talks_for_ever_does_not_fill_the_host(pair) -> None:
    console, guest = pair
    line = b"x" * 65536
    for _ in range(2 * PENDING_MAX // len(line)):
        guest.sendall(line)
    guest.sendall(b"the end")
    console.expect("the end", timeout=30)
    assert len(console.tail()) <= 2 * 16 * 1024
    assert console.tail().endswith(b"the end")


def test_a_sink_gets_everything_and_may_fail() -> None:
    ours, theirs = socket.socketpair()
    got: list[bytes] = []

    def sink(data: bytes) -> None:
        got.append(data)
        if b"!" in data:
            raise BrokenPipeError

    console = Console(ours, sink)
    theirs.sendall(b"one")
    console.expect("one")
    theirs.sendall(b"two!")
    console.expect("two!")
    theirs.sendall(b"three")
    console.expect("three")
    assert b"".join(got) == b"onetwo!"
    assert isinstance(console.sink_failure, BrokenPipeError)
    theirs.close()
    console.close()
