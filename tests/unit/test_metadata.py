"""The metadata service, asked over its socket as a guest would."""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero.machine.metadata import InstanceMetadata, instance_of
from ringzero.machine.metadata_server import CONNECTIONS_MAX, HEAD_MAX, TOKENS_MAX, MetadataServer

TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "X-aws-ec2-metadata-token"
ME = InstanceMetadata(
    "i-1",
    "box.lan",
    "10.0.2.15",
    "52:54:00:00:00:01",
    ("ssh-ed25519 AAAA a", "ssh-ed25519 BBBB b"),
    b"#!/bin/sh\n",
)


def listening(path: Path) -> socket.socket:
    """Return a socket that takes connections, as a machine's network gives them."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def connected(path: Path) -> socket.socket:
    """Return a connection to the service."""
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(20)
    line.connect(str(path))
    return line


def ask(path: Path, target: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Make one request and return its status and body."""
    connection = http.client.HTTPConnection("169.254.169.254")
    connection.sock = connected(path)
    connection.request(
        method, target, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, body


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Path]:
    """A service that answers both versions."""
    with MetadataServer(listening(tmp_path / "imds"), ME):
        yield tmp_path / "imds"


def test_the_first_version_answers_without_a_token(service: Path) -> None:
    """Items, lists of items with a slash behind directories, and what is not there."""
    assert ask(service, "/latest/meta-data/instance-id") == (200, b"i-1")
    assert ask(service, "/2009-04-04/meta-data/local-ipv4") == (200, b"10.0.2.15")
    listed = ask(service, "/latest/meta-data/")[1].decode().split("\n")
    assert {"hostname", "placement/", "public-keys/", "network/"} <= set(listed)
    assert ask(service, "/latest/meta-data/public-keys/") == (200, b"0=key-0\n1=key-1")
    assert ask(service, "/latest/meta-data/public-keys/1/openssh-key") == (200, b"ssh-ed25519 BBBB b")
    assert ask(service, "/latest/user-data") == (200, b"#!/bin/sh\n")
    assert "latest" in ask(service, "/")[1].decode().split("\n")
    assert ask(service, "/latest/meta-data/nothing")[0] == 404
    assert ask(service, "/latest/meta-data/hostname/below")[0] == 404
    assert ask(service, "/1999-01-01/meta-data/hostname")[0] == 404
    document = json.loads(ask(service, "/latest/dynamic/instance-identity/document")[1])
    assert document["instanceId"] == "i-1"


def test_a_token_is_given_and_known(service: Path) -> None:
    """The second version: PUT, then GET with the token; a wrong one is refused even where none is needed."""
    status, token = ask(service, "/latest/api/token", "PUT", **{TTL: "60"})
    assert status == 200
    assert ask(service, "/latest/meta-data/hostname", **{TOKEN: token.decode()}) == (200, b"box.lan")
    assert ask(service, "/latest/meta-data/hostname", **{TOKEN: "made-up"})[0] == 401


@pytest.mark.parametrize("ttl", ["0", "21601", "-1", "x", "", "9" * 400, "٣"])
def test_a_token_needs_a_time(service: Path, ttl: str) -> None:
    """From one second to six hours."""
    assert ask(service, "/latest/api/token", "PUT", **{TTL: ttl.encode().decode("latin-1")})[0] == 400
    assert ask(service, "/latest/api/token", "PUT")[0] == 400


def test_no_token_for_who_forwards(service: Path) -> None:
    """A proxy in the guest that is asked from outside gets none."""
    assert ask(service, "/latest/api/token", "PUT", **{TTL: "60", "X-Forwarded-For": "192.0.2.1"})[0] == 403
    assert ask(service, "/latest/meta-data/", "PUT", **{TTL: "60"})[0] == 404


def test_tokens_can_be_required(tmp_path: Path) -> None:
    """Then the first version is refused."""
    with MetadataServer(listening(tmp_path / "imds"), ME, tokens_required=True) as server:
        assert ask(tmp_path / "imds", "/latest/meta-data/hostname")[0] == 401
        token = ask(tmp_path / "imds", "/latest/api/token", "PUT", **{TTL: "60"})[1].decode()
        assert ask(tmp_path / "imds", "/latest/meta-data/hostname", **{TOKEN: token})[0] == 200
        for _ in range(TOKENS_MAX):
            server.tokens.give(60)
        assert ask(tmp_path / "imds", "/latest/meta-data/hostname", **{TOKEN: token})[0] == 401


