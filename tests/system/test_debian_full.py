"""debian-full: built from packages once, and kept in the cache; skipped where no mirror can be reached."""

import functools
import http.server
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import Machine, _core, images
from ringzero.errors import FetchError, GuestError
from ringzero.machine.installer import run_guest
from ringzero.machine.seed import Seed

from .conftest import ENGINE


@pytest.fixture(scope="module")
def image() -> images.Image:
    """The image, from the cache where it is there: else two minutes or more go by here."""
    try:
        return images.find("debian-full") or images.pull("debian-full", run_guest=run_guest)
    except FetchError as error:
        if "could not be fetched" not in str(error) and "apt sources" not in str(error):
            raise
        pytest.skip(f"no packages, no image: {error}")


@pytest.fixture(scope="module")
def full(image: images.Image) -> Iterator[Machine]:
    """One booted machine for all tests of the module, logged in as root on its console."""
    with Machine(image, memory="512M", engine=ENGINE) as machine:
        machine.console.expect("login: ", timeout=300)
        machine.console.write(b"root\n")
        machine.console.expect("~# ", timeout=60)
        yield machine


def said(machine: Machine, command: str) -> str:
    """Type a command on the console, and return what it says."""
    machine.console.write(f"{command} 2>&1; echo status=$?-\n".encode())
    match = machine.console.expect(r"status=\d+-", timeout=120)
    return match.string[: match.end()]


def test_systemd_boots_from_the_disk_without_a_failed_unit(full: Machine) -> None:
    """Every service of the system comes up, and its root is the disk."""
    assert "running" in said(full, "systemctl is-system-running --wait")
    assert "0 loaded units listed" in said(full, "systemctl --failed --no-pager")
    assert "/dev/vda" in said(full, "findmnt --noheadings --output SOURCE /")


def test_packages_are_as_dpkg_wants_them(full: Machine) -> None:
    """Installed in a guest, with the right owners and nothing half done."""
    assert "status=0" not in said(full, "dpkg --audit | grep .")
    assert "root:shadow" in said(full, "stat -c %U:%G /etc/shadow")


def test_the_image_stays_as_it_is(image: images.Image, full: Machine) -> None:
    """What a run writes is gone with it."""
    assert image.disk is not None
    said(full, "touch /written-by-a-run && sync")
    listed = subprocess.run(
        [*("/usr/sbin/debugfs", "-R", "stat /written-by-a-run"), str(image.disk)],
        capture_output=True,
        text=True,
    )
    assert "File not found" in listed.stderr
    assert images.find("debian-full") is not None


def test_persist_is_for_an_image_with_a_root_disk() -> None:
    """An initramfs has nothing to keep: that is told."""
    command = [sys.executable, "-m", "ringzero", "run", "hello", "--persist", "x.raw"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 2
    assert "has no root disk to keep" in result.stderr


def test_a_seed_makes_a_user_and_runs_a_script(image: images.Image) -> None:
    """The user gets in on the console, may sudo, and root is locked."""
    seed = Seed(user="ana", hostname="box", user_data=b"#!/bin/sh\necho ran-as-$(id -un) > /root/ran\n")
    with Machine(image, memory="512M", engine=ENGINE, seed=seed) as machine:
        machine.console.expect("box login: ", timeout=300)
        machine.console.write(b"ana\n")
        machine.console.expect(r"ana@box:~\$ ", timeout=60)
        assert "running" in said(machine, "systemctl is-system-running --wait")
        assert "ran-as-root" in said(machine, "sudo cat /root/ran")
        assert "root L " in said(machine, "sudo passwd --status root")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A web server of the host's, on a port of its 127.0.0.1."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "file").write_bytes(SERVED)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


SERVED = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def networked(
    image: images.Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, Path]]:
    """A machine with a network, a user with a key, and a disk that is kept, ready for commands."""
    folder = tmp_path_factory.mktemp("networked")
    key = EXAMPLE_KEY
    if shutil.which("ssh-keygen") is not None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        key = (folder / "key.pub").read_text().strip()
    seed = Seed(user="ana", ssh_keys=(key,), hostname="box")
    with Machine(
        image,
        memory="512M",
        engine=ENGINE,
        net="nat,host-loopback",
        publish="0:22",
        persist=folder / "kept.qcow2",
        seed=seed,
    ) as machine:
        machine.run(["systemctl", "is-system-running", "--wait"], timeout=300)
        assert machine.path("/home/ana/.ssh/authorized_keys").read_text() == f"{key}\n"
        yield machine, folder


