"""Networks as the operator writes them, and the cards that come of it."""

import os
import socket

import pytest

from ringzero import Machine, _core
from ringzero.errors import InputError
from ringzero.machine.network import GuestListener, Network, Networks, Publish, mac_of


def test_networks_are_read_as_they_are_written() -> None:
    assert Network.parse("none").kind == "none"
    assert Network.parse("nat") == Network("nat")
    near = Network.parse("nat,host-loopback,mtu=9000,mac=02:00:00:00:00:0a")
    assert (near.host_loopback, near.mtu, near.mac) == (True, 9000, b"\2\0\0\0\0\x0a")
    strict = Network.parse("allow=192.0.2.0/24:443,198.51.100.7,[2001:db8::]/32:80,2001:db8::1")
    assert strict.rules == (
        ("192.0.2.0", 24, 443),
        ("198.51.100.7", 32, None),
        ("2001:db8::", 32, 80),
        ("2001:db8::1", 128, None),
    )
    joined = Network.parse("switch=lan,ip=192.168.7.1/24")
    assert (joined.kind, joined.switch, joined.address) == ("switch", "lan", "192.168.7.1/24")
    assert (strict.names, Network.parse("allow=192.0.2.1,dns").names) == (False, True)
    told = ["nat", "nat,no-metadata", "allow=192.0.2.1", "allow=192.0.2.1,metadata"]
    assert [Network.parse(text).metadata for text in told] == [True, False, False, True]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "lan",
            "allow=",
            "allow=nowhere",
            "allow=192.0.2.0/24:0",
            "allow=192.0.2.0/33",
            "nat,more",
            "none,nat",
        ),
        *(
            "nat,mtu=20",
            "nat,mtu=x",
            "nat,mac=01:00:00:00:00:00",
            "nat,mac=02",
            "nat,dns",
            "nat,metadata",
            "allow=192.0.2.1,no-metadata",
            "switch=lan,no-metadata",
            "nat,ip=192.0.2.1/24",
            "switch=",
            "switch=a b",
            "switch=lan,host-loopback",
        ),
    ],
)
def test_other_networks_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"net|mtu|mac"):
        Machine("hello", net=text)


def test_ports_are_read_as_they_are_written() -> None:
    assert Publish.parse("8080:80") == Publish("127.0.0.1", 8080, 80)
    assert Publish.parse("0.0.0.0:0:53/udp") == Publish("0.0.0.0", 0, 53, udp=True)
    assert Publish.parse("[::1]:80:80/tcp").place == "[::1]:80"
    assert str(Publish.parse("8080:80")) == "127.0.0.1:8080:80"
    for text in ("80", "x:80", "80:", "80:0", "80:70000", "here:80:80", "80:80/sctp"):
        with pytest.raises(InputError, match="publish"):
            Publish.parse(text)


def test_a_port_needs_a_network_that_it_can_lead_to() -> None:
    assert Networks.parse("web", None, "8080:80").networks == (Network("nat"),)
    assert not Networks.parse("web", None, ())
    with pytest.raises(InputError, match="no network"):
        Networks.parse("web", "none", "8080:80")
    with pytest.raises(InputError, match="one network"):
        Networks.parse("web", ["nat", "nat"], ())


def test_an_address_comes_from_the_name() -> None:
    first = mac_of("web")
    assert first == mac_of("web") and len({first, mac_of("db"), mac_of("web", 1)}) == 3
    assert first[0] & 3 == 2, "locally administered, of one card"


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(_core.CoreError, match=f"127.0.0.1:{port} is taken already"):
            Networks.parse("web", "nat", f"{port}:80").devices()
    with pytest.raises(_core.CoreError, match=r"nobody can listen at 192\.0\.2\.1"):
        Networks.parse("web", "nat", "192.0.2.1:0:80").devices()


def test_a_free_port_is_told_of_and_free_again_when_the_card_is_gone() -> None:
    networks = Networks.parse("web", "nat", ["0:80", "0:53/udp"])
    devices = networks.devices()
    first, second = networks.published()
    assert first.port and second.port and first.guest_port == 80
    with socket.create_connection(("127.0.0.1", first.port), 10):
        pass
    networks.cards.clear()
    devices.clear()
    socket.create_server(("127.0.0.1", first.port)).close()


def test_the_core_judges_what_it_is_given() -> None:
    for mac in (b"", b"\1\0\0\0\0\0", bytes(7)):
        with pytest.raises(_core.CoreError, match="card's address"):
            _core.nat_card(mac)
    for wrong in ({"mtu": 100}, {"mtu": 70000}, {"resolvers": ["x"]}, {"rules": [("x", 1, None)]}):
        with pytest.raises(_core.CoreError):
            _core.nat_card(bytes([2, 0, 0, 0, 0, 1]), **wrong)  # type: ignore[arg-type]
    with pytest.raises(_core.CoreError, match="descriptor"):
        _core.nat_card(bytes([2, 0, 0, 0, 0, 1]), services=[("169.254.169.254:80", 9999)])


def test_connections_to_a_service_come_one_by_one() -> None:
    listener = GuestListener("169.254.169.254:80")
    address, fd = listener.handed_over()
    _core.nat_card(bytes([2, 0, 0, 0, 0, 1]), services=[(address, fd)])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # What the machine's network does with a connection of the guest's.
        with socket.socket(fileno=os.dup(fd)) as machine:
            socket.send_fds(machine, [b"\1"], [theirs.fileno()])
        listener.setblocking(False)
        connection, address = listener.accept()
        with connection:
            connection.sendall(b"here")
            assert ours.recv(4) == b"here"
        assert address == "169.254.169.254:80"
        with pytest.raises(BlockingIOError):
            listener.accept()
    listener.close()


def test_a_card_is_on_a_switch_once_and_leaves_it() -> None:
    first = Networks.parse("web", "switch=lan", ())
    devices = first.devices()
    with pytest.raises(_core.CoreError, match="another machine on this switch"):
        Networks.parse("web", "switch=lan", ()).devices()
    Networks.parse("web", "switch=other", ()).devices()
    Networks.parse("db", "switch=lan", ()).devices()
    del devices
    first.cards.clear()
    Networks.parse("web", "switch=lan", ()).devices()