def test_no_user_data_is_not_empty_user_data(tmp_path: Path) -> None:
    """As EC2 has it: 404."""
    with MetadataServer(listening(tmp_path / "imds"), InstanceMetadata("i-2")):
        assert ask(tmp_path / "imds", "/latest/user-data")[0] == 404
        assert ask(tmp_path / "imds", "/latest/meta-data/public-keys/")[0] == 404


def test_a_hostile_guest_is_cut_off_and_others_are_served(service: Path) -> None:
    """Long lines, what is no HTTP, and more connections than there may be: the oldest goes."""
    for words, status in {
        b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n": b" 431 ",
        b"x" * (HEAD_MAX + 1): b" 431 ",
        b"\x00\xff\r\n\r\n": b" 400 ",
        b"GET\r\n\r\n": b" 400 ",
        b"GET / HTTP/2\r\n\r\n": b" 400 ",
        b"GET http://elsewhere/ HTTP/1.1\r\n\r\n": b" 400 ",
        b"POST / HTTP/1.1\r\n\r\n": b" 405 ",
    }.items():
        assert status in answer_to(service, words).partition(b"\r\n")[0]
    held = [connected(service) for _ in range(CONNECTIONS_MAX)]
    assert ask(service, "/latest/meta-data/instance-id") == (200, b"i-1")
    assert held[0].recv(1) == b""
    held[1].sendall(b"GET /latest/meta-data/instance-id HTTP/1.1\r\n\r\n")
    assert b"i-1" in held[1].recv(4096)
    for line in held:
        line.close()


def test_requests_come_in_pieces_in_a_row_and_with_what_nobody_reads(service: Path) -> None:
    """Each is answered once, in order; a body is no request."""
    item = b"GET /latest/meta-data/%s HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(service) as line:
        for byte in item % b"instance-id":
            line.sendall(bytes([byte]))
        line.sendall(item % b"hostname" + item % b"nothing")
        line.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: line.recv(4096), b""))
    parts = said.split(b"HTTP/1.1 ")[1:]
    assert [part[:3] for part in parts] == [b"200", b"200", b"404"]
    assert parts[0].endswith(b"i-1") and parts[1].endswith(b"box.lan")
    body = item % b"hostname"
    head = f"GET / HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert answer_to(service, head + body).count(b"HTTP/1.1 ") == 1
    assert answer_to(service, b"\r\nGET / HTTP/1.0\n\n").startswith(b"HTTP/1.1 200 OK\r\n")
    answer = answer_to(service, b"HEAD /latest/user-data HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert b"content-length: 10\r\n" in answer.lower() and answer.endswith(b"\r\n\r\n")


def test_who_does_not_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    """A large answer waits in the service, once a connection, and comes whole at last."""
    data = bytes(range(256)) * 4096
    with MetadataServer(listening(tmp_path / "imds"), InstanceMetadata("i-3", user_data=data)):
        with connected(tmp_path / "imds") as line:
            line.sendall(b"GET /latest/user-data HTTP/1.1\r\n\r\n" * 10)
            assert ask(tmp_path / "imds", "/latest/meta-data/instance-id") == (200, b"i-3")
            line.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: line.recv(1 << 20), b""))
        assert said.count(data) == 10


def test_it_can_be_a_part_of_another_loop(tmp_path: Path) -> None:
    """Then it does what there is to do and waits for nothing."""
    server = MetadataServer(listening(tmp_path / "imds"), ME)
    assert server.work()
    with connected(tmp_path / "imds") as line:
        line.sendall(b"GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n")
        for _ in range(4):
            assert server.work()
        assert line.recv(4096).endswith(b"i-1")
    server.close()
    with pytest.raises(ConnectionRefusedError):
        connected(tmp_path / "imds")


def test_an_instance_is_its_name() -> None:
    """As long as no seed says otherwise."""
    assert instance_of("web") == instance_of("web") != instance_of("db")
    assert len(instance_of("web")) == 19


def answer_to(path: Path, words: bytes) -> bytes:
    """Send bytes and return what comes back; a connection that is closed over them gives nothing."""
    said = b""
    with connected(path) as line, contextlib.suppress(ConnectionError):
        line.sendall(words)
        while data := line.recv(4096):
            said += data
    return said
