"""The networks of a machine, as the operator names them: a card each.

    none                        no card
    nat                         a network of the guest's own, with a way out through this host
    allow=CIDR[:PORT],...       the same, but nothing else is reached; `dns` among them lets names be asked for,
                                `metadata` has the guest told about itself
    switch=NAME                 joined with the other machines that name the same switch: those of this process, or
                                of this user where the machine is given `switches` (on the command line it is)
    tap=NAME                    a card of this host's kernel, where the user has the right to it

Words behind a comma change it: `nat,host-loopback` (10.0.2.2 stands for this host's 127.0.0.1), `nat,no-metadata`,
`nat,mtu=9000`, `nat,mac=02:00:00:00:00:01`, `switch=lan,ip=192.168.7.1/24` (our own images take that
address; on a tap, too), `switch=lan,tenant=NAME` (tenants have switches of their own).
docs/networks.md tells what is inside.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
import typing
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ringzero.errors import InputError

if typing.TYPE_CHECKING:
    from ringzero import _core

__all__ = ["GuestListener", "Network", "Networks", "Publish", "Switches", "mac_of"]

_LEAST_MTU, _MOST_MTU = 1280, 65520
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_RESOLV_CONF = Path("/etc/resolv.conf")
_MOST_RESOLVERS = 3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TAP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_MOST_CARDS = 8
_SWITCHES: weakref.WeakValueDictionary[tuple[str, str], _core.Switch] = weakref.WeakValueDictionary()
"""By tenant and name: there as long as a machine has a card on one."""


def mac_of(name: str, number: int = 0) -> bytes:
    """Return the address of a machine's card: always the same for a name, and one of those that anybody may choose.

    `number` counts the cards of a machine from 0.
    """
    digest = hashlib.blake2b(f"{name}\0{number}".encode(), digest_size=5, person=b"ringzero card").digest()
    # Locally administered, and of one card: IEEE 802-2014, 8.2.
    return b"\x52" + digest


def _port(text: str, what: str, least: int = 1) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= 65535:
        raise InputError(f"{what}: {text!r} is no port; give a number from {least} to 65535")
    return int(text)


@dataclass(frozen=True)
class Publish:
    """A port of this host that leads to one of the guest: `8080:80`, `0.0.0.0:8080:80`, `[::1]:53:53/udp`.

    Without an address it is reached from this host only. Port 0 is any that is free (`Machine.published` tells).
    """

    address: str
    port: int
    guest_port: int
    udp: bool = False

    @classmethod
    def parse(cls, text: str | Publish) -> Publish:
        """Return the port that the text names. Raises InputError."""
        if isinstance(text, Publish):
            return text
        what = f"--publish {text}"
        rest, slash, protocol = text.partition("/")
        if slash and protocol not in ("tcp", "udp"):
            raise InputError(f"{what}: {protocol!r} is neither tcp nor udp")
        rest, colon, guest_port = rest.rpartition(":")
        address, _, port = rest.rpartition(":")
        if not colon:
            raise InputError(f"{what}: write [ADDRESS:]PORT:GUEST_PORT[/udp], such as 8080:80")
        try:
            listens = ipaddress.ip_address(address.removeprefix("[").removesuffix("]") or "127.0.0.1")
        except ValueError:
            raise InputError(f"{what}: {address!r} is not the address of a network of this host") from None
        return cls(str(listens), _port(port, what, 0), _port(guest_port, what), protocol == "udp")

    @property
    def place(self) -> str:
        """Where it listens, address and port in one."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def __str__(self) -> str:
        """Return what `parse` takes."""
        return f"{self.place}:{self.guest_port}{'/udp' if self.udp else ''}"


Rule = tuple[str, int, int | None]
"""A network, the length of its prefix, and a port or all of them."""


def _rule(text: str) -> Rule:
    """Read `CIDR[:PORT]`: 192.0.2.0/24, 192.0.2.7:443, [2001:db8::]/32, [2001:db8::7]:443."""
    what = f"--net allow={text}"
    cidr, port = text, None
    if match := re.fullmatch(r"(.*[\]\d.](?:/\d+)?):(\d+)", text):
        bare = match[1]
        # An IPv6 address without brackets has colons of its own, and no port.
        if "[" in bare or ":" not in bare:
            cidr, port = bare, _port(match[2], what)
    try:
        network = ipaddress.ip_network(cidr.replace("[", "").replace("]", ""), strict=False)
    except ValueError:
        raise InputError(
            f"{what}: write a network such as 192.0.2.0/24, with :PORT behind it if you like"
        ) from None
    return (str(network.network_address), network.prefixlen, port)


