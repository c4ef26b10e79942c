"""The guest of `bench io network`: Debian's iperf3 and NetPIPE on a network card; and these programs on this host."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

from ringzero import images
from ringzero.bench.debian_programs import LIBRARIES, LOADER
from ringzero.bench.guests import members
from ringzero.bench.memory.services import Service, files_of, initramfs

__all__ = ["LATENCY_PORT", "PORT", "READY", "Programs", "Words", "network_initramfs"]

READY = "NETWORK-READY"
PORT, LATENCY_PORT = 5201, 5002
"""Where a guest that serves listens."""

# What a guest does once its drivers are loaded, but that of the card. `net.do` is `serve`, or items of a client one
# after the other: an item prints its program's own words between two marks.
RUN = """\
for module in failover net_failover virtio_net
do [ -e /lib/modules/$module.ko ] && busybox insmod /lib/modules/$module.ko
done
port=5201 latency=5002 mtu=1500 seconds=1 trips=1000
for word in $(busybox cat /proc/cmdline)
do case $word in net.*=*) eval "${word#net.}";; esac
done
tries=0
until [ -e /sys/class/net/eth0 ]
do tries=$((tries + 1)); [ $tries -gt 200 ] && echo NETWORK-FAILED no card; busybox usleep 50000
done
busybox ip link set lo up
busybox ip link set eth0 mtu $mtu
busybox ip addr add $ip dev eth0
busybox ip link set eth0 up
item() {
    echo "NETWORK-ITEM $1"; shift
    "$@" 2>&1
    echo "NETWORK-STATUS $?"
}
if [ "$do" = serve ]
then
    iperf3 -s -p $port >/dev/null &
    echo NETWORK-READY
    while :; do NPtcp -P $latency -o /tmp/out >/dev/null 2>&1; done
fi
begin=$(busybox awk '{ print $1 }' /proc/uptime)
echo BENCH-START
for one in $(echo $do | busybox tr , ' ')
do case $one in
    up) item up iperf3 -c $peer -p $port -t $seconds -i 0 -J;;
    down) item down iperf3 -c $peer -p $port -t $seconds -i 0 -R -J;;
    latency) item latency NPtcp -h $peer -P $latency -l 1 -u 1 -p 0 -n $trips -o /tmp/out;;
    esac
done
echo BENCH-STOP
busybox awk -v begin=$begin '{ printf "NETWORK-CLOCK %d0000000\\n", ($1 - begin) * 100 }' /proc/uptime
busybox poweroff -f
"""

NETWORK = Service(
    "network",
    {
        "C library": r"libc6",
        "iperf3": r"iperf3",
        "iperf3's library": r"libiperf0",
        "sctp": r"libsctp1",
        "openssl's library": r"libssl3(t64)?",
        "NetPIPE": r"netpipe-tcp",
    },
    ("usr/bin/iperf3", "usr/bin/NPtcp"),
    RUN,
    {"etc/protocols": "tcp 6 TCP\n"},
)


@dataclass(frozen=True)
class Words:
    """What a guest is told: its own address with a prefix, its peer's, the ports there, and what to do."""

    do: str
    ip: str
    peer: str = ""
    port: int = PORT
    latency: int = LATENCY_PORT
    mtu: int = 1500
    seconds: int = 5
    trips: int = 5000

    def append(self) -> str:
        """Return the kernel's command line."""
        told = " ".join(f"net.{name}={value}" for name, value in vars(self).items() if value != "")
        return f"{images.DEBIAN_APPEND} quiet panic=-1 rootfstype=ramfs rdinit=/service/init {told}"


def network_initramfs(series: str) -> bytes:
    """Return the guest's initramfs for a kernel series; its packages are fetched when the cache has no copy."""
    return initramfs(NETWORK, series)


class Programs:
    """The guest's programs on this host, run through the loader that came with them."""

    def __init__(self, folder: Path) -> None:
        """Unpack them into a folder."""
        self._folder = folder
        for name, data in members(gzip.decompress(files_of(NETWORK).read_bytes())):
            if name.startswith((LIBRARIES, "usr/bin/")) or name == LOADER:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                path.chmod(0o755)

    def command(self, name: str, *words: str) -> list[str]:
        """Return how to run one of them."""
        loader = [str(self._folder / LOADER), "--library-path", str(self._folder / LIBRARIES)]
        return [*loader, str(self._folder / "usr/bin" / name), *words]
