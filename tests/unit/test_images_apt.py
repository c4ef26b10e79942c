"""apt: sources in both forms, and a pull against an apt that is not the machine's own."""

import re
from pathlib import Path

import pytest

from ringzero.errors import FetchError
from ringzero.images import apt as apt_module
from ringzero.images.apt import Apt, Package, Source, parse_deb822, parse_one_line
from ringzero.images.cache import ImageCache
from ringzero.images.debian_build import pull_debian

DEB822 = """\
# the machine's own
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
# a comment inside a paragraph
Components: main contrib
Signed-By: /usr/share/keyrings/k.gpg

Types: deb
URIs: http://mirror.example/off
Suites: sid
Components: main
Enabled: no

Types: deb-src
URIs: http://mirror.example/source
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb http://mirror.example/commented bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib # why
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/security bookworm-security main
nonsense
"""


def test_deb822_sources() -> None:
    assert list(parse_deb822(DEB822)) == [
        Source(
            ("http://mirror.example/debian",),
            ("bookworm", "bookworm-updates"),
            ("main", "contrib"),
            (("Signed-By", "/usr/share/keyrings/k.gpg"),),
        )
    ]


def test_one_line_sources() -> None:
    assert list(parse_one_line(ONE_LINE)) == [
        Source(
            ("http://mirror.example/debian",), ("bookworm",), ("main", "contrib"), (("Signed-By", "/k.gpg"),)
        ),
        Source(("http://mirror.example/security",), ("bookworm-security",), ("main",)),
    ]


def test_a_source_survives_being_written() -> None:
    source = next(parse_deb822(DEB822))
    assert list(parse_deb822(source.deb822())) == [source]


def fake_tools(directory: Path, **scripts: str) -> None:
    for name in ("apt-get", "apt-cache", "dpkg-deb", "apt-config"):
        path = directory / name
        path.write_text("#!/bin/sh\n" + scripts.get(name.replace("-", "_"), "exit 1") + "\n")
        path.chmod(0o755)


LISTED = "case \"$*\" in *pkgnames*) printf '%s\\n' linux-image-6.1.0-9-cloud-amd64 \\\n"
LISTED += "linux-image-6.1.0-10-cloud-amd64 \\\n"
LISTED += "linux-image-6.1.0-11-cloud-amd64-unsigned linux-image-6.1.0-12-cloud-amd64;;\n"
LISTED += "*0-12-*) ;;\n"  # only mentioned: cannot be had
LISTED += "*show*) printf 'Version: 7\\nSize: 5\\nFilename: x.deb\\n';; esac"


def test_the_newest_package_that_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    fake_tools(tools, apt_cache=LISTED, apt_get='[ "$PWD" = / ] || printf 12345 > p_7.deb')
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    steps: list[str] = []
    apt = Apt(tmp_path, lambda step, done, total: steps.append(step))
    pattern = re.compile(r"linux-image-6\.1\.\d+[-+~.\w]*?-cloud-amd64")
    [(package, deb)] = apt.fetch({"kernel": pattern}, (), tmp_path / "debs")
    assert package == Package("linux-image-6.1.0-10-cloud-amd64", "7", 5)
    assert deb.read_bytes() == b"12345"
    assert "fetching linux-image-6.1.0-10-cloud-amd64" in steps


@pytest.mark.parametrize("missing", ["apt-get", "apt-cache", "dpkg-deb"])
def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(apt_module.shutil, "which", lambda name: None if name == missing else f"/{name}")
    with pytest.raises(FetchError, match=missing):
        Apt(tmp_path)


def test_without_a_network_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    fake_tools(
        tools, apt_cache="exit 0", apt_get="echo \"E: Temporary failure resolving 'mirror'\" >&2; exit 100"
    )
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    cache = ImageCache(tmp_path / "cache")
    with pytest.raises(FetchError) as caught:
        pull_debian("6.1", cache)
    message = str(caught.value)
    assert "Temporary failure resolving" in message
    assert "ringzero run --kernel" in message
    assert "ringzero run hello" in message
    assert cache.names() == []
    assert [path.name for path in cache.root.iterdir()] == ["lock"]  # nothing half-done is left


def test_the_hosts_own_kernel_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringzero.images import debian_build

    monkeypatch.setattr(debian_build, "host_kernel", lambda: Path("/boot/vmlinuz-9.9"))
    assert "ringzero run --kernel /boot/vmlinuz-9.9" in debian_build._without_network()
