"""Networks of the Debian images, with the driver that the kernel's package brings."""

import hashlib
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from ringzero import Machine
from ringzero.errors import InputError
from ringzero.machine.metadata import instance_of

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian

DATA = bytes(range(256)) * 40_000


@pytest.fixture(scope="module")
def guest() -> Iterator[Machine]:
    """Give one guest with a network, and with a port, to all tests of this file."""
    with Machine(
        "debian", engine=ENGINE, name="web", net="nat,host-loopback", publish=["0:80", "0:53/udp"]
    ) as machine:
        machine.wait_ready(300)
        yield machine


def shell(guest: Machine, script: str) -> str:
    done = guest.run(["sh", "-c", script], text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_command_finds_the_network_there(guest: Machine) -> None:
    facts = shell(guest, "hostname; ip -4 addr show eth0; ip route; cat /etc/resolv.conf; ping -c 1 10.0.2.2")
    for part in (
        "web\n",
        "10.0.2.15/24",
        "default via 10.0.2.2",
        "nameserver 10.0.2.3",
        "1 packets received",
    ):
        assert part in facts
    assert "10.0.2.2" in shell(guest, "nslookup host.ringzero.internal")


def test_bytes_go_both_ways_through_the_hosts_sockets(guest: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        received = bytearray()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(DATA)
                connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(1 << 16):
                    received.extend(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        # A file that the guest has got whole goes back whole.
        got = shell(guest, f"nc 10.0.2.2 {port} </dev/null >/tmp/got; sha256sum </tmp/got")
        thread.join(60)
        assert got.split()[0] == hashlib.sha256(DATA).hexdigest() and not received
        received.clear()
        thread = threading.Thread(target=serve)
        thread.start()
        shell(guest, f"nc 10.0.2.2 {port} </tmp/got >/dev/null")
        thread.join(60)
        assert bytes(received) == DATA


def test_a_guest_is_told_about_itself(guest: Machine) -> None:
    base = "http://169.254.169.254/latest"
    assert shell(guest, f"wget -q -O - {base}/meta-data/instance-id") == instance_of("web")
    mac = shell(guest, f"wget -q -O - {base}/meta-data/mac")
    assert mac in shell(guest, "ip link show eth0")
    assert shell(guest, f"wget -q -O - {base}/meta-data/local-ipv4") == "10.0.2.15"
    assert guest.run(["wget", "-q", "-O", "-", f"{base}/user-data"]).returncode != 0
    assert guest.run(["nc", "-w", "5", "169.254.169.254", "81"], stdin=subprocess.DEVNULL).returncode != 0


def test_ports_lead_to_the_guest(guest: Machine) -> None:
    tcp, udp = guest.networks.published()
    # Nobody listens yet: the guest's system refuses, and so does ours.
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection((tcp.address, tcp.port), 60) as refused,
    ):
        refused.recv(1)
    shell(guest, "mkdir -p /srv && echo words >/srv/file && httpd -p 80 -h /srv")
    with urllib.request.urlopen(f"http://{tcp.address}:{tcp.port}/file", timeout=60) as answer:
        assert answer.read() == b"words\n"
    # The guest's system says that nobody is there; a datagram is lost, and not the network.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.sendto(b"words\n", (udp.address, udp.port))
    assert "words" in shell(guest, "wget -q -O - http://127.0.0.1/file")


def test_what_is_not_allowed_is_refused_at_once() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Machine("debian", engine=ENGINE, net="allow=192.0.2.0/24:443") as machine,
    ):
        port = server.getsockname()[1]
        for target in (f"10.0.2.2 {port}", f"127.0.0.1 {port}", "198.51.100.1 443", "192.0.2.1 80"):
            done = machine.run(["sh", "-c", f"nc -w 30 {target} </dev/null"], text=True)
            assert done.returncode != 0 and "refused" in done.stderr, target
        done = machine.run(["wget", "-q", "-O", "-", "http://169.254.169.254/"], capture_output=True)
        assert done.returncode != 0 and b"refused" in done.stderr
        assert "nameserver" not in shell(machine, "cat /etc/resolv.conf 2>/dev/null || true")


def test_a_switch_joins_machines_and_keeps_others_out() -> None:
    def machine(number: int, switch: str) -> Machine:
        net = f"switch={switch},ip=192.168.7.{number}/24"
        return Machine("debian", engine=ENGINE, name=f"m{number}", net=net)

    with machine(1, "lan") as first, machine(2, "lan") as second, machine(3, "other") as third:
        shell(first, "head -c 20000000 /dev/urandom >/tmp/file; httpd -p 80 -h /tmp")
        expected = shell(first, "sha256sum </tmp/file")
        assert shell(second, "wget -q -O - http://192.168.7.1/file | sha256sum") == expected
        assert third.run(["ping", "-c", "1", "-W", "1", "192.168.7.1"]).returncode != 0
        with pytest.raises(InputError, match="another machine on this switch"), machine(1, "lan"):
            pass
