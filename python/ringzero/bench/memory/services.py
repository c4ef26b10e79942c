"""Guests with a real service each, from Debian's packages: web, mail, database, proxy.

A guest is Debian's kernel with the modules and the busybox of the default image, and on top of it the files of one
service: its programs, what they load, its configuration, and a script. The script starts the service, says
`SERVICE READY` on the console, and then uses it: one small request after another, with a pause between them
(`service.pause=SECONDS` on the kernel's command line). Every 25 requests it says how many were answered.

Each guest has data of its own (made from its own randomness), as real servers do: what guests have in common is the
kernel and the programs.
"""

from __future__ import annotations

import gzip
import io
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ringzero import images
from ringzero.bench.debian_programs import LIBRARIES, LOADER, loaded_by
from ringzero.errors import FetchError, InternalError
from ringzero.images.apt import Apt, Progress, no_progress
from ringzero.images.cache import ImageCache
from ringzero.images.newc import NewcWriter

__all__ = ["READY", "SERVICES", "Service", "append", "files_of", "initramfs"]

READY = "SERVICE READY"
FAILED = "SERVICE FAILED"
SERVED = re.compile(r"^SERVED (\d+) FAILED (\d+)", re.MULTILINE)

INIT = """\
#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
busybox mkdir -p /dev/shm /dev/pts /run /var/log /var/mail /srv
busybox mount -t tmpfs shm /dev/shm
busybox mount -t devpts pts /dev/pts
busybox mount -t tmpfs srv /srv
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_balloon
do [ -e /lib/modules/$module.ko ] && busybox insmod /lib/modules/$module.ko
done
busybox ifconfig lo 127.0.0.1 up
pause=1
for word in $(busybox cat /proc/cmdline)
do case $word in service.pause=*) pause=${word#service.pause=};; esac
done
. /service/run
if start < /dev/null > /var/log/start 2>&1
then echo "SERVICE READY"
else busybox cat /var/log/start; echo "SERVICE FAILED"; busybox poweroff -f
fi
served=0 failed=0
while :
do if request < /dev/null > /var/log/request 2>&1
   then served=$((served + 1))
   else failed=$((failed + 1)); [ $failed = 1 ] && busybox cat /var/log/request
   fi
   [ $(((served + failed) % 25)) = 0 ] && echo "SERVED $served FAILED $failed"
   busybox sleep $pause
done
"""

# `own KIB NAME`: a file of this guest's own. `until COMMAND`: ten seconds for a service to answer.
COMMON = """\
own() { busybox dd if=/dev/urandom of=$2 bs=1024 count=$1 2>/dev/null; }
until_answered() {
    tries=0
    until "$@"
    do tries=$((tries + 1)); [ $tries -gt 200 ] && return 1; busybox usleep 50000
    done
}
"""

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
Debian-exim:x:101:101::/var/spool/exim4:/bin/false
postgres:x:102:102::/srv:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
"""
GROUP = """\
root:x:0:
mail:x:8:
Debian-exim:x:101:
postgres:x:102:
nogroup:x:65534:
"""


@dataclass(frozen=True)
class Service:
    """One service: what it is made of. `programs`, `trees` are globs below the unpacked packages."""

    name: str
    packages: dict[str, str]
    programs: tuple[str, ...]
    run: str
    files: dict[str, str]
    trees: tuple[str, ...] = ()


LIBRARY_PACKAGES = {
    "C library": r"libc6",
    "crypt": r"libcrypt1",
    "zlib": r"zlib1g",
    "pcre2": r"libpcre2-8-0",
    "openssl's library": r"libssl3(t64)?",
    "gcc's library": r"libgcc-s1",
}
KERBEROS = {
    "gssapi": r"libgssapi-krb5-2",
    "kerberos": r"libkrb5-3",
    "kerberos crypto": r"libk5crypto3",
    "kerberos support": r"libkrb5support0",
    "keyutils": r"libkeyutils1",
    "com_err": r"libcom-err2",
}
GNUTLS = {
    "gnutls": r"libgnutls30(t64)?",
    "p11-kit": r"libp11-kit0",
    "idn2": r"libidn2-0",
    "unistring": r"libunistring[25]",
    "tasn1": r"libtasn1-6",
    "hogweed": r"libhogweed6(t64)?",
    "nettle": r"libnettle8(t64)?",
    "gmp": r"libgmp10(t64)?",
    "ffi": r"libffi8",
}
SYSTEMD = {
    "systemd's library": r"libsystemd0",
    "cap": r"libcap2",
    "gcrypt": r"libgcrypt20",
    "gpg-error": r"libgpg-error0",
    "lz4": r"liblz4-1",
    "zstd": r"libzstd1",
    "xz's library": r"liblzma5",
}

WEB = Service(
    "web",
    LIBRARY_PACKAGES | {"nginx": r"nginx"},
    ("usr/sbin/nginx",),
    """\
