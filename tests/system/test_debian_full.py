"""debian-full: built from packages once, and kept in the cache; skipped where no mirror can be reached."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from ringzero import Machine, images
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


def test_a_seed_lets_a_key_in_and_no_empty_password(image: images.Image) -> None:
    """The key is in the user's file, with the modes that sshd wants, and the password is locked."""
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBeOSmM8sAvU8R7pCz8mCs5nYhHqnv1TnWq5PEY4Gx5T me@here"
    seed = Seed(user="ana", ssh_keys=(key,), user_data=SHOW)
    with Machine(image, memory="512M", engine=ENGINE, seed=seed) as machine:
        text = machine.console.expect("seed-shown", timeout=300).string
    assert key in text
    assert "600 ana:ana" in text
    assert "700 ana:ana" in text
    assert "ana L " in text


SHOW = b"""#!/bin/sh
cat /home/ana/.ssh/authorized_keys
stat -c '%a %U:%G' /home/ana/.ssh /home/ana/.ssh/authorized_keys
passwd --status ana
echo seed-shown
"""


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