EXAMPLE_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBeOSmM8sAvU8R7pCz8mCs5nYhHqnv1TnWq5PEY4Gx5T me@here"


def test_a_seed_lets_a_key_in_and_no_empty_password(networked: tuple[Machine, Path]) -> None:
    """The key has the modes that sshd wants, the password is locked, and a client gets in."""
    machine, folder = networked
    script = "stat -c '%a %U:%G' /home/ana/.ssh /home/ana/.ssh/authorized_keys; passwd --status ana"
    told = machine.run(["sh", "-c", script], text=True, check=True).stdout.splitlines()
    assert told[:2] == ["700 ana:ana", "600 ana:ana"]
    assert told[2].startswith("ana L ")
    (port,) = (published.port for published in machine.networks.published())
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        assert connection.recv(8) == b"SSH-2.0-"
    if not (folder / "key").exists() or shutil.which("ssh") is None:
        return
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "LogLevel=ERROR"]
    command = ["ssh", "-i", str(folder / "key"), "-p", str(port), *(f"-o{option}" for option in options)]
    done = subprocess.run(
        [*command, "ana@127.0.0.1", "sudo id -un; hostname"],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout == "root\nbox\n", done.stderr
    wrong = subprocess.run(
        [*command, "root@127.0.0.1", "true"], capture_output=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert wrong.returncode == 255


def test_the_system_has_an_address_and_fetches(networked: tuple[Machine, Path], served: int) -> None:
    """By DHCP, from networkd; apt's own fetcher brings a file of the host's."""
    machine, _ = networked
    assert "10.0.2." in machine.run(["ip", "-4", "-brief", "address"], text=True, check=True).stdout
    assert "10.0.2." in machine.run(["resolvectl", "dns"], text=True, check=True).stdout
    fetch = ["/usr/lib/apt/apt-helper", "download-file", f"http://10.0.2.2:{served}/file", "/tmp/file"]
    machine.run(fetch, check=True, timeout=60)
    assert machine.path("/tmp/file").read_bytes() == SERVED


def test_a_system_that_was_powered_off_leaves_a_clean_disk(
    image: images.Image, networked: tuple[Machine, Path]
) -> None:
    """The last of this machine: its services are stopped, its disk is unmounted."""
    machine, folder = networked
    machine.run(["sh", "-c", "dd if=/dev/urandom of=/root/kept bs=1M count=8 && sync"], check=True)
    assert machine.power_off(60) == "poweroff"
    kept = folder / "kept.qcow2"
    assert _core.image_check(str(kept))["errors"] == 0
    assert image.disk is not None
    _core.image_convert([(str(kept), "qcow2"), (str(image.disk), "raw")], str(folder / "disk.raw"), "raw")
    checked = subprocess.run(
        ["/usr/sbin/e2fsck", "-fn", str(folder / "disk.raw")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    assert "recovering journal" not in checked.stdout + checked.stderr


def test_commands_of_the_host_run_in_the_whole_system(full: Machine) -> None:
    """The agent came along with the initramfs, and is a service among others."""
    assert full.wait_ready(60)
    result = full.run(
        ["systemctl", "is-active", "ringzero-agent", "ssh"], text=True, check=True, capture_output=True
    )
    assert result.stdout.split() == ["active", "active"]
    assert full.run(["sh", "-c", "exit 7"]).returncode == 7
    done = full.run(
        ["sh", "-c", "id -un; pwd; echo $A"], user="daemon", cwd="/tmp", env={"A": "b", "PATH": "/usr/bin"}
    )
    assert done.stdout == b"daemon\n/tmp\nb\n"
    with full.popen(["bash", "-i"], stdout=subprocess.PIPE, window=(33, 77)) as shell:
        shell.stdin.write(b"tty; stty size; exit 3\n")
        shell.stdin.flush()
        said = shell.stdout.read()
    assert b"/dev/pts/" in said
    assert b"33 77" in said
    assert shell.returncode == 3


def test_an_agent_that_was_killed_is_started_again(full: Machine) -> None:
    """What it ran is lost, and told so; systemd starts another, and that moves to its port again."""
    lost = full.popen(["sleep", "1000"])
    with pytest.raises(GuestError, match="started again"):
        full.run(["sh", "-c", "kill -9 $(pidof agent)"], timeout=60)
    with pytest.raises(GuestError, match="started again"):
        lost.wait(60)
    assert full.run(["echo", "on"], text=True).stdout == "on\n"
    data = bytes(range(256)) * 20000
    full.path("/root/data").write_bytes(data)
    assert full.path("/root/data").read_bytes() == data