@dataclass(frozen=True)
class Network:
    """A card of a machine, and what its cable leads to. Make one with `parse`."""

    kind: str
    """nat, switch, tap, or none."""
    switch: str = ""
    """The switch's name, or the tap's."""
    tenant: str = ""
    """Whose switch it is."""
    address: str = ""
    """Of the guest on its switch or tap, with the length of the network's prefix."""
    rules: tuple[Rule, ...] | None = None
    """What may be reached; everything without a list."""
    names: bool = True
    """Whether names may be asked for."""
    metadata: bool = True
    """Whether the guest is told about itself at 169.254.169.254."""
    host_loopback: bool = False
    mtu: int = 1500
    mac: bytes | None = None

    @classmethod
    def parse(cls, text: str | Network) -> Network:
        """Return the network that the text names (see the head of this file). Raises InputError."""
        if isinstance(text, Network):
            return text
        words = text.split(",")
        kind, _, value = words[0].partition("=")
        rules: list[Rule] | None = None
        network = cls("nat")
        if kind == "none" and len(words) == 1:
            return cls("none")
        if kind == "allow" and value:
            network, rules = replace(network, names=False, metadata=False), []
            words[0] = value
        elif words[0] == "nat":
            del words[0]
        elif kind == "switch" and _NAME.fullmatch(value):
            network = cls("switch", switch=value)
            del words[0]
        elif kind == "tap" and _TAP.fullmatch(value):
            network = cls("tap", switch=value)
            del words[0]
        else:
            raise InputError(
                f"--net {text}: there is none, nat, allow=CIDR[:PORT],..., switch=NAME, tap=NAME"
            )
        for word in words:
            name, equals, value = word.partition("=")
            if word == "host-loopback" and network.kind == "nat":
                network = replace(network, host_loopback=True)
            elif name == "ip" and network.kind in ("switch", "tap"):
                network = replace(network, address=_address(value))
            elif name == "tenant" and network.kind == "switch" and _NAME.fullmatch(value):
                network = replace(network, tenant=value)
            elif name == "mtu" and equals:
                network = replace(network, mtu=_mtu(value))
            elif name == "mac" and equals:
                network = replace(network, mac=_mac(value))
            elif rules is not None and word == "dns":
                network = replace(network, names=True)
            elif word == ("no-metadata" if rules is None else "metadata") and network.kind == "nat":
                network = replace(network, metadata=rules is not None)
            elif rules is not None and word:
                rules.append(_rule(word))
            else:
                raise InputError(
                    f"--net {text}: nothing is known of {word!r}: there is host-loopback, no-metadata, mtu=, mac="
                )
        return replace(network, rules=None if rules is None else tuple(rules))


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_interface(text))
    except ValueError:
        raise InputError(f"ip={text}: write an address such as 192.168.7.1/24") from None


