"""Taps: cards of this host's kernel, where the user has the right to make one."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from ringzero import InputError, Machine

pytestmark = pytest.mark.needs_debian

TAP = "rz-test0"


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def tap() -> Iterator[str]:
    try:
        made = ip("tuntap", "add", "dev", TAP, "mode", "tap")
    except FileNotFoundError:
        pytest.skip("there is no 'ip' to make a tap with")
    if made.returncode != 0:
        pytest.skip(f"this user may not make a tap: {made.stderr.strip()}")
    try:
        ip("addr", "add", "192.168.201.1/24", "dev", TAP)
        ip("link", "set", TAP, "up")
        yield TAP
    finally:
        ip("tuntap", "del", "dev", TAP, "mode", "tap")


def test_a_guest_and_the_hosts_kernel_talk_over_a_tap(tap: str) -> None:
    with Machine("debian", net=f"tap={tap},ip=192.168.201.2/24") as vm:
        vm.run(["ping", "-c", "1", "192.168.201.1"], check=True, capture_output=True)
        # Large segments, both ways, through the kernel's own TCP.
        sent = bytes(range(250)) * 40_000
        with socket.create_server(("192.168.201.1", 0)) as listener:

            def serve() -> None:
                with listener.accept()[0] as peer:
                    peer.sendall(sent)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            fetch = f"nc 192.168.201.1 {listener.getsockname()[1]} </dev/null >/tmp/got; sha256sum </tmp/got"
            got = vm.run(["sh", "-c", fetch], capture_output=True, text=True, check=True).stdout
            thread.join(10.0)
        assert got.split()[0] == hashlib.sha256(sent).hexdigest()
        vm.run(["httpd", "-p", "80", "-h", "/tmp"], check=True)
        with urllib.request.urlopen("http://192.168.201.2/got", timeout=30) as reply:
            assert reply.read() == sent
        with pytest.raises(InputError, match="somebody uses the tap"), Machine("debian", net=f"tap={tap}"):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without rights")
def test_who_has_no_right_to_a_tap_is_told_what_to_ask_for() -> None:
    script = (
        "import os; from ringzero import _core; os.setgid(65534); os.setuid(65534)\n"
        "try: _core.tap_card(bytes([2, 0, 0, 0, 0, 1]), 'rz-test1')\n"
        "except _core.CoreError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "ip tuntap add dev rz-test1 mode tap user" in told
