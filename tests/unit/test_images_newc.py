"""The newc writer, judged by GNU cpio where the host has it, and by the format's own rules."""

import io
import shutil
import stat
import subprocess

import pytest

from ringzero.images.newc import NewcWriter


def written(fill) -> bytes:
    out = io.BytesIO()
    with NewcWriter(out) as archive:
        fill(archive)
    return out.getvalue()


def entries(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """Read an archive back: (name, mode, contents, device), the trailer last."""
    found, at = [], 0
    while at < len(data):
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) & ~3
        found.append((name, fields[1], data[start : start + fields[6]], (fields[9], fields[10])))
        at = (start + fields[6] + 3) & ~3
    return found


def test_every_kind_of_entry_reads_back() -> None:
    def fill(archive: NewcWriter) -> None:
        archive.file("init", b"#!/bin/sh\n", 0o755)
        archive.symlink("bin/sh", "busybox")
        archive.device("dev/console", 5, 1)
        archive.device("dev/sda", 8, 0, block=True)

    found = {name: rest for name, *rest in entries(written(fill))}
    assert found["init"] == [stat.S_IFREG | 0o755, b"#!/bin/sh\n", (0, 0)]
    assert found["bin/sh"] == [stat.S_IFLNK | 0o777, b"busybox", (0, 0)]
    assert found["dev/console"] == [stat.S_IFCHR | 0o600, b"", (5, 1)]
    assert found["dev/sda"] == [stat.S_IFBLK | 0o600, b"", (8, 0)]
    assert found["bin"][0] == stat.S_IFDIR | 0o755


def test_parents_come_first_and_once() -> None:
    def fill(archive: NewcWriter) -> None:
        archive.file("a/b/c", b"1")
        archive.file("a/b/d", b"2")

    assert [name for name, *_ in entries(written(fill))] == ["a", "a/b", "a/b/c", "a/b/d", "TRAILER!!!"]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 4095, 4096])
def test_alignment_holds_for_every_size(size: int) -> None:
    data = written(lambda archive: archive.file("x" * (size % 7 + 1), bytes([7]) * size))
    assert len(data) % 4 == 0
    assert entries(data)[0][2] == bytes([7]) * size


@pytest.mark.parametrize("path", ["", "/", "../x", "a/../b", "a//b", "./a", "a\0b", "n" * 4096])
def test_names_that_could_escape_are_refused(path: str) -> None:
    with pytest.raises(ValueError), NewcWriter(io.BytesIO()) as archive:
        archive.file(path, b"")


def test_a_name_cannot_be_used_twice() -> None:
    with pytest.raises(ValueError, match="already"), NewcWriter(io.BytesIO()) as archive:
        archive.file("a", b"")
        archive.file("/a", b"")


def test_an_error_leaves_no_trailer() -> None:
    out = io.BytesIO()
    with pytest.raises(RuntimeError), NewcWriter(out) as archive:
        archive.file("a", b"")
        raise RuntimeError
    assert b"TRAILER" not in out.getvalue()


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio on this machine to compare with")
def test_gnu_cpio_agrees() -> None:
    def fill(archive: NewcWriter) -> None:
        archive.file("etc/motd", b"hello\n", 0o640)
        archive.symlink("bin/sh", "/bin/busybox")
        archive.device("dev/null", 1, 3, mode=0o666)

    listed = subprocess.run(
        ["cpio", "-itv"], input=written(fill), capture_output=True, check=True
    ).stdout.decode()
    lines = {line.split()[-1]: line for line in listed.splitlines()}
    assert lines["etc/motd"].startswith("-rw-r-----")
    assert "bin/sh -> /bin/busybox" in listed
    assert lines["dev/null"].startswith("crw-rw-rw-")
    assert "1,   3" in lines["dev/null"]
