"""Switches of a host: VMs of different processes hear each other, tenants do not, and the killed take nobody along."""

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringzero import Host
from ringzero.errors import GuestEnded, InputError
from ringzero.host.client import HostVm
from ringzero.host.runtime import Runtime
from ringzero.host.switches import HostSwitches, reach
from ringzero.host.wire import connect
from ringzero.machine.network import Network, mac_of

pytestmark = pytest.mark.needs_debian

SMALL = {"memory": "96M"}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host.connect(tmp_path / "host", start=True, memory="8G") as host:
        yield host
    with contextlib.suppress(InputError), Host.connect(tmp_path / "host") as last:
        last.down(*(vm.name for vm in last.vms()), now=True)
        last.stop()


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def shell(vm: HostVm, script: str) -> str:
    return str(vm.run(["sh", "-c", script], text=True, check=True, capture_output=True).stdout)


def pings(vm: HostVm, address: str) -> bool:
    return vm.run(["ping", "-c", "1", "-W", "1", address], capture_output=True).returncode == 0


def link_local(mac: bytes) -> str:
    """Return the address that a card gives itself, RFC 4291, appendix A."""
    identifier = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + identifier))


def nobody_listens(runtime: Runtime) -> bool:
    try:
        connect(runtime.switch).close()
    except OSError:
        return True
    return False


def net(number: int) -> str:
    return f"switch=lan,ip=192.168.7.{number}/24"


def test_vms_talk_over_a_switch_tenants_do_not_and_the_killed_take_nobody_along(
    host: Host, tmp_path: Path
) -> None:
    first = host.up("debian", name="first", net=net(1), **SMALL)
    second = host.up("debian", name="second", net=["nat", net(2)], **SMALL)
    stranger = host.up("debian", name="stranger", net=net(3), share_group="other", **SMALL)
    # Ping, and a connection with large segments.
    assert pings(first, "192.168.7.2")
    shell(first, "head -c 20000000 /dev/urandom >/tmp/file; httpd -p 80 -h /tmp")
    expected = shell(first, "sha256sum </tmp/file")
    assert shell(second, "wget -q -O - http://192.168.7.1/file | sha256sum") == expected
    # Over IPv6 neighbours are asked for by multicast (RFC 4861, 7.2.2).
    assert pings(first, f"{link_local(mac_of('second', 1))}%eth0")
    cards = host.ask("switches")["switches"]
    assert {(tenant, switch) for tenant, switch, _, _ in cards} == {("default", "lan"), ("other", "lan")}
    # The one of the other tenant is alone: nothing has ever come to it.
    (strange,) = [counters for tenant, _, _, counters in cards if tenant == "other"]
    assert strange["sent_frames"] == 0
    assert not pings(stranger, "192.168.7.1")
    assert not pings(first, "192.168.7.3")

    # A third process of the user, with an address that is taken, and with one of its own.
    runtime = Runtime(tmp_path / "host")
    taken = next(bytes.fromhex(card) for tenant, _, card, _ in cards if tenant == "default")
    switches = HostSwitches(runtime=runtime)
    with pytest.raises(InputError, match="another machine on this switch has a card with the address"):
        switches.join(Network.parse("switch=lan"), taken)
    with pytest.raises(GuestEnded, match="another machine on this switch"):
        host.up("debian", name="third", net=f"{net(4)},mac={taken.hex(':')}", **SMALL)
    with pytest.raises(InputError, match="tenant"):
        host.up("debian", name="third", net="switch=lan,tenant=other", **SMALL)
    environment = os.environ | {"RINGZERO_HOST": str(tmp_path / "host")}
    command = [sys.executable, "-m", "ringzero", "run", "--net", net(5), "debian", "--", "ping", "-c", "1"]
    run = subprocess.run(
        [*command, "192.168.7.1"], env=environment, capture_output=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr

    # The switch is killed: it comes back, and everybody is plugged in again.
    pid = host.ask("status")["switch"]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: pings(second, "192.168.7.1"))
    assert host.ask("status")["switch"] not in (None, pid)
    assert shell(second, "wget -q -O - http://192.168.7.1/file | sha256sum") == expected
    assert not pings(stranger, "192.168.7.1")

    # A VM is killed: its address is free at once, for one of its name.
    os.kill(next(row["pid"] for row in host.ask("list")["vms"] if row["name"] == "first"), signal.SIGKILL)
    assert eventually(lambda: not pings(second, "192.168.7.1"))
    host.down("first", now=True)
    host.up("debian", name="first", net=net(1), **SMALL)
    assert pings(second, "192.168.7.1")

    # The daemon is killed, and then the switch while there is none: the next daemon mends it.
    os.kill(host.ask("status")["pid"], signal.SIGKILL)
    with reach(runtime) as connection:
        connection.sendall(b'{"do":"report","id":1}\n')
        pid = int(connection.makefile().readline().split('"pid":')[1].split(",")[0].rstrip("}\n"))
    os.kill(pid, signal.SIGKILL)
    with Host.connect(tmp_path / "host", start=True, memory="8G") as another:
        vm = another.vm("second")
        assert eventually(lambda: pings(vm, "192.168.7.1"))
        another.down(*(vm.name for vm in another.vms()), now=True)
        another.stop()
    switches.close()
    # Without anybody, the switch goes as well.
    assert eventually(lambda: nobody_listens(runtime))
