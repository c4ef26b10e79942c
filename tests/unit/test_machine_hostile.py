"""Agents that hang, flood and lie, played by the test: all ends, with a clear error and in little memory."""

import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringzero.errors import GuestError
from ringzero.machine import exec as link_module
from ringzero.machine import guest_process, streams, tar
from ringzero.machine.drive import Driven
from ringzero.machine.exec import AgentLink
from ringzero.machine.files import GuestFiles
from ringzero.machine.frames import (
    ACK,
    CREDIT,
    EXEC,
    EXIT,
    HEADER,
    HELLO,
    LINE_WINDOW,
    MAGIC,
    READY,
    SIGNAL,
    STDERR,
    STDIN,
    STDOUT,
    WORD,
)

from .agents import Here, agent_here

Answer = Callable[[Callable[..., None], int, int, bytes], None]
"""What an agent does with a frame: given what sends one, and its kind, number and payload."""


def played(line: socket.socket, answer: Answer) -> None:
    def send(kind: int, number: int, payload: bytes = b"") -> None:
        line.sendall(HEADER.pack(kind, 0, number, len(payload)) + payload)

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (piece := line.recv(size - len(data))):
                raise ConnectionResetError
            data += piece
        return data

    try:
        send(READY, 0, MAGIC + WORD.pack(1))
        while True:
            kind, _, number, size = HEADER.unpack(exactly(HEADER.size))
            payload = exactly(size)
            send(ACK, 0, WORD.pack(HEADER.size + size))
            answer(send, kind, number, payload)
    except OSError:
        pass


@pytest.fixture
def guest() -> Iterator[Callable[[Answer], Driven]]:
    """A guest whose agent does what is given."""
    made: list[tuple[AgentLink, socket.socket]] = []

    def make(answer: Answer) -> Driven:
        ours, theirs = socket.socketpair()
        threading.Thread(target=played, args=(theirs, answer), daemon=True).start()
        made.append((AgentLink(ours), theirs))
        return Here(made[-1][0])

    yield make
    for link, line in made:
        line.close()
        link.close()


def silent(*_: object) -> None:
    """Take everything and say nothing."""


def floods(kind: int) -> Answer:
    def answer(send: Callable[..., None], asked: int, number: int, _: bytes) -> None:
        if asked == EXEC:
            for _ in range(20):
                send(kind, number, bytes(60000))

    return answer


def says(*pieces: bytes) -> Answer:
    """Answer a command with an output, and success."""

    def answer(send: Callable[..., None], asked: int, number: int, _: bytes) -> None:
        if asked == EXEC:
            for piece in pieces:
                send(STDOUT, number, piece)
            send(EXIT, number, WORD.pack(0))

    return answer


