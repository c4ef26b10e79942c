"""The wire between the processes of a host: whole messages in order, descriptors with theirs, rubbish ends it."""

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest

from ringzero.errors import InputError, InternalError
from ringzero.host.loop import Loop
from ringzero.host.wire import LONGEST, MOST_UNSENT, Channel, Message, Peer, connect, listen


class Echo:
    """A peer on a loop of its own thread, which answers each message with itself and with what its descriptors read."""

    def __init__(self, connection: socket.socket) -> None:
        self.loop = Loop()
        self.loop.accept_posts()
        self.why: str | None = None
        self.peer = Peer(self.loop, connection, self.received, self.closed)
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def received(self, peer: Peer, message: Message, fds: list[int]) -> None:
        read = [os.pread(fd, 100, 0).decode() for fd in fds]
        peer.send({"ok": True, "id": message.get("id"), "got": message.get("text"), "read": read}, fds)
        for fd in fds:
            os.close(fd)

    def closed(self, _peer: Peer, why: str) -> None:
        self.why = why
        self.loop.stop()

    def end(self) -> str | None:
        self.thread.join(10)
        self.loop.close()
        return self.why


def pair() -> tuple[Channel, Echo]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    return Channel(ours), Echo(theirs)


def test_messages_come_whole_and_in_order() -> None:
    channel, echo = pair()
    with channel:
        for size in (0, 1, 1000, 100_000, 3_000_000):
            assert channel.ask("echo", text="x" * size)["got"] == "x" * size
        for number in range(100):
            channel.send({"do": "echo", "id": number, "text": str(number)})
        for number in range(100):
            got = channel.receive()
            assert got is not None and got[0]["got"] == str(number)
        with pytest.raises(InternalError, match="too long"):
            channel.ask("echo", text="x" * LONGEST)
    assert echo.end() == ""


def test_descriptors_go_with_their_message(tmp_path: Path) -> None:
    channel, echo = pair()
    with channel:
        files = []
        for number in range(3):
            path = tmp_path / str(number)
            path.write_text(f"file {number}")
            files.append(os.open(path, os.O_RDONLY))
        channel.send({"do": "echo", "id": 1, "text": "x" * 200_000})
        channel.send({"do": "echo", "id": 2}, files[:1])
        channel.send({"do": "echo", "id": 3}, files[1:])
        answers = []
        for _ in range(3):
            got = channel.receive()
            assert got is not None
            answers.append((got[0]["read"], [os.pread(fd, 100, 0).decode() for fd in got[1]]))
            for fd in got[1]:
                os.close(fd)
        assert answers == [([], []), (["file 0"], ["file 0"]), (["file 1", "file 2"], ["file 1", "file 2"])]
        for fd in files:
            os.close(fd)
    echo.end()
    assert not [
        fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and str(tmp_path) in str(fd.resolve())
    ]


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"hello\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"3\n", "no JSON object"),
        (b"[" * 200_000 + b"\n", "not JSON"),
        (b'{"fds": 1}\n', "descriptors"),
        (b'{"fds": -1}\n', "descriptors"),
        (b'{"fds": true}\n', "descriptors"),
        (b'{"fds": "x"}\n', "descriptors"),
        (b"x" * (LONGEST + 100_000), "longer"),
    ],
)
def test_rubbish_is_told_and_ends_the_connection(sent: bytes, told: str) -> None:
    channel, echo = pair()
    with channel:
        sender = threading.Thread(target=_send_all, args=(channel.connection, sent))
        sender.start()
        got = channel.receive()
        assert got is not None and told in got[0]["error"]
        sender.join(10)
    assert told in (echo.end() or "")


def _send_all(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the other end has had enough
        connection.sendall(data)


def test_who_does_not_read_is_dropped() -> None:
    channel, echo = pair()
    with channel:
        for _ in range(2 * MOST_UNSENT // 1_000_000 + 5):
            try:
                channel.send({"do": "echo", "text": "x" * 1_000_000})
            except OSError:
                break
        assert "does not read" in (echo.end() or "")


def test_errors_are_raised_as_what_they_were() -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours) as channel, theirs:
        theirs.sendall(
            b'{"event": "x"}\n{"error": "no", "status": 2, "id": 1}\n{"error": "bug", "status": 1, "id": 2}\n'
        )
        with pytest.raises(InputError, match="no"):
            channel.ask("x")
        with pytest.raises(InternalError, match="bug"):
            channel.ask("y")
        theirs.close()
        with pytest.raises(OSError):
            channel.ask("z")


def test_sockets_in_deep_folders(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    with listen(folder / "socket") as listener, connect(folder / "socket") as connection:
        taken, _ = listener.accept()
        taken.close()
        assert connection.recv(1) == b""
    # A stale one is replaced; a missing one is nobody.
    with listen(folder / "socket"):
        pass
    with pytest.raises(OSError):
        connect(folder / "socket")
    with pytest.raises(OSError):
        connect(folder / "none")


def test_timers_come_in_order_and_can_be_cancelled() -> None:
    loop = Loop()
    seen: list[str] = []
    loop.call_later(0.02, lambda: seen.append("b"))
    loop.call_later(0.01, lambda: seen.append("a"))
    loop.call_later(0.015, lambda: seen.append("never")).cancel()
    loop.call_later(0.03, loop.stop)
    loop.run()
    assert seen == ["a", "b"]
    loop.close()
