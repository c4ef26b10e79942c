"""Sockets between programs of a guest and the host, without a network: AF_VSOCK on the guest's side.

    with Machine("debian", vsock=True) as vm:
        with vm.vsock.listen(5000) as listener:
            stream, port = listener.accept()        # a program of the guest has connected to (2, 5000)
        stream = vm.vsock.connect(22)                # to a program of the guest that listens on port 22

A stream is an ordinary socket of this process. Programs that are not this process reach the guest by the name of a
Unix socket, when the machine is given one, as they reach a guest of Firecracker's.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import typing

from ringzero.errors import InputError

if typing.TYPE_CHECKING:
    from types import TracebackType

    from ringzero import _core

__all__ = ["Vsock", "VsockListener"]

_LONGEST_ANSWER = 32


class Vsock:
    """The sockets of one machine. `path` is the name by which other programs reach them, if any."""

    def __init__(self, path: str | None = None) -> None:
        """Nothing is made before the machine is."""
        self.path = path
        self._device: _core.Vsock | None = None

    @classmethod
    def parse(cls, wanted: bool | str | os.PathLike[str]) -> Vsock | None:
        """Return what `vsock=` of a machine asks for: False is none. Raises InputError for an empty path."""
        if isinstance(wanted, bool):
            return cls() if wanted else None
        path = os.fspath(wanted)
        if not path:
            raise InputError("vsock needs the name of a socket, or True")
        return cls(path)

    def device(self, _cpus: int) -> _core.VirtioDevice:
        """Return the device. Raises the core's CoreError when the path is taken, or cannot be."""
        from ringzero import _core

        self._device = _core.Vsock(path=self.path)
        return self._device

    @property
    def _there(self) -> _core.Vsock:
        if self._device is None:
            raise InputError("the machine was not started: its sockets are not there yet")
        return self._device

    def connect(self, port: int, timeout: float | None = 30.0) -> socket.socket:
        """Connect to a program of the guest that listens on `port`, and return the stream.

        A guest that still boots is waited for, up to `timeout` seconds in all: TimeoutError. Raises
        ConnectionRefusedError when no program takes the connection.
        """
        from ringzero.machine.machine import core_errors

        with core_errors():
            stream = socket.socket(fileno=self._there.connect(port))
        try:
            _wait_for_answer(stream, port, timeout)
        except BaseException:
            stream.close()
            raise
        return stream

    def listen(self, port: int) -> VsockListener:
        """Take connections of the guest's programs to `port` of the host, whose address is 2."""
        from ringzero.machine.machine import core_errors

        with core_errors():
            return VsockListener(port, socket.socket(fileno=self._there.listen(port)))


class VsockListener:
    """Takes connections of the guest to one port, until it is closed."""

    def __init__(self, port: int, line: socket.socket) -> None:
        """Made by `Vsock.listen`; `line` brings a descriptor for each connection."""
        self.port = port
        self._line = line

    def accept(self, timeout: float | None = None) -> tuple[socket.socket, int]:
        """Wait for a connection, and return its stream and the port of the guest's program.

        Raises TimeoutError after `timeout` seconds, and ConnectionError when the machine has ended.
        """
        self._line.settimeout(timeout)
        data, descriptors, _, _ = socket.recv_fds(self._line, 4, 1)
        if len(data) < 4 or not descriptors:
            raise ConnectionError("the machine has ended: nobody connects any more")
        (port,) = struct.unpack("<I", data)
        return socket.socket(fileno=descriptors[0]), port

    def fileno(self) -> int:
        """Return a descriptor that can be read when a connection waits, for `select` and its like."""
        return self._line.fileno()

    def close(self) -> None:
        """Take no more connections: the guest is refused."""
        self._line.close()

    def __enter__(self) -> VsockListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _wait_for_answer(stream: socket.socket, port: int, timeout: float | None) -> None:
    """Read "OK PORT" and the newline, and no byte further."""
    deadline = None if timeout is None else time.monotonic() + timeout
    answer = b""
    while not answer.endswith(b"\n"):
        # 0 would not wait for what is there already.
        stream.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-6))
        try:
            byte = stream.recv(1)
        except TimeoutError:
            raise TimeoutError(f"no program of the guest has answered on port {port}") from None
        if not byte or len(answer) > _LONGEST_ANSWER:
            raise ConnectionRefusedError(f"no program of the guest listens on port {port}")
        answer += byte
    stream.settimeout(None)
