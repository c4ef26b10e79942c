"""The ports of a machine, and the device that has them."""

import os
import socket

import pytest

from ringzero import _core
from ringzero.errors import InputError
from ringzero.machine.ports import Ports


def test_names_are_told_apart_and_terminals_come_in_order() -> None:
    assert not Ports([])
    assert Ports(["org.example.a", "hvc1", "hvc0"])
    with pytest.raises(InputError, match="two ports are named 'a'"):
        Ports(["a", "a"])
    with pytest.raises(InputError, match="no hvc1 yet"):
        Ports(["hvc1", "a"])
    with pytest.raises(InputError, match="not started"):
        Ports(["a"]).join("a")


def test_a_port_is_joined_once_at_a_time() -> None:
    ports = Ports(["a", "hvc0"])
    assert isinstance(ports.device(1), _core.VirtioDevice)
    with pytest.raises(InputError, match="no port 'b': it has a, hvc0"):
        ports.join("b")
    with ports.join("a") as line:
        assert line.family == socket.AF_UNIX
        with pytest.raises(_core.CoreError, match="port 1 already has its socket"):
            ports.join("a")
    assert not ports.is_open("a")
    ports.resize("hvc0", 24, 80)


def test_a_device_belongs_to_one_machine() -> None:
    console = _core.Console(["a"])
    vm = _core.Vm(1 << 20, devices=[console])
    with pytest.raises(_core.CoreError, match="has this device already"):
        _core.Vm(1 << 20, devices=[console])
    line = socket.socket(fileno=console.port(0))
    vm.start()
    vm.stop()
    assert vm.wait(30) == "stopped"
    # The end of the stream, and no socket that stays open.
    line.settimeout(30)
    assert line.recv(1) == b""
    before = len(os.listdir("/proc/self/fd"))
    line.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


@pytest.mark.parametrize(
    ("names", "consoles", "sentence"),
    [
        ([], 0, "a console has 1 to 31 ports, not 0"),
        (["a"] * 2, 0, "two ports are named"),
        (["../a"], 1, "cannot be named"),
        (["a"], 31, "1 to 31 ports, not 32"),
        ([], -1, "a number of consoles cannot be -1"),
    ],
)
def test_what_no_guest_can_have_is_refused(names: list[str], consoles: int, sentence: str) -> None:
    with pytest.raises(_core.CoreError, match=sentence):
        _core.Console(names, consoles=consoles)
