"""The metadata service, asked over its socket as a guest would."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero.machine.metadata import CONNECTIONS_MAX, TOKENS_MAX, InstanceMetadata, MetadataServer

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
    with MetadataServer(tmp_path / "imds", ME):
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
    with MetadataServer(tmp_path / "imds", ME, tokens_required=True) as server:
        assert ask(tmp_path / "imds", "/latest/meta-data/hostname")[0] == 401
        token = ask(tmp_path / "imds", "/latest/api/token", "PUT", **{TTL: "60"})[1].decode()
        assert ask(tmp_path / "imds", "/latest/meta-data/hostname", **{TOKEN: token})[0] == 200
        for _ in range(TOKENS_MAX):
            server.tokens.give(60)
        assert ask(tmp_path / "imds", "/latest/meta-data/hostname", **{TOKEN: token})[0] == 401


def test_no_user_data_is_not_empty_user_data(tmp_path: Path) -> None:
    """As EC2 has it: 404."""
    with MetadataServer(tmp_path / "imds", InstanceMetadata("i-2")):
        assert ask(tmp_path / "imds", "/latest/user-data")[0] == 404
        assert ask(tmp_path / "imds", "/latest/meta-data/public-keys/")[0] == 404


def test_a_hostile_guest_is_cut_off_and_others_are_served(service: Path) -> None:
    """Long lines, what is no HTTP, and more connections than there may be."""
    for words in (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET\r\n\r\n"):
        assert b" 200 " not in answer_to(service, words)
    held = [connected(service) for _ in range(CONNECTIONS_MAX)]
    with connected(service) as line:
        assert line.recv(1) == b""  # one too many
    for line in held:
        line.close()
    assert any(ask_or_none(service) for _ in range(100))


def answer_to(path: Path, words: bytes) -> bytes:
    """Send bytes and return what comes back; a connection that is closed over them gives nothing."""
    said = b""
    with connected(path) as line, contextlib.suppress(ConnectionError):
        line.sendall(words)
        while data := line.recv(4096):
            said += data
    return said


def ask_or_none(path: Path) -> bool:
    """Ask, where the service may still be closing what was held."""
    try:
        return ask(path, "/latest/meta-data/instance-id") == (200, b"i-1")
    except (OSError, http.client.HTTPException):
        time.sleep(0.1)
        return False