@pytest.mark.parametrize(
    "work",
    [
        lambda files, tmp: files.read_bytes("/x"),
        lambda files, tmp: files.write_bytes("/x", b"text"),
        lambda files, tmp: files.write_bytes("/x", bytes(1_000_000)),
        lambda files, tmp: files.path("/x").stat(),
        lambda files, tmp: list(files.path("/x").iterdir()),
        lambda files, tmp: files.path("/x").rmtree(),
        lambda files, tmp: files.get("/x", tmp / "x"),
        lambda files, tmp: files.put("/etc/passwd", "/x"),
    ],
)
def test_a_guest_that_hangs_is_given_up(
    guest: Callable[[Answer], Driven], tmp_path: Path, work: Callable[[GuestFiles, Path], object]
) -> None:
    with pytest.raises(GuestError, match=r"(nothing for|within) 0\.2 s"):
        work(guest(silent).files.within(0.2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_shows_life_is_waited_for(guest: Callable[[Answer], Driven]) -> None:
    def slow(send: Callable[..., None], asked: int, number: int, _: bytes) -> None:
        if asked == EXEC:
            for _ in range(5):
                threading.Event().wait(0.2)
                send(STDOUT, number, b"x")
            send(EXIT, number, WORD.pack(0))

    assert guest(slow).files.within(0.6).read_bytes("/x") == b"xxxxx"


@pytest.mark.parametrize("kind", [STDOUT, STDERR])
def test_a_flood_in_the_place_of_an_answer(guest: Callable[[Answer], Driven], kind: int) -> None:
    driven = guest(floods(kind))
    with pytest.raises(GuestError, match="too much to be kept" if kind == STDOUT else "within 0.3 s"):
        driven.path("/x", timeout=0.3).stat()


@pytest.mark.parametrize("text", [b"", b"1 2 3", b"x" * 100, b"-1 " * 10, b"9" * 4000 + b" 0" * 9])
def test_lies_about_what_a_file_is(guest: Callable[[Answer], Driven], text: bytes) -> None:
    with pytest.raises(GuestError, match="did not tell what /x is"):
        guest(says(text)).path("/x").stat()


def test_names_of_a_folder_that_lead_elsewhere(guest: Callable[[Answer], Driven]) -> None:
    with pytest.raises(GuestError, match="no name"):
        list(guest(says(b"8../../etc/passwd\0")).path("/x").iterdir())


def test_more_than_was_asked_for_is_not_copied(guest: Callable[[Answer], Driven], tmp_path: Path) -> None:
    head = tar._head(tar.Member(".", "0", 0o644, 1 << 40, 0))
    with pytest.raises(GuestError, match="more than the 100000 bytes"):
        guest(says(head, *[bytes(60000)] * 4)).files.get("/x", tmp_path / "x", most=100_000)
    assert list(tmp_path.iterdir()) == []
    whole = tar._head(tar.Member(".", "0", 0o644, 0, 0)) + bytes(1024)
    with pytest.raises(GuestError, match="after the end"):
        guest(says(whole, bytes(60000))).files.get("/x", tmp_path / "x")


def reader_of(pieces: Iterator[bytes]) -> tar.Reader:
    rest = bytearray()

    def read(size: int) -> bytes:
        while not rest:
            rest.extend(next(pieces))
        data = bytes(rest[:size])
        del rest[:size]
        return data

    return tar.Reader(read)


def test_an_endless_archive_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tar._head(tar.Member(".", "5", 0o755, 0, 0))
    empty = tar._block(b"x", 0, 0, 0, b"", b"")
    with pytest.raises(GuestError, match="headers of nothing"):
        tar.unpack(reader_of(itertools.chain([folder], itertools.repeat(empty))), tmp_path / "a")
    long = tar._head(tar.Member("x" * 5000, "5", 0o755, 0, 0))
    with pytest.raises(GuestError, match="too long"):
        tar.unpack(reader_of(iter([folder, long])), tmp_path / "b")
    monkeypatch.setattr(tar, "FOLDERS_MAX", 1000)
    folders = (tar._head(tar.Member(f"folder-{at}", "5", 0o755, 0, 0)) for at in itertools.count())
    with pytest.raises(GuestError, match="more folders"):
        tar.unpack(reader_of(itertools.chain([folder], folders)), tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) < 200


def test_what_is_captured_has_a_limit_and_ends_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streams, "CAPTURE_MAX", 1_000_000)
    script = f"echo $$ > {tmp_path}/pid; exec yes"
    with agent_here() as here:
        for how in ({}, {"input": b""}):
            with pytest.raises(GuestError, match="more than 1000000 bytes"):
                here.run(["sh", "-c", script], **how)
            assert here.run(["true"]).returncode == 0
            pid = int((tmp_path / "pid").read_text())
            while Path(f"/proc/{pid}").exists() and b"yes" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.sched_yield()  # it is killed, and not left to write for ever


def test_a_command_for_a_guest_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "START_PATIENCE", 0.2)
    ours, theirs = socket.socketpair()
    link = AgentLink(ours)
    theirs.sendall(HEADER.pack(READY, 0, 0, len(MAGIC) + 4) + MAGIC + WORD.pack(1))
    with pytest.raises(GuestError, match=r"taken nothing for 0\.2 s"):
        for _ in range(10):
            link.start(["x" * 10000])
    theirs.close()
    link.close()


def test_a_frame_that_was_given_up_is_sent_whole_before_the_next() -> None:
    ours, theirs = socket.socketpair()
    link = AgentLink(ours)
    theirs.settimeout(20)
    theirs.sendall(HEADER.pack(READY, 0, 0, len(MAGIC) + 4) + MAGIC + WORD.pack(1))
    process = link.start(["cat"])
    with pytest.raises(GuestError, match=r"taken nothing for 0\.2 s"):
        process.write(b"x" * 65536, 0.2)
    process.close_stdin()
    process.kill()
    hello = HEADER.size + len(MAGIC) + WORD.size
    got, acknowledged, kinds, at = b"", 0, [], 0
    while SIGNAL not in kinds:
        got += theirs.recv(65536)
        theirs.sendall(HEADER.pack(ACK, 0, 0, 4) + WORD.pack(len(got) - acknowledged))
        acknowledged = len(got)
        while len(got) >= at + HEADER.size:
            kind, _, _, size = HEADER.unpack_from(got, at)
            if len(got) < at + HEADER.size + size:
                break
            kinds.append(kind)
            assert kind != STDIN or set(got[at + HEADER.size : at + HEADER.size + size]) == {ord("x")}
            at += HEADER.size + size
    assert kinds[:2] == [HELLO, EXEC]
    assert acknowledged > LINE_WINDOW > hello
    assert kinds.count(STDIN) * guest_process.STDIN_CHUNK > LINE_WINDOW - 2 * guest_process.STDIN_CHUNK
    theirs.close()
    link.close()


def test_credit_that_is_never_given_ends_a_copy(guest: Callable[[Answer], Driven], tmp_path: Path) -> None:
    def one_window(send: Callable[..., None], asked: int, number: int, _: bytes) -> None:
        if asked == EXEC:
            send(CREDIT, number, WORD.pack(0))

    (tmp_path / "big").write_bytes(bytes(200_000))
    with pytest.raises(GuestError, match="taken nothing"):
        guest(one_window).files.put(tmp_path / "big", "/x", timeout=0.2)


def test_timeouts_of_commands_hold(
    guest: Callable[[Answer], Driven], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_process, "PATIENCE", 0.2)
    with pytest.raises(subprocess.TimeoutExpired):
        guest(floods(STDOUT)).run(["true"], timeout=0.3)
