"""The sockets between a machine and its host, as they are asked for."""

import socket
from pathlib import Path

import pytest

from ringzero import _core
from ringzero.errors import InputError
from ringzero.machine.vsock import Vsock, VsockListener


def test_a_machine_has_none_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert Vsock.parse(False) is None
    plain, named = Vsock.parse(True), Vsock.parse(tmp_path / "name")
    assert plain is not None and plain.path is None
    assert named is not None and named.path == str(tmp_path / "name")
    with pytest.raises(InputError, match="the name of a socket"):
        Vsock.parse("")
    with pytest.raises(InputError, match="not started"):
        plain.connect(1)


def test_who_does_not_answer_is_waited_for_no_longer_than_was_said() -> None:
    vsock = Vsock()
    device = vsock.device(1)
    vm = _core.Vm(1 << 20, devices=[device])
    with pytest.raises(TimeoutError, match="has answered on port 5"):
        vsock.connect(5, timeout=0.01)
    listener = vsock.listen(6)
    with pytest.raises(InputError, match="somebody listens on port 6 already"):
        vsock.listen(6)
    listener.close()
    vsock.listen(6).close()
    vm.start()
    vm.stop()
    assert vm.wait(30) == "stopped"


def test_a_name_belongs_to_one_machine(tmp_path: Path) -> None:
    path = str(tmp_path / "name")
    first = _core.Vsock(path=path)
    with pytest.raises(_core.CoreError, match="another machine has the socket"):
        _core.Vsock(path=path)
    del first
    assert not Path(path).exists()
    with pytest.raises(_core.CoreError, match="cannot be made: "):
        _core.Vsock(path=str(tmp_path / ("x" * 200)))
    for cid in (2, 1 << 32, -1):
        with pytest.raises(_core.CoreError, match="address"):
            _core.Vsock(cid=cid)


def test_a_listener_takes_what_it_is_brought() -> None:
    near, far = socket.socketpair()
    one, two = socket.socketpair()
    socket.send_fds(near, [b"\x10\x27\0\0"], [one.fileno()])
    one.close()
    near.close()
    with VsockListener(7, far) as listener:
        stream, port = listener.accept(10)
        assert port == 10000
        two.sendall(b"x")
        assert stream.recv(1) == b"x"
        with pytest.raises(ConnectionError, match="has ended"):
            listener.accept(10)
    two.close()
    stream.close()
