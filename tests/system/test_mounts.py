"""Folders of the host in a guest, with the driver that the kernel's package brings."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import Machine

from .conftest import ENGINE, Run

pytestmark = pytest.mark.needs_debian


@pytest.fixture(scope="module", params=["debian:6.1", "debian:6.12"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, Path]]:
    """Give a guest with a folder at /there, and one to read at /only."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "only").mkdir()
    mounts = [f"{folder}:/there", f"{folder}/only:/only:ro"]
    with Machine(request.param, engine=ENGINE, mounts=mounts) as machine:
        machine.wait_ready(300)
        yield machine, folder


def sh(machine: Machine, script: str) -> str:
    done = machine.run(["sh", "-c", script], text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its path, with a digest of its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "-> " + os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def test_a_tree_goes_both_ways(shared: tuple[Machine, Path]) -> None:
    machine, folder = shared
    source = folder / "source"
    for group in range(20):
        (source / f"folder {group}").mkdir(parents=True)
        for number in range(50):
            content = bytes((group * number + at) % 251 for at in range(group * number % 4097))
            (source / f"folder {group}" / f"file {number}").write_bytes(content)
    (source / "large").write_bytes(os.urandom(3 << 20))
    (source / "link").symlink_to("folder 1/file 1")
    sh(machine, "cp -a /there/source /tmp/copy && cp -a /tmp/copy /there/back && rm -r /tmp/copy")
    wanted = tree(source)
    assert len(wanted) == 20 * 51 + 2
    assert tree(folder / "back") == wanted
    listed = sh(machine, "cd /there/back && find . -type f -o -type l | wc -l").strip()
    assert listed == str(20 * 50 + 2)
    sh(machine, "rm -r /there/back /there/source")
    assert not (folder / "back").exists()


def test_each_side_sees_what_the_other_does(shared: tuple[Machine, Path]) -> None:
    machine, folder = shared
    sh(machine, "echo from the guest >/there/file; mkdir -p /there/a/b; mv /there/file /there/a/b/c")
    assert (folder / "a/b/c").read_text() == "from the guest\n"
    (folder / "a/b/c").write_text("from the host, and longer\n")
    assert sh(machine, "cat /there/a/b/c") == "from the host, and longer\n"
    sh(machine, "echo appended >>/there/a/b/c; ln /there/a/b/c /there/hard; ln -s a/b/c /there/soft")
    assert (folder / "hard").read_text().endswith("appended\n")
    assert (
        sh(machine, "cat /there/soft; stat -c %h /there/hard") == "from the host, and longer\nappended\n2\n"
    )
    (folder / "a").rename(folder / "moved")
    assert sh(machine, "sleep 1.1; ls /there/moved/b") == "c\n"
    # A file that is removed is there as long as it is open.
    script = "exec 3<>/there/hard; rm /there/hard; echo more >&3; wc -l </proc/self/fd/3; stat -L -c %h /proc/self/fd/3"
    assert sh(machine, script) == "3\n1\n"
    assert not (folder / "hard").exists()


def test_status_is_right_and_permissions_are_kept(shared: tuple[Machine, Path]) -> None:
    machine, folder = shared
    script = "umask 027; echo x >made; chmod 6711 made; touch -d @1000000000 made; mkdir dir"
    sh(machine, f"cd /there; {script}")
    made = (folder / "made").stat()
    assert stat.S_IMODE(made.st_mode) == 0o711, "nothing runs as the owner here, who is not the guest's root"
    assert made.st_mtime == 1000000000
    assert stat.S_IMODE((folder / "dir").stat().st_mode) == 0o750
    assert sh(machine, "stat -c '%u:%g %a %s %Y' /there/made") == "0:0 711 2 1000000000\n"
    assert machine.run(["chown", "7:7", "/there/made"]).returncode != 0
    sh(machine, "chown 0:0 /there/made; truncate -s 1M /there/made; df /there | grep there")
    assert (folder / "made").stat().st_size == 1 << 20


def test_nothing_outside_is_reached(shared: tuple[Machine, Path]) -> None:
    machine, folder = shared
    (folder.parent / "secret").write_text("of the host")
    (folder / "out").symlink_to(folder.parent)
    (folder / "file").symlink_to(folder.parent / "secret")
    # A link means what it means in the guest.
    for path in ("/there/out/secret", "/there/file", "/there/../secret"):
        assert machine.run(["cat", path]).returncode != 0, path
    assert machine.run(["mknod", "/there/null", "c", "1", "3"]).returncode != 0
    sh(machine, "mkfifo /there/pipe && rm /there/pipe")
    os.mkfifo(folder / "ours")
    assert (
        machine.run(["sh", "-c", "echo x >/there/ours & sleep 0.1; cat /there/ours"], text=True).stdout
        == "x\n"
    )


def test_what_is_to_be_read_is_not_written(shared: tuple[Machine, Path]) -> None:
    machine, folder = shared
    (folder / "only" / "file").write_text("read me\n")
    assert sh(machine, "cat /only/file") == "read me\n"
    # Not even by a guest that says that it may.
    sh(machine, "mount -o remount,rw /only")
    for script in (
        "echo no >/only/file",
        "rm /only/file",
        "mkdir /only/new",
        "chmod 0 /only/file",
        "mv /only/file /only/x",
    ):
        done = machine.run(["sh", "-c", script], text=True)
        assert done.returncode != 0 and "Read-only file system" in done.stderr, script
    assert (folder / "only" / "file").read_text() == "read me\n"


def test_the_command_line_says_it_shortly(ringzero: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here\n")
    done = ringzero("run", "debian", "--mount", f"{tmp_path}:/a/b:ro", "--", "cat", "/a/b/file")
    assert done.stdout == b"here\n", done.stderr
    done = ringzero("run", "debian", "--mount", "/does/not/exist:/a", "--", "true")
    assert done.returncode == 2 and b"no such folder" in done.stderr