start() {
    busybox mkdir -p /srv/www /var/lib/nginx /run
    for page in 0 1 2 3 4 5 6 7 8 9; do own $((200 * page + 100)) /srv/www/$page; done
    nginx -c /etc/nginx/nginx.conf || return 1
    until_answered busybox wget -q -O /dev/null http://127.0.0.1/0
}
turn=0
request() { turn=$(((turn + 1) % 10)); busybox wget -q -O /dev/null http://127.0.0.1/$turn; }
""",
    {
        "etc/nginx/nginx.conf": """\
user nobody nogroup;
worker_processes 1;
pid /run/nginx.pid;
events { worker_connections 64; }
http {
    access_log /var/log/access;
    sendfile on;
    server { listen 127.0.0.1:80; root /srv/www; }
}
"""
    },
)

MAIL = Service(
    "mail",
    LIBRARY_PACKAGES
    | KERBEROS
    | GNUTLS
    | {
        "exim": r"exim4-daemon-light",
        "db": r"libdb5\.3(t64)?",
        "idn": r"libidn12",
        "unbound": r"libunbound8",
        "gnutls' dane": r"libgnutls-dane0(t64)?",
        "libevent": r"libevent-2\.1-7(t64)?",
        "nsl": r"libnsl2",
        "tirpc": r"libtirpc3(t64)?",
        "pam": r"libpam0g",
        "audit": r"libaudit1",
        "cap-ng": r"libcap-ng0",
    },
    ("usr/sbin/exim4",),
    """\
start() {
    busybox mkdir -p /var/spool/exim4 /var/log/exim4
    busybox chown -R Debian-exim:Debian-exim /var/spool/exim4 /var/log/exim4
    busybox chmod 1777 /var/mail
    own 48 /srv/text
    # As a child of process 1 it would not go to the background by itself.
    exim4 -bdf -oX 127.0.0.1.25 &
    until_answered greeted
}
greeted() { printf 'QUIT\\r\\n' | busybox nc 127.0.0.1 25 | busybox grep -q ^220; }
number=0
request() {
    number=$((number + 1))
    # Every twentieth letter the box is read and emptied, so that it does not grow for ever.
    [ $((number % 20)) = 0 ] && busybox rm -f /var/mail/user
    { printf 'HELO here\\r\\nMAIL FROM:<a@mail.test>\\r\\nRCPT TO:<user@mail.test>\\r\\nDATA\\r\\nSubject: %s\\r\\n\\r\\n' $number
      busybox dd if=/srv/text bs=1024 skip=$((number % 40)) count=8 2>/dev/null | busybox base64
      printf '\\r\\n.\\r\\nQUIT\\r\\n'; } | busybox nc -w 10 127.0.0.1 25 | busybox grep -q '^250 OK id'
}
""",  # noqa: E501
    {
        "etc/services": "smtp 25/tcp\n",
        "var/lib/exim4/config.autogenerated": """\
primary_hostname = mail.test
domainlist local_domains = mail.test
acl_smtp_rcpt = all
smtp_enforce_sync = false
host_lookup =
rfc1413_hosts =
tls_advertise_hosts =
queue_run_max = 1
check_spool_space = 0
check_spool_inodes = 0
check_log_space = 0
check_log_inodes = 0
never_users =
begin acl
all:
  accept
begin routers
here:
  driver = accept
  domains = +local_domains
  transport = box
begin transports
box:
  driver = appendfile
  file = /var/mail/user
  user = nobody
  group = nogroup
  mode_fail_narrower = false
""",
    },
)

POSTGRES = r"usr/lib/postgresql/[0-9]*"
DATABASE = Service(
    "database",
    LIBRARY_PACKAGES
    | KERBEROS
    | GNUTLS
    | SYSTEMD
    | {
        "postgresql": r"postgresql-\d+",
        "postgresql's client": r"postgresql-client-\d+",
        "libpq": r"libpq5",
        "xml2": r"libxml2",
        "icu": r"libicu\d+",
        "ldap": r"libldap-?2(\.5-0)?",
        "sasl": r"libsasl2-2",
        "pam": r"libpam0g",
        "audit": r"libaudit1",
        "cap-ng": r"libcap-ng0",
        "C++ library": r"libstdc\+\+6",
        "readline": r"libreadline8(t64)?",
        "tinfo": r"libtinfo6",
        "selinux": r"libselinux1",
    },
    tuple(f"{POSTGRES}/bin/{name}" for name in ("postgres", "initdb", "pgbench", "psql")),
    """\
start() {
    busybox chown postgres:postgres /srv
    busybox chmod 1777 /tmp
    for bin in /usr/lib/postgresql/*/bin; do PATH=$bin:$PATH; done
    export PATH
    as postgres initdb -D /srv/data --no-locale -E UTF8 --no-sync --wal-segsize=1 -A trust || return 1
    as postgres "postgres -D /srv/data -k /tmp -h '' -c shared_buffers=16MB -c max_connections=10 >/tmp/log 2>&1 &"
    until_answered as postgres psql -h /tmp -c "'select 1'" || return 1
    as postgres pgbench -h /tmp -i -s 1 postgres || return 1
    # A table of this guest's own content.
    as postgres psql -h /tmp -c "'create table own as select n, md5(random()::text || n) from generate_series(1, 60000) n'"
}
as() { user=$1; shift; busybox su $user -s /bin/sh -c "export PATH=$PATH; $*"; }
request() { as postgres pgbench -h /tmp -n -c 1 -t 20 postgres; }
""",  # noqa: E501
    {},
    (
        f"{POSTGRES}/lib/dict_snowball.so",
        f"{POSTGRES}/lib/plpgsql.so",
        "usr/share/postgresql/[0-9]*/**/*",
    ),
)

PROXY = Service(
    "proxy",
    LIBRARY_PACKAGES
    | SYSTEMD
    | {
        "haproxy": r"haproxy",
        "lua of Debian 12": r"liblua5\.3-0",
        "lua of Debian 13": r"liblua5\.4-0",
        "opentracing": r"libopentracing-c-wrapper0(t64)?",
        "opentracing's C++": r"libopentracing1(t64)?",
        "C++ library": r"libstdc\+\+6",
    },
    ("usr/sbin/haproxy",),
    """\
start() {
    busybox mkdir -p /srv/www
    for page in 0 1 2 3 4; do own 400 /srv/www/$page; done
    busybox httpd -p 127.0.0.1:8080 -h /srv/www || return 1
    haproxy -D -f /etc/haproxy/haproxy.cfg || return 1
    until_answered busybox wget -q -O /dev/null http://127.0.0.1:3128/0
}
turn=0
request() { turn=$(((turn + 1) % 5)); busybox wget -q -O /dev/null http://127.0.0.1:3128/$turn; }
""",
    {
        "etc/haproxy/haproxy.cfg": """\
global
    maxconn 64
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend in
    bind 127.0.0.1:3128
    default_backend out
backend out
    server one 127.0.0.1:8080
"""
    },
)

SERVICES = {service.name: service for service in (WEB, MAIL, DATABASE, PROXY)}


def append(pause: float) -> str:
    """Return the kernel's command line for a guest whose load pauses for so many seconds between requests."""
    return f"{images.DEBIAN_APPEND} quiet rootfstype=ramfs rdinit=/service/init service.pause={pause:g}"


def initramfs(service: Service, series: str, progress: Progress = no_progress) -> bytes:
    """Return the initramfs of a service for a kernel series; its packages are fetched when the cache has no copy."""
    initrd = images.pull("debian", series).initrd
    if initrd is None:
        raise InternalError("the debian image has no initramfs")
    # Linux unpacks archives that follow each other, and a later file takes the place of an earlier one.
    return initrd.read_bytes() + files_of(service, progress).read_bytes()


def files_of(service: Service, progress: Progress = no_progress) -> Path:
    """Return the archive of a service's own files, made when the cache has none."""
    cache, name, archive = ImageCache(), f"bench-{service.name}", "root.cpio.gz"
    with cache.locked():
        files = cache.find(name)
        if files is None or _mark(service) != getattr(cache.manifest(name), "made_from", {}).get("recipe"):
            _build(service, cache, name, archive, progress)
            files = cache.find(name)
    if files is None:
        raise FetchError(f"the files in {cache.root / name} changed while they were written: try again")
    return files[archive]


def _mark(service: Service) -> str:
    """Name a recipe: another one builds the files again."""
    import hashlib

    return hashlib.sha256(f"{service}{INIT}{COMMON}{PASSWD}{GROUP}".encode()).hexdigest()[:16]


def _build(service: Service, cache: ImageCache, name: str, archive: str, progress: Progress) -> None:
    patterns = {label: re.compile(pattern) for label, pattern in service.packages.items()}
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache.root) as scratch_name:
        scratch = Path(scratch_name)
        apt, tree = Apt(scratch, progress), scratch / "tree"
        fetched = apt.fetch(patterns, ("bookworm", "bookworm-security"), scratch / "debs")
        for _, deb in fetched:
            apt.unpack(deb, tree)
        made_from = {package.name: package.version for package, _ in fetched} | {"recipe": _mark(service)}
        with cache.writing(name, made_from) as directory:
            (directory / archive).write_bytes(_archive(service, tree))


def _archive(service: Service, tree: Path) -> bytes:
    loader = next((path.resolve() for path in sorted(tree.glob("**/ld-linux-x86-64.so.2"))), None)
    if loader is None:
        raise FetchError("the fetched packages do not hold the C library's loader")
    kept = {LOADER: loader}
    for pattern in service.programs:
        found = sorted(path for path in tree.glob(pattern) if path.is_file())
        if not found:
            raise FetchError(f"the fetched packages do not hold {pattern}")
        for program in found:
            kept[str(program.relative_to(tree))] = program
            kept |= {f"{LIBRARIES}/{part}": path for part, path in loaded_by(loader, tree, program).items()}
    for pattern in service.trees:
        kept |= {str(path.relative_to(tree)): path for path in tree.glob(pattern) if path.is_file()}
    out = io.BytesIO()
    with NewcWriter(out) as archive:
        for path, source in sorted(kept.items()):
            archive.file(path, source.read_bytes(), 0o755 if source.stat().st_mode & 0o111 else 0o644)
        archive.file("service/init", INIT.encode(), 0o755)
        archive.file("service/run", (COMMON + service.run).encode())
        archive.file("etc/passwd", PASSWD.encode())
        archive.file("etc/group", GROUP.encode())
        for path, text in service.files.items():
            archive.file(path, text.encode())
    # Compressed: the archive and what it unpacks to are in a guest's memory at the same time.
    return gzip.compress(out.getvalue(), 6, mtime=0)
