"""The host daemon: VMs come, go and die, its processes are killed, its clients misbehave, and nobody else minds."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringzero import Host, _core
from ringzero.errors import GuestEnded, InputError
from ringzero.host.client import HostVm
from ringzero.host.runtime import Runtime
from ringzero.host.wire import Channel, connect

pytestmark = pytest.mark.needs_debian

SMALL = {"memory": "96M"}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A runtime folder, of which nothing is left running in the end."""
    folder = tmp_path / "host"
    yield folder
    with contextlib.suppress(InputError), Host.connect(folder) as host:
        host.down(*(vm.name for vm in host.vms()), now=True)
        host.stop()
    assert eventually(lambda: not processes(folder)), "processes are left"


@pytest.fixture
def host(root: Path) -> Iterator[Host]:
    with Host.connect(root, start=True, memory="8G") as host:
        yield host


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Say whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def processes(root: Path) -> list[int]:
    """Return the processes that have a file below a runtime folder open, or name it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
            if int(process.name) != os.getpid() and any(link.startswith(str(root)) for link in links):
                found.append(int(process.name))
    return found


def ringzero(root: Path, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RINGZERO_HOST": str(root)}
    options.setdefault("stdin", subprocess.DEVNULL)
    command = [sys.executable, "-m", "ringzero", "host", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False, **options
    )


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def says(vm: HostVm, word: str = "alive") -> bool:
    return vm.run(["echo", word], text=True, check=True).stdout == f"{word}\n"


def test_up_list_and_down(host: Host, root: Path) -> None:
    vms = host.up_many(3, "debian", **SMALL)
    assert [vm.name for vm in vms] == ["debian-1", "debian-2", "debian-3"]
    assert all(says(vm, vm.name) for vm in vms)
    rows = json.loads(ringzero(root, "list", "--json").stdout)
    assert [row["phase"] for row in rows] == ["running"] * 3
    listed = ringzero(root, "list").stdout
    assert "debian-2" in listed and "96M" in listed
    done = ringzero(root, "exec", "debian-3", "--", "sh", "-c", "cat; exit 7", input="typed", stdin=None)
    assert (done.returncode, done.stdout) == (7, "typed")
    pids = [row["pid"] for row in rows]
    assert ringzero(root, "down", "debian-1").returncode == 0
    assert [vm.name for vm in host.vms()] == ["debian-2", "debian-3"]
    assert ringzero(root, "down", "--all", "--now").returncode == 0
    assert host.vms() == []
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert list((root / "vms").iterdir()) == []


def test_a_vms_process_is_jailed(host: Host, root: Path) -> None:
    vm = host.up("debian", **SMALL)
    rows = json.loads(ringzero(root, "list", "--json").stdout)
    assert rows[0]["jail"] == ["no new privileges", "seccomp"]
    assert says(vm)
    for thread in Path(f"/proc/{rows[0]['pid']}/task").iterdir():
        status = (thread / "status").read_text()
        assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status


def test_a_vm_has_disks_of_its_own(host: Host, tmp_path: Path) -> None:
    """Opened before its process is jailed; one that is written to belongs to one VM."""
    raw, image = tmp_path / "a.raw", tmp_path / "b.qcow2"
    raw.write_bytes(bytes(1 << 20))
    _core.image_create(str(image), 16 << 20)
    vm = host.up("debian", disks=[str(raw), f"{image},serial=second"], **SMALL)
    write = (
        "echo kept | dd of=/dev/vda bs=512 conv=sync oflag=direct && dd if=/dev/vda of=/dev/vdb bs=1M && sync"
    )
    vm.run(["sh", "-c", write], check=True)
    assert vm.run(["cat", "/sys/block/vdb/serial"], text=True).stdout == "second"
    assert raw.read_bytes()[:5] == b"kept\n"
    with pytest.raises(GuestEnded, match="another machine uses it"):
        host.up("debian", name="late", disks=[str(raw)], **SMALL)
    with pytest.raises(InputError, match="2 vms cannot all write"):
        host.up_many(2, "debian", disks=[str(raw)], **SMALL)
    host.down(vm.name, now=True)
    assert _core.image_check(str(image))["errors"] == 0
    assert _core.image_info(str(image))["size"] == 16 << 20


def test_a_vm_has_folders_that_other_processes_serve(host: Host, root: Path, tmp_path: Path) -> None:
    """They end with the VM, and a guest gets nowhere else."""
    (tmp_path / "secret").write_text("no")
    shared, only = tmp_path / "shared", tmp_path / "only"
    for folder in (shared, only):
        folder.mkdir()
    (only / "file").write_text("read me")
    (shared / "out").symlink_to(tmp_path / "secret")
    vm = host.up("debian", mounts=[f"{shared}:/there", f"{only}:/only:ro"], **SMALL)
    assert vm.row()["jail"] == ["no new privileges", "seccomp"]
    assert vm.run(["cat", "/only/file"], text=True).stdout == "read me"
    script = "mkdir d; echo x > a; mv a d/b; ln d/b c; rm c; chmod 600 d/b; touch -d 2020-01-01 d/b; ls -l d"
    assert "Jan  1  2020" in vm.run(["sh", "-c", script], cwd="/there", text=True, check=True).stdout
    assert ((shared / "d" / "b").read_text(), (shared / "d" / "b").stat().st_mode & 0o777) == ("x\n", 0o600)
    assert vm.run(["sh", "-c", "echo y > /only/new"]).returncode != 0
    assert vm.run(["cat", "/there/out"]).returncode != 0
    data = os.urandom(3 << 20)
    (shared / "large").write_bytes(data)
    vm.run(["sh", "-c", "cat large > copy; sync"], cwd="/there", check=True)
    assert (shared / "copy").read_bytes() == data
    helpers = [one for one in processes(tmp_path) if "rz folder" in Path(f"/proc/{one}/comm").read_text()]
    assert len(helpers) == 2
    # One that is gone is an error of each of its requests, and nothing else.
    kill(helpers[0])
    kill(helpers[1])
    assert eventually(lambda: vm.run(["ls", "/there"]).returncode != 0)
    assert says(vm)
    kill(vm.row()["pid"])
    assert eventually(lambda: vm.phase == "ended")


def test_a_vm_whose_disk_fails_waits_and_goes_on(host: Host, tmp_path: Path) -> None:
    """Its process tells the daemon, and tries again by itself."""
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(1 << 20))
    vm = host.up("debian", disks=[f"{raw},on-error=pause"], **SMALL)
    os.truncate(raw, 0)
    reading = vm.popen(["dd", "if=/dev/vda", "of=/dev/null", "bs=64k", "iflag=direct"])
    told = lambda: [event.text for event in host.events() if event.kind == "disk"]  # noqa: E731
    assert eventually(lambda: len(told()) == 1)
    assert "a.raw" in told()[0] and "paused" in told()[0]
    assert reading.poll() is None
    os.truncate(raw, 1 << 20)
    assert reading.wait(20) == 0
    assert eventually(lambda: len(told()) == 2) and "goes on" in told()[1]


def test_what_a_command_in_a_guest_does(host: Host) -> None:
    vm = host.up("debian", **SMALL)
    done = vm.run(["sh", "-c", "cat; echo bad >&2; exit 3"], input=b"x" * 300_000)
    assert (done.returncode, len(done.stdout), done.stderr) == (3, 300_000, b"bad\n")
    with pytest.raises(FileNotFoundError):
        vm.run(["no-such-command"])
    with pytest.raises(subprocess.TimeoutExpired):
        vm.run(["sleep", "60"], timeout=0.2)
    assert vm.run(["pwd"], cwd="/tmp", text=True).stdout == "/tmp\n"
    with pytest.raises(GuestEnded):
        vm.run(["sh", "-c", "poweroff -f; sleep 60"])
    assert eventually(lambda: vm.phase == "ended")
    assert vm.reason == "poweroff"


def test_the_console_of_a_guest(host: Host, root: Path) -> None:
    vm = host.up("debian", **SMALL)
    line, seen = vm.open_console()
    other, other_seen = vm.open_console()
    with line, other:
        line.settimeout(20)
        other.settimeout(20)
        line.sendall(b"echo $((6 * 7))42\n")
        while b"4242" not in seen:
            seen += line.recv(4096)
        while b"4242" not in other_seen:
            other_seen += other.recv(4096)
    # Who comes later sees what was printed before.
    again = ringzero(root, "console", "debian-1", input="exit\n", stdin=None)
    assert "4242" in again.stdout
    assert eventually(lambda: vm.phase == "ended") and vm.reason == "poweroff"
    with pytest.raises(GuestEnded):
        vm.open_console()


def test_a_vm_that_is_killed_takes_nobody_with_it(host: Host) -> None:
    first, second = host.up_many(2, "debian", **SMALL)
    after = host.events()[-1].number
    kill(first.row()["pid"])
    assert eventually(lambda: first.phase == "ended")
    assert first.reason is not None and "SIGKILL" in first.reason
    assert says(second)
    assert ("ended", first.name) in [(event.kind, event.vm) for event in host.events(after)]
    with pytest.raises(InputError, match="already"):
        host.up("debian", name=second.name, **SMALL)
    # Its name is free again.
    assert says(host.up("debian", name=first.name, **SMALL))


def test_the_daemon_is_killed_and_finds_its_vms_again(host: Host, root: Path) -> None:
    first, second, third = host.up_many(3, "debian", min="24M", shares=7, share_group="a", **SMALL)
    pids = {vm.name: vm.row()["pid"] for vm in (first, second, third)}
    kill(host.status()["pid"])
    with pytest.raises(InputError, match="ended"):
        host.vms()
    kill(pids[third.name])
    assert eventually(lambda: not connects(root, third.name))
    with Host.connect(root, start=True, memory="8G") as again:
        rows = {row["name"]: row for row in again.ask("list")["vms"]}
        assert rows[first.name]["pid"] == pids[first.name]
        assert rows[second.name]["phase"] == "running"
        assert rows[third.name]["phase"] == "ended" and "killed" in rows[third.name]["reason"]
        spec = rows[first.name]["spec"]
        assert (spec["min"], spec["shares"], spec["group"]) == (24 << 20, 7, "a")
        assert says(again.vm(first.name))
        # It watches over VMs that it did not start.
        kill(pids[first.name])
        assert eventually(lambda: again.vm(first.name).phase == "ended")
        # And it finds them without its database.
        again.stop()
    for file in root.glob("state.db*"):
        file.unlink()
    with Host.connect(root, start=True, memory="8G") as third_host:
        assert [vm.name for vm in third_host.vms()] == [second.name]
        assert says(third_host.vm(second.name))


def connects(root: Path, name: str) -> bool:
    try:
        connect(Runtime(root).control(name)).close()
    except OSError:
        return False
    return True


def test_the_fork_server_is_killed(host: Host) -> None:
    first = host.up("debian", **SMALL)
    before = host.status()["fork_server"]
    kill(before)
    assert eventually(lambda: host.status()["fork_server"] != before)
    assert says(first)
    second = host.up("debian", **SMALL)
    assert says(second)
    assert host.status()["fork_server"] not in (None, before)
    # A VM that no fork server can tell about is still missed.
    kill(first.row()["pid"])
    assert eventually(lambda: first.phase == "ended")


def test_a_vm_is_refused_when_the_mins_cannot_be_kept(root: Path) -> None:
    with Host.connect(root, start=True, memory="400M") as host:
        first = host.up("debian", min="96M", **SMALL)
        refused = ringzero(root, "up", "--memory", "320M", "--min", "320M")
        assert refused.returncode == 2
        assert "its min of 320 MiB, the mins of 1 other vm (96 MiB)" in refused.stderr
        assert "than the host has (400 MiB)" in refused.stderr
        # All of them or none.
        with pytest.raises(InputError, match="refused"):
            host.up_many(8, "debian", **SMALL)
        assert [vm.name for vm in host.vms()] == [first.name]
        assert [event.kind for event in host.events()].count("refused") == 2


def test_starting_what_cannot_be(root: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def decide(host): pass\n")
    refused = ringzero(root, "start", "--policy", str(bad))
    assert refused.returncode == 2 and "three arguments" in refused.stderr
    assert ringzero(root, "status").returncode == 2
    assert ringzero(root, "start", "--memory", "4G").returncode == 0
    second = ringzero(root, "start")
    assert second.returncode == 2 and "runs already" in second.stderr
    assert "4096 MiB" in ringzero(root, "status").stdout
    for words, expected in (
        (["up", "--memory", "banana"], "not a size"),
        (["up", "--min", "200M", "--memory", "128M"], "must rise"),
        (["up", "--name", "../up"], "cannot be called"),
        (["up", "--count", "0"], "from 1"),
        (["up", "windows"], "no image"),
        (["up", "--kernel", "/dev/null"], "not a regular file"),
        (["down"], "--all"),
        (["down", "nobody"], "no vm 'nobody'"),
        (["console", "nobody"], "no vm 'nobody'"),
    ):
        refused = ringzero(root, *words)
        assert refused.returncode == 2 and expected in refused.stderr, (words, refused.stderr)
        assert len(refused.stderr.splitlines()) == 1
    root.chmod(0o755)
    assert "chmod 700" in ringzero(root, "start").stderr
    root.chmod(0o700)


def test_clients_that_send_rubbish(host: Host, root: Path) -> None:
    vm = host.up("debian", **SMALL)
    pieces = (
        b"\0\xff\n",
        b"[1, 2]\n",
        b'{"do": {}}\n',
        b'{"do": "up", "specs": 3}\n',
        b'{"do": "up", "specs": [{"name": "x", "memory": [1]}]}\n',
        b'{"do": "up", "specs": [{"name": "../../x"}]}\n',
        b'{"do": "events", "after": 99999999999999999999}\n',
        b'{"do": "down", "names": [[]]}\n',
        b'{"do": "list", "fds": 3}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (5 << 20),
    )
    for path in (Runtime(root).socket, Runtime(root).control(vm.name)):
        for piece in pieces:
            with connect(path) as connection, contextlib.suppress(OSError):
                connection.sendall(piece)
                assert b'"error"' in connection.recv(65536), piece
        # Descriptors that nobody announced are closed.
        with connect(path) as connection, open(os.devnull) as null, contextlib.suppress(OSError):
            for _ in range(100):
                socket.send_fds(connection, [b" "], [null.fileno()] * 10)
    assert says(vm)
    pid = host.status()["pid"]
    assert eventually(
        lambda: not any(os.readlink(link) == os.devnull for link in links(pid) if link.name != "0")
    )


def links(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def test_stale_sockets_and_a_damaged_database(root: Path) -> None:
    runtime = Runtime(root)
    runtime.prepare()
    for path in (runtime.socket, runtime.control("old")):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
    runtime.control("file").write_bytes(b"")
    runtime.database.write_bytes(b"no database" * 1000)
    with Host.connect(root, start=True, memory="4G") as host:
        assert host.vms() == []
        assert "damaged" in [event.kind for event in host.events()]
        assert list(runtime.vms.iterdir()) == []
        assert says(host.up("debian", name="old", **SMALL))


def test_events_are_told_as_they_happen(host: Host) -> None:
    vm = host.up("debian", name="seen", **SMALL)
    with Channel(connect(host._runtime.socket)) as watcher:
        watcher.ask("watch")
        vm.down()
        watcher.connection.settimeout(10)
        got = watcher.receive()
        assert got is not None and (got[0]["kind"], got[0]["vm"]) == ("ended", "seen")


def test_a_vm_in_its_jail_has_a_network_and_a_port(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    vm = host.up("debian", name="web", net="nat,host-loopback", publish=[f"{port}:80"], **SMALL)
    script = f"hostname >/tmp/file; httpd -p 80 -h /tmp; wget -q -O - http://10.0.2.2:{port}/file"
    # Out through the jail's sockets, and in again through the port.
    assert vm.run(["sh", "-c", script], text=True, check=True).stdout == "web\n"
    # The jailed process answers this itself.
    url = "http://169.254.169.254/latest/meta-data/hostname"
    assert vm.run(["wget", "-q", "-O", "-", url], text=True, check=True).stdout == "web"
    with pytest.raises(GuestEnded, match="taken already"):
        host.up("debian", name="other", publish=[f"{port}:80"], **SMALL)