def _mtu(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not _LEAST_MTU <= int(text) <= _MOST_MTU:
        raise InputError(f"mtu={text}: give {_LEAST_MTU} to {_MOST_MTU} bytes")
    return int(text)


def _mac(text: str) -> bytes:
    if not _MAC.fullmatch(text) or int(text[:2], 16) & 1:
        raise InputError(
            f"mac={text}: a card's address is six numbers such as 02:00:00:00:00:01, the first even"
        )
    return bytes.fromhex(text.replace(":", ""))


def _resolvers() -> list[str]:
    """Return the host's name servers, as addresses with ports."""
    try:
        lines = _RESOLV_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                address = ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            found.append(f"[{address}]:53" if address.version == 6 else f"{address}:53")
    return found[:_MOST_RESOLVERS]


def _has_ipv6() -> bool:
    """Whether this host has a way into the Internet over IPv6. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1", 9))
            own = ipaddress.IPv6Address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return False
    return own.is_global or (own.is_private and not own.is_loopback and not own.is_link_local)


class GuestListener:
    """Takes the connections of a machine's guest to one address, as a listening socket does."""

    def __init__(self, address: str) -> None:
        """`address` is what the guest connects to, with a port: "169.254.169.254:80"."""
        self.address = address
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def fileno(self) -> int:
        """Return a descriptor that can be read when there is a connection."""
        return self._ours.fileno()

    def setblocking(self, flag: bool, /) -> None:
        """Say whether `accept` waits, or raises BlockingIOError."""
        self._ours.setblocking(flag)

    def accept(self) -> tuple[socket.socket, str]:
        """Wait for the guest's next connection and return it, with its address. Raises OSError at the end."""
        data, fds, _, _ = socket.recv_fds(self._ours, 1, 1)
        if not data or not fds:
            raise OSError("the machine has ended")
        return (socket.socket(fileno=fds[0]), self.address)

    def handed_over(self) -> tuple[str, int]:
        """Return the address, and the descriptor of the machine's end of it."""
        return (self.address, self._theirs.fileno())

    def close(self) -> None:
        """Take no more."""
        self._ours.close()
        self._theirs.close()


class Switches(typing.Protocol):
    """Joins cards to switches that other processes have, too."""

    def join(self, network: Network, mac: bytes) -> socket.socket:
        """Return the card's end of a cable into the network's switch. Raises InputError when it cannot be."""

    def keep(self, network: Network, mac: bytes, card: _core.NetworkCard) -> None:
        """Take note of the card, which is to be plugged in again when the switch has been away."""


@dataclass
class Networks:
    """All cards of a machine, and the ports that lead to it."""

    name: str
    """The machine's: its cards are named by it, and it is told to call itself so."""
    networks: tuple[Network, ...] = ()
    publish: tuple[Publish, ...] = ()
    services: list[GuestListener] = field(default_factory=list)
    cards: list[_core.NetworkCard] = field(default_factory=list)
    """There from when the machine is started."""
    switches: Switches | None = None
    """Who joins cards to switches; without, they join the machines of this process."""
    salt: str = ""
    """Tells cards of machines apart that have the same name."""
    _switches: list[_core.Switch] = field(default_factory=list)

    @classmethod
    def parse(
        cls,
        name: str,
        net: str | Network | Sequence[str | Network] | None,
        publish: str | Publish | Sequence[str | Publish],
    ) -> Networks:
        """Read what the operator wrote. A port that leads to the guest needs a network: without a word, it is nat."""
        ports = tuple(
            Publish.parse(port) for port in ([publish] if isinstance(publish, str | Publish) else publish)
        )
        asked = [net] if isinstance(net, str | Network) else list(net or (["nat"] if ports else []))
        networks = tuple(network for network in map(Network.parse, asked) if network.kind != "none")
        if sum(network.kind == "nat" for network in networks) > 1:
            raise InputError("--net: one network of a machine leads out, not several")
        if ports and not any(network.kind == "nat" for network in networks):
            raise InputError(
                f"--publish {ports[0]}: this machine has no network that a port could lead to: add --net nat"
            )
        if len(networks) > _MOST_CARDS:
            raise InputError(f"--net: a machine has {_MOST_CARDS} cards at most, not {len(networks)}")
        given = [network.mac for network in networks if network.mac is not None]
        if twice := [mac for mac in given if given.count(mac) > 1]:
            raise InputError(f"two cards have the address {twice[0].hex(':')}: give each its own")
        return cls(name, networks, ports)

    def __bool__(self) -> bool:
        """Whether there is a card."""
        return bool(self.networks)

    def devices(self) -> list[_core.VirtioDevice]:
        """Open what the cards need, and return them. Raises the core's CoreError: a port is taken, say."""
        for number, network in enumerate(self.networks):
            self.cards.append(self._card(network, self.mac(number)))
        return list(self.cards)

    def mac(self, number: int) -> bytes:
        """Return the address of a card."""
        return self.networks[number].mac or mac_of(self.name + self.salt, number)

    @property
    def leads_out(self) -> bool:
        """Whether a card needs sockets of this host's network."""
        return any(network.kind == "nat" for network in self.networks)

    def _card(self, network: Network, mac: bytes) -> _core.NetworkCard:
        from ringzero import _core

        if network.kind == "tap":
            return _core.tap_card(mac, network.switch, mtu=network.mtu)
        if network.kind == "switch" and self.switches is not None:
            with self.switches.join(network, mac) as cable:
                card = _core.cable_card(mac, cable.fileno(), mtu=network.mtu)
            self.switches.keep(network, mac, card)
            return card
        if network.kind == "switch":
            key = (network.tenant, network.switch)
            switch = _SWITCHES.get(key)
            if switch is None:
                switch = _SWITCHES[key] = _core.Switch()
            self._switches.append(switch)
            return switch.card(mac, mtu=network.mtu)
        return _core.nat_card(
            mac,
            mtu=network.mtu,
            name=self.name,
            resolvers=_resolvers(),
            rules=network.rules,
            names=network.names,
            host_loopback=network.host_loopback,
            ipv6=_has_ipv6(),
            forwards=[(port.udp, port.place, port.guest_port) for port in self.publish],
            services=[service.handed_over() for service in self.services],
        )

    def told(self) -> tuple[str, str] | None:
        """Return the address and the card of a guest that is to be told about itself; None for one that is not."""
        for number, network in enumerate(self.networks):
            if network.kind == "nat" and network.metadata:
                return ("10.0.2.15", self.mac(number).hex(":"))
        return None

    def words(self) -> list[str]:
        """Return what the kernel's command line tells our own images of the cards."""
        cards = enumerate(self.networks)
        return ["ringzero.net"] * bool(self.networks) + [
            f"ringzero.ip={self.mac(number).hex(':')}={network.address or 'none'}"
            for number, network in cards
            if network.kind == "switch" or (network.kind == "tap" and network.address)
        ]

    def published(self) -> list[Publish]:
        """Return the ports that lead to the guest, with the numbers that they got."""
        ports = [port for card in self.cards for port in card.ports()]
        return [replace(published, port=port) for published, port in zip(self.publish, ports, strict=False)]
