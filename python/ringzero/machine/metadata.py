"""Instance metadata as EC2 has it, for guests that ask 169.254.169.254: HTTP over a Unix socket, which a NAT connects.

Both versions of the service (Amazon EC2 User Guide, "Use the Instance Metadata Service to access instance metadata"):
IMDSv1 answers anybody in the guest, IMDSv2 who got a token with a PUT first. Its client is the guest, which may be
hostile: requests are small, few at a time, and none of them waits for ever.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socketserver
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

__all__ = ["InstanceMetadata", "MetadataServer"]

VERSIONS = ("1.0", "2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest")
TOKEN_PATH = "/latest/api/token"
TOKEN_HEADER = "X-aws-ec2-metadata-token"
TTL_HEADER = f"{TOKEN_HEADER}-ttl-seconds"
TTL_MAX = 21600
TOKENS_MAX = 256
"""How many tokens are known at once: the oldest goes first."""
CONNECTIONS_MAX = 16
PATIENCE = 10.0
"""Seconds for the guest to finish a request."""


@dataclass(frozen=True)
class InstanceMetadata:
    """What an instance may know of itself."""

    instance_id: str
    hostname: str = "localhost"
    local_ipv4: str = ""
    mac: str = ""
    ssh_keys: tuple[str, ...] = ()
    user_data: bytes | None = None
    instance_type: str = "ringzero"
    more: Mapping[str, str] = field(default_factory=dict)
    """Other items by their paths below meta-data: "placement/region"."""

    def tree(self) -> dict[str, Any]:
        """Return what is below meta-data/, directories as dictionaries."""
        items = {
            "ami-id": "ami-ringzero",
            "ami-launch-index": "0",
            "hostname": self.hostname,
            "instance-id": self.instance_id,
            "instance-type": self.instance_type,
            "local-hostname": self.hostname,
            "local-ipv4": self.local_ipv4,
            "mac": self.mac,
            "placement/availability-zone": "local",
            "reservation-id": f"r-{self.instance_id}",
            **self.more,
        }
        if self.mac:
            card = f"network/interfaces/macs/{self.mac}"
            items |= {
                f"{card}/mac": self.mac,
                f"{card}/device-number": "0",
                f"{card}/local-ipv4s": self.local_ipv4,
            }
        tree: dict[str, Any] = {}
        for path, value in items.items():
            *folders, name = path.split("/")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            if value:
                place[name] = value
        if self.ssh_keys:
            # A list whose entries look like "0=name", and a directory for each number.
            tree["public-keys"] = {
                str(number): {"openssh-key": key} for number, key in enumerate(self.ssh_keys)
            }
        return tree

    def answer(self, path: str) -> bytes | None:
        """Return what is at a path like /latest/meta-data/instance-id; None when there is nothing."""
        words = [word for word in path.split("/") if word]
        if not words:
            return "\n".join(VERSIONS).encode()
        version, *words = words
        if version not in VERSIONS:
            return None
        document = {
            "instanceId": self.instance_id,
            "instanceType": self.instance_type,
            "privateIp": self.local_ipv4,
        }
        top: dict[str, Any] = {
            "dynamic": {"instance-identity": {"document": json.dumps(document, indent=2)}},
            "meta-data": self.tree(),
        }
        if self.user_data is not None:
            top["user-data"] = self.user_data
        place: Any = top
        for word in words:
            if not isinstance(place, dict) or word not in place:
                return None
            place = place[word]
        if not isinstance(place, dict):
            return place if isinstance(place, bytes) else str(place).encode()
        if words == ["meta-data", "public-keys"]:
            return "\n".join(f"{number}=key-{number}" for number in place).encode()
        names = (name + "/" if isinstance(entry, dict) else name for name, entry in sorted(place.items()))
        return "\n".join(names).encode()


class _Tokens:
    """The tokens that were given out, with the times at which they end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[str, float] = {}

    def give(self, seconds: int) -> str:
        token = secrets.token_urlsafe(40)
        with self._lock:
            while len(self._ends) >= TOKENS_MAX:
                del self._ends[next(iter(self._ends))]
            self._ends[token] = time.monotonic() + seconds
        return token

    def knows(self, token: str) -> bool:
        with self._lock:
            return self._ends.get(token, 0.0) > time.monotonic()


class MetadataServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The service of one machine, at a Unix socket. Serves from `with` on, until its end."""

    daemon_threads = True
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, path: Path, metadata: InstanceMetadata, *, tokens_required: bool = False) -> None:
        """Bind the socket, which must not be there. With `tokens_required` only IMDSv2 is answered."""
        self.metadata = metadata
        self.tokens_required = tokens_required
        self.tokens = _Tokens()
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._path = path
        super().__init__(str(path), _Handler)
        path.chmod(0o600)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection on a thread of its own; more of them than there may be are closed."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class, and let the next connection in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a guest that closes its connection early is no news."""

    def __enter__(self) -> MetadataServer:
        threading.Thread(target=self.serve_forever, name="ringzero-metadata", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        with contextlib.suppress(OSError):
            self._path.unlink()


class _Handler(BaseHTTPRequestHandler):
    """One connection. The base class limits lines (64 KiB) and headers (100)."""

    protocol_version = "HTTP/1.1"
    server_version = "EC2ws"
    sys_version = ""
    timeout = PATIENCE
    server: MetadataServer

    def setup(self) -> None:
        # A Unix socket's peer has no name, and the base class wants one for its log.
        self.client_address = ("guest", 0)
        super().setup()

    def do_PUT(self) -> None:
        """Give a token out."""
        self.close_connection = True  # a body that nobody reads must not be the next request
        if self.path != TOKEN_PATH:
            self._reply(404, b"")
        elif "X-Forwarded-For" in self.headers:
            # Who forwards requests from elsewhere shall not fetch tokens for them.
            self._reply(403, b"")
        else:
            text = self.headers.get(TTL_HEADER, "")
            seconds = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
            if 1 <= seconds <= TTL_MAX:
                self._reply(200, self.server.tokens.give(seconds).encode(), {TTL_HEADER: str(seconds)})
            else:
                self._reply(400, b"")

    def do_GET(self) -> None:
        """Answer with an item, or a list of items."""
        token = self.headers.get(TOKEN_HEADER)
        if (token is None and self.server.tokens_required) or (
            token is not None and not self.server.tokens.knows(token)
        ):
            self._reply(401, b"")
            return
        found = self.server.metadata.answer(self.path.partition("?")[0])
        self._reply(404 if found is None else 200, found or b"")

    do_HEAD = do_GET

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if status == 200 else "text/html")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep no log."""
