"""The switch's process and the way to it, without guests: cables are driven by hand."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import _core
from ringzero.errors import InputError
from ringzero.host.runtime import Runtime
from ringzero.host.spec import GuestSpec
from ringzero.host.switches import HostSwitches, reach
from ringzero.host.wire import Channel, Message
from ringzero.machine.network import Network, Networks

LAN = Network.parse("switch=lan")
OTHERS_LAN = Network.parse("switch=lan,tenant=other")
A, B, C = (bytes([2, 0, 0, 0, 0, number]) for number in (1, 2, 3))
EVERYBODY = b"\xff" * 6
HEADER = bytes(12)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path / "host")


@pytest.fixture
def switches(runtime: Runtime) -> Iterator[HostSwitches]:
    switches = HostSwitches(runtime=runtime)
    yield switches
    switches.close()
    os.kill(pid_of(runtime), signal.SIGKILL)


def pid_of(runtime: Runtime) -> int:
    with Channel(reach(runtime)) as channel:
        return int(channel.ask("report")["pid"])


def heard(card: socket.socket) -> bytes:
    """Return what a frame brought that has come, or nothing."""
    card.settimeout(10.0)
    return card.recv(70_000)[26:]


def test_tenants_have_switches_of_their_own(switches: HostSwitches, runtime: Runtime) -> None:
    first, second = switches.join(LAN, A), switches.join(LAN, B)
    other, alone = switches.join(OTHERS_LAN, A), switches.join(OTHERS_LAN, C)
    first.send(HEADER + EVERYBODY + A + b"\x88\xb5ours")
    other.send(HEADER + EVERYBODY + A + b"\x88\xb5theirs")
    assert (heard(second), heard(alone)) == (b"ours", b"theirs")
    for card in (second, alone):
        card.setblocking(False)
        with pytest.raises(BlockingIOError):
            card.recv(1)
    with pytest.raises(InputError, match="02:00:00:00:00:02: give each its own"):
        switches.join(LAN, B)
    with Channel(reach(runtime)) as channel:
        rows = channel.ask("report")["switches"]
        assert {(tenant, name, card) for tenant, name, card, _ in rows} == {
            ("default", "lan", A.hex()),
            ("default", "lan", B.hex()),
            ("other", "lan", A.hex()),
            ("other", "lan", C.hex()),
        }
        (sent,) = [counters for tenant, _, card, counters in rows if (tenant, card) == ("other", A.hex())]
        assert (sent["received_frames"], sent["received_bytes"], sent["sent_frames"]) == (1, 20, 0)
        for wrong in (
            {"tenant": "", "switch": "lan", "card": A.hex()},
            {"tenant": "x", "switch": "lan", "card": "zz"},
            {"tenant": "x", "switch": "lan", "card": "01" * 6},
            {"tenant": "x", "switch": "lan"},
        ):
            with pytest.raises(InputError):
                channel.ask("join", [first.fileno()], **wrong)
        with pytest.raises(InputError):
            channel.ask("join", tenant="x", switch="lan", card=C.hex())
    for card in (first, second, other, alone):
        card.close()


def test_the_switch_is_jailed_and_comes_back_with_who_was_plugged_in(
    switches: HostSwitches, runtime: Runtime
) -> None:
    networks = Networks.parse("web", "switch=lan", ())
    networks.switches = switches
    (device,) = networks.devices()
    assert isinstance(device, _core.NetworkCard)
    pid = pid_of(runtime)
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Seccomp:\t2" in status
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while True:
        answer: Message = {"switches": []}
        # One that has been killed takes a connection until it is gone.
        with contextlib.suppress(OSError), Channel(reach(runtime)) as channel:
            answer = channel.ask("report")
        if [card for _, _, card, _ in answer["switches"]] == [networks.mac(0).hex()]:
            break
        assert time.monotonic() < end
        time.sleep(0.05)
    assert answer["pid"] != pid


def test_a_vm_of_a_host_names_switches_and_has_its_groups() -> None:
    spec = GuestSpec.checked(name="web", group="shop", net=["nat", "switch=lan,mac=02:00:00:00:00:01"])
    assert spec.switched() == [(1, "lan", A)]
    assert GuestSpec.from_json(spec.as_json()) == spec
    # As an earlier daemon kept it.
    assert GuestSpec.from_json(spec.as_json() | {"net": "nat"}).net == ("nat",)
    with pytest.raises(InputError, match="leave tenant= away"):
        GuestSpec.checked(name="web", net="switch=lan,tenant=other")
