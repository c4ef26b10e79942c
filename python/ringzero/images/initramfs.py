"""Build the initramfs of a Debian image: the guest agent, busybox, and the few files that a shell wants."""

from __future__ import annotations

from pathlib import Path

from ringzero.errors import FetchError, InternalError

BUILTIN = Path(__file__).parent / "builtin"

# A mount point each; the agent mounts them (guests/agent/agent.c `prepare`).
DIRECTORIES = (
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "root",
    "etc",
    "var",
    "var/tmp",
    "mnt",
    "lib/modules",
    "etc/udhcpc",
)

PROFILE = """\
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
PS1='\\u@\\h:\\w\\$ '
echo "Linux $(uname -r), unmodified, in an ordinary process. Ctrl-] leaves at once; exit or poweroff ends."
"""

# Run by the agent when there is a network, before the first command; and by udhcpc, with what it was told.
NETWORK = """\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
ip link set lo up
for card in /sys/class/net/e*; do
    card=${card##*/}
    address=$(cat "/sys/class/net/$card/address")
    own=$(tr ' ' '\\n' </proc/cmdline | sed -n "s/^ringzero.ip=$address=//p")
    ip link set "$card" up
    [ "$own" != none ] || continue
    [ -z "$own" ] || { ip addr add "$own" dev "$card"; continue; }
    udhcpc -q -n -f -t 5 -T 1 -A 1 -i "$card" -s /etc/udhcpc/default.script >/dev/null 2>&1
done
"""
LEASE = """\
#!/bin/sh
case "$1" in
bound | renew)
    ip addr flush dev "$interface" scope global
    ip addr add "$ip/${mask:-24}" broadcast "${broadcast:-+}" dev "$interface"
    [ -z "$mtu" ] || ip link set dev "$interface" mtu "$mtu"
    [ -z "$router" ] || ip route replace default via "${router%% *}" dev "$interface"
    [ -z "$hostname" ] || hostname "$hostname"
    [ -z "$dns" ] || for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    ;;
esac
"""

# The agent loads these (guests/agent/agent.c), unless they are built into the kernel: Debian's cloud kernel 6.12.95 has
# virtio, its rings and its PCI transport built in, 6.1.192 has them as modules.
MODULES = (
    "pvpanic.ko",
    "pvpanic-mmio.ko",
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_mmio.ko",
    "virtio_balloon.ko",
    "virtio_blk.ko",
    "virtio_console.ko",
    "fuse.ko",
    "virtiofs.ko",
    "vsock.ko",
    "vmw_vsock_virtio_transport_common.ko",
    "vmw_vsock_virtio_transport.ko",
    "failover.ko",
    "net_failover.ko",
    "virtio_net.ko",
    "virtio-rng.ko",
)


def agent_path() -> Path:
    """Return the guest agent that was built into the package. Raises InternalError when it is not there."""
    path = BUILTIN / "agent"
    if not path.is_file():
        raise InternalError(
            f"the guest agent is missing from the package ({path}): build it with guests/agent/build.py"
        )
    return path


def build_initramfs(busybox: bytes, applets: list[str], modules: dict[str, bytes], agent: bytes) -> bytes:
    """Return a newc archive, not compressed: that is the fastest.

    Measured with 6.1.192 up to /init: 463 million instructions as it is, 500 with zstd, 503 with gzip.

    `applets` are paths without a leading slash, as `busybox --list-full` prints them; `modules` are by file
    name.
    """
    import io

    from ringzero.images.newc import NewcWriter

    out = io.BytesIO()
    with NewcWriter(out) as archive:
        for path in DIRECTORIES:
            archive.directory(path, 0o1777 if path.endswith("tmp") else 0o755)
        # The kernel opens these before the agent can mount anything over them.
        archive.device("dev/console", 5, 1)
        archive.device("dev/null", 1, 3, mode=0o666)
        archive.file("init", agent, 0o755)
        archive.file("bin/busybox", busybox, 0o755)
        for applet in applets:
            if applet not in ("bin/busybox", "init", "linuxrc"):
                archive.symlink(applet, "/bin/busybox")
        for name, module in modules.items():
            archive.file(f"lib/modules/{name}", module)
        archive.file(
            "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
        )
        archive.file("etc/group", b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")
        archive.file("etc/hostname", b"ringzero\n")
        archive.file("etc/hosts", b"127.0.0.1 localhost ringzero\n")
        archive.file("etc/profile", PROFILE.encode())
        archive.file("etc/network", NETWORK.encode(), 0o755)
        archive.file("etc/udhcpc/default.script", LEASE.encode(), 0o755)
    return out.getvalue()


def busybox_applets(busybox: Path) -> list[str]:
    """Ask a busybox which commands are in it. It is a static program for x86-64, so this host can run it."""
    import subprocess

    try:
        listed = subprocess.run(
            [str(busybox), "--list-full"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FetchError(f"the fetched busybox does not run on this machine: {error}") from error
    return [line for line in listed.stdout.split() if line]


def collect_modules(tree: Path) -> dict[str, bytes]:
    """Read the modules that the agent loads from an unpacked kernel package; absent ones are left out."""
    import lzma

    found = {}
    for name in MODULES:
        for path in sorted(tree.glob(f"**/{name}*")):
            data = path.read_bytes()
            if path.name == name:
                found[name] = data
            elif path.suffix == ".xz":
                found[name] = lzma.decompress(data)
    return found
