"""The jail of a VM's process, and of those that serve its folders: nothing that they do not need can be done."""

import subprocess
import sys

SCRIPT = """
import ctypes, os, socket, threading
from ringzero import Machine, _core

vm = Machine("hello").assembled()
line = socket.socket(fileno=vm.serial_fd(0))
victim = os.fork()
if victim == 0:
    threading.Event().wait()
libc = ctypes.CDLL(None, use_errno=True)
_core.enter_jail()

def call(*arguments):
    ctypes.set_errno(0)
    if libc.syscall(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")

CLONE, PTRACE, ATTACH, SEIZE, UNSHARE, MOUNT, KEYCTL, BPF, URING = 56, 101, 16, 0x4206, 272, 165, 250, 321, 425
attempts = {
    "open": lambda: open("/etc/passwd"),
    "list": lambda: os.listdir("/"),
    "stat": lambda: os.stat("/etc/passwd"),
    "link": lambda: os.readlink("/proc/self/exe"),
    "make": lambda: os.mkdir("/tmp/ringzero-jail"),
    "remove": lambda: os.unlink("/tmp/ringzero-jail"),
    "socket": lambda: socket.socket(),
    "run": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "namespace": lambda: call(CLONE, 0x10000000 | 0x100 | 17, 0, 0, 0, 0),
    "unshare": lambda: call(UNSHARE, 0x10000000),
    "attach": lambda: call(PTRACE, ATTACH, victim, 0, 0),
    "seize": lambda: call(PTRACE, SEIZE, victim, 0, 0),
    "mount": lambda: call(MOUNT, b"none", b"/tmp", b"tmpfs", 0, 0),
    "become": lambda: os.setuid(os.getuid()),
    "keys": lambda: call(KEYCTL, 0, 0, 0, 0, 0),
    "bpf": lambda: call(BPF, 0, 0, 0),
    "uring": lambda: call(URING, 1, 0),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print("allowed:", name, flush=True)
        os._exit(1)
    except PermissionError:
        pass
threads = [threading.Thread(target=vm.start)]
threads[0].start()
threads[0].join()
print(vm.wait(60))
os.kill(victim, 9)
"""


NETWORK = """
import socket
from ringzero import _core

_core.enter_jail(network=True)
for family in (socket.AF_INET, socket.AF_INET6):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        socket.socket(family, kind).close()
with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    peer = socket.socket()
    peer.connect(server.getsockname())
    peer.close()
for family in (socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
    try:
        socket.socket(family, socket.SOCK_DGRAM)
        print("allowed:", family)
    except PermissionError:
        pass
try:
    open("/etc/passwd")
    print("allowed: files")
except PermissionError:
    print("ok")
"""


def test_a_guest_with_a_network_makes_sockets_of_the_internet_and_no_others() -> None:
    done = subprocess.run([sys.executable, "-c", NETWORK], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_a_guest_runs_and_nothing_else_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "poweroff\n"), done.stderr


FOLDER = """
import ctypes, os, socket
from ringzero import _core

ours, theirs = socket.socketpair()
ours.shutdown(socket.SHUT_WR)
_core.serve_folder("/tmp", theirs.fileno())
libc = ctypes.CDLL(None, use_errno=True)


def call(*arguments):
    ctypes.set_errno(0)
    if libc.syscall(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")


attempts = {
    "open": lambda: open("/etc/passwd"),
    "socket": lambda: socket.socket(),
    "pair": lambda: socket.socketpair(),
    "run": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "kill": lambda: os.kill(os.getppid(), 0),
    "attach": lambda: call(101, 16, os.getppid(), 0, 0),
    "mount": lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0),
    "ioctl": lambda: call(16, 0, 0x5412, b"x"),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print("allowed:", name, flush=True)
    except PermissionError:
        pass
print("end", flush=True)
os._exit(0)
"""


def test_who_serves_a_folder_does_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", FOLDER], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("end\n", 0), done.stderr
