"""Commands and files in guests: of a machine of one's own, and of VMs of a host, from Python and the command line."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import Host, Machine
from ringzero.host.client import HostVm

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian
PIPE = subprocess.PIPE


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    root = tmp_path_factory.mktemp("host") / "h"
    with Host.connect(root, start=True, memory="4G") as host:
        yield host
        host.down(*(vm.name for vm in host.vms()), now=True)
        host.stop()


@pytest.fixture(scope="module")
def one(host: Host) -> HostVm:
    return host.up("debian", name="one", memory="128M")


@pytest.fixture(scope="module", params=[True, "serial", "port", "vsock", "host"])
def vm(request: pytest.FixtureRequest) -> Iterator[Machine | HostVm]:
    """A guest whose agent is reached over each of its lines, and through the process of a VM."""
    if request.param == "host":
        yield request.getfixturevalue("one")
    else:
        with Machine("debian", engine=ENGINE, shell=False, agent=request.param) as machine:
            machine.wait_ready(300)
            yield machine


def test_a_conversation(vm: Machine | HostVm) -> None:
    with vm.popen(
        ["sh", "-c", "while read x; do echo [$x]; done; exit 4"], stdin=PIPE, stdout=PIPE, text=True
    ) as talk:
        talk.stdin.write("one\n")
        talk.stdin.flush()
        assert talk.stdout.readline() == "[one]\n"
        talk.stdin.close()
    assert talk.returncode == 4


def test_users(vm: Machine | HostVm) -> None:
    done = vm.run(["id", "-u"], user="nobody", text=True)
    assert done.stdout == "65534\n"
    assert vm.run(["cat", "/proc/1/environ"], user="nobody").returncode == 1


def test_a_stream_that_nobody_reads(vm: Machine | HostVm) -> None:
    idle = vm.popen(["yes"], stdout=PIPE)
    assert vm.run(["echo", "on"]).stdout == b"on\n"
    assert idle.stdout.read(4) == b"y\ny\n"
    idle.stdout.close()
    assert idle.wait(60) == -signal.SIGPIPE


def test_output_comes_whole(vm: Machine | HostVm) -> None:
    done = vm.run(["sh", "-c", "seq 1 400000 | tee /dev/stderr | sha256sum"])
    text = "".join(f"{number}\n" for number in range(1, 400001)).encode()
    assert done.stderr == text
    import hashlib

    assert done.stdout.split()[0].decode() == hashlib.sha256(text).hexdigest()


def test_files_there_and_back(vm: Machine | HostVm, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "big").write_bytes(os.urandom(700_000))
    (tree / "a" / "b" / "run").write_text("#!/bin/sh\necho ran\n")
    (tree / "a" / "b" / "run").chmod(0o755)
    (tree / "link").symlink_to("a/big")
    os.utime(tree / "a" / "big", ns=(1, 1_600_000_000_123_456_789))
    vm.files.put(tree, "/root/tree")
    assert vm.run(["/root/tree/a/b/run"]).stdout == b"ran\n"
    assert vm.path("/root/tree/a/big").stat().st_mtime_ns == 1_600_000_000_123_456_789
    vm.files.get("/root/tree", tmp_path / "back")
    assert subprocess.run(["diff", "-r", "--no-dereference", tree, tmp_path / "back"]).returncode == 0
    assert (tmp_path / "back" / "a" / "big").stat().st_mtime_ns == 1_600_000_000_123_456_789
    vm.path("/root/tree").rmtree()
    assert not vm.path("/root/tree").exists()
    vm.path("/proc/sys/kernel/hostname").write_text("renamed")
    assert vm.run(["hostname"], text=True).stdout == "renamed\n"


def test_asyncio(vm: Machine | HostVm) -> None:
    async def story() -> None:
        done = await asyncio.gather(
            *(vm.aio.run(["sh", "-c", f"cat; exit {n}"], input=b"x" * n) for n in range(8))
        )
        assert [(one.returncode, len(one.stdout)) for one in done] == [(n, n) for n in range(8)]
        async with await vm.aio.popen(["seq", "50000"], stdout=PIPE, text=True) as process:
            assert process.stdout is not None
            assert [int(line) async for line in process.stdout] == list(range(1, 50001))
        assert process.returncode == 0
        with pytest.raises(subprocess.CalledProcessError):
            await vm.aio.run(["false"], check=True)
        with pytest.raises(FileNotFoundError):
            await vm.aio.popen(["nonesuch"])
        with pytest.raises(subprocess.TimeoutExpired):
            await vm.aio.run(["sleep", "4321"], timeout=0.3)
        task = asyncio.create_task(vm.aio.run(["sleep", "4321"]))
        while "sleep 4321" not in (await vm.aio.run(["ps"], text=True)).stdout:
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while "sleep 4321" in (await vm.aio.run(["ps"], text=True)).stdout:  # it is killed, not forgotten
            await asyncio.sleep(0.05)
        await vm.aio.files.write_text("/tmp/async", "text")
        assert await vm.aio.files.read_text("/tmp/async") == "text"

    asyncio.run(asyncio.wait_for(story(), 120))


def ringzero(host: Host, *words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"RINGZERO_HOST": str(host._runtime.root)}
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    command = [sys.executable, "-m", "ringzero", *words]
    return subprocess.run(command, env=environment, capture_output=True, timeout=100, **options)  # type: ignore[call-overload]


def test_the_command_exec(host: Host, one: HostVm) -> None:
    done = ringzero(host, "exec", "one", "--", "sh", "-c", "cat; echo e >&2; exit 7", input=b"typed")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"typed", b"e\n")
    done = ringzero(
        host, "exec", "-e", "A=b", "-w", "/tmp", "-u", "nobody", "one", "sh", "-c", "pwd; id -u; echo $A"
    )
    assert done.stdout == b"/tmp\n65534\nb\n"
    assert ringzero(host, "exec", "one", "--", "sh", "-c", "kill -9 $$").returncode == 137
    done = ringzero(host, "exec", "one", "--", "nonesuch")
    assert (done.returncode, done.stderr) == (127, b"ringzero: there is no command 'nonesuch' in vm 'one'\n")
    assert ringzero(host, "exec", "one", "--", "/etc/passwd").returncode == 126
    done = ringzero(host, "exec", "--timeout", "0.5", "one", "--", "sleep", "60")
    assert (done.returncode, done.stderr) == (124, b"ringzero: --timeout passed before 'sleep' was done\n")
    assert ringzero(host, "exec", "two", "--", "true").returncode == 2
    done = ringzero(host, "exec", "-t", "one", "--", "sh", "-c", "tty")
    assert done.stdout.startswith(b"/dev/pts/")


def test_a_client_that_is_killed_takes_its_command_with_it(host: Host, one: HostVm) -> None:
    environment = os.environ | {"RINGZERO_HOST": str(host._runtime.root)}
    command = [sys.executable, "-m", "ringzero", "exec", "one", "--", "sleep", "9876"]
    client = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)

    def runs() -> bool:
        return b"sleep 9876" in one.run(["ps"]).stdout

    while not runs():
        time.sleep(0.05)
    client.kill()
    client.wait()
    while runs():
        time.sleep(0.05)


def test_the_command_cp(host: Host, one: HostVm, tmp_path: Path) -> None:
    (tmp_path / "tree" / "in").mkdir(parents=True)
    (tmp_path / "tree" / "in" / "f").write_bytes(b"x" * 100_000)
    assert ringzero(host, "cp", str(tmp_path / "tree" / "in" / "f"), "one:/root/").returncode == 0
    assert one.path("/root/f").read_bytes() == b"x" * 100_000
    assert ringzero(host, "cp", "-r", str(tmp_path / "tree"), "one:/root").returncode == 0
    assert ringzero(host, "cp", "-r", "one:/root/tree", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back" / "in" / "f").read_bytes() == b"x" * 100_000
    assert ringzero(host, "cp", "one:/root/f", ".", cwd=str(tmp_path)).returncode == 0
    assert (tmp_path / "f").exists()
    for words, sentence in (
        (("one:/root/tree", str(tmp_path / "no")), "is a folder: say -r"),
        (("one:/nonesuch", str(tmp_path / "no")), "No such file or directory"),
        (("one:/a", "one:/b"), "one of the two is in a VM"),
        (("/a", "/b"), "one of the two is in a VM"),
        ((str(tmp_path / "nonesuch"), "one:/b"), "No such file or directory"),
        ((str(tmp_path / "f"), "one:/proc/none"), "one:/proc/none"),
    ):
        done = ringzero(host, "cp", *words)
        assert done.returncode == 2
        assert sentence in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1


def test_who_expects(debian: Machine) -> None:
    debian.console.sendline("")
    debian.expect("# ", timeout=60)
    debian.console.sendline("echo $((6 * 7))")
    assert debian.expect(r"\b42\b", timeout=60)
