"""Images of disks: chains that are refused, and what `ringzero image` does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ringzero import _core
from ringzero._core import CoreError
from ringzero.cli import run_command
from ringzero.errors import InputError
from ringzero.machine.chain import chain
from ringzero.machine.disk import Disk

MIB = 1 << 20


def image(path: Path, backing: str | None = None, backing_format: str = "raw", size: int = MIB) -> Path:
    _core.image_create(str(path), size, backing=(backing, backing_format) if backing is not None else None)
    return path


def names(links: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(os.path.basename(path), image_format) for path, image_format in links]


def test_a_chain_is_followed_as_the_images_name_it(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    image(tmp_path / "middle.qcow2", "base.raw")
    top = image(tmp_path / "top.qcow2", "middle.qcow2", "qcow2")
    expected = [("top.qcow2", "qcow2"), ("middle.qcow2", "qcow2"), ("base.raw", "raw")]
    assert names(chain(top)) == expected
    assert names(Disk.parse(f"{top},ro").files()) == expected
    Disk.parse(top).device(1)


def test_a_format_is_never_guessed_from_what_is_in_a_file(tmp_path: Path) -> None:
    hostile = image(tmp_path / "guest.img", "/etc/shadow")
    # By its name it is a raw file, whatever a guest wrote there.
    assert chain(hostile) == [(str(hostile), "raw")]
    with pytest.raises(InputError, match="outside its folder"):
        chain(hostile, "qcow2")
    with pytest.raises(CoreError, match="not a qcow2 image"):
        (tmp_path / "no.qcow2").write_bytes(bytes(MIB))
        Disk.parse(tmp_path / "no.qcow2").device(1)


@pytest.mark.parametrize("name", ["/etc/shadow", "../outside", "link", "nbd://host/disk", "json:{}"])
def test_what_lies_elsewhere_is_refused_unless_it_is_allowed(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(MIB))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    disk = image(folder / "disk.qcow2", name)
    with pytest.raises(InputError, match=r"outside its folder.*backing=|no file: not supported"):
        Disk.parse(disk).device(1)
    if name in ("../outside", "link"):
        assert len(Disk.parse(f"{disk},backing={outside}").files()) == 2
        assert len(Disk.parse(f"{disk},backing={tmp_path}").files()) == 2


def test_loops_and_holes_in_a_chain(tmp_path: Path) -> None:
    first = image(tmp_path / "first.qcow2", "second.qcow2", "qcow2")
    with pytest.raises(InputError, match=r"second.qcow2 is not a file"):
        chain(first)
    image(tmp_path / "second.qcow2", "first.qcow2", "qcow2")
    with pytest.raises(InputError, match="behind itself"):
        chain(first)
    itself = image(tmp_path / "itself.qcow2", "itself.qcow2", "qcow2")
    with pytest.raises(InputError, match="behind itself"):
        chain(itself)
    odd = image(tmp_path / "odd.qcow2", "first.qcow2", "vmdk")
    with pytest.raises(InputError, match="format 'vmdk'"):
        chain(odd)


def test_the_core_opens_no_file_that_it_was_not_given(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk.qcow2", "/etc/shadow")
    with pytest.raises(CoreError, match="backing file /etc/shadow, which was not given"):
        _core.Disk(str(disk), format="qcow2")


def test_an_overlay_is_made_once_and_belongs_to_its_base(tmp_path: Path) -> None:
    base, other = tmp_path / "base.raw", tmp_path / "other.raw"
    base.write_bytes(bytes(MIB))
    other.write_bytes(bytes(MIB))
    overlay = tmp_path / "elsewhere" / "work.qcow2"
    overlay.parent.mkdir()
    disk = Disk.parse(f"{base},overlay={overlay}")
    assert names(disk.files()) == [("work.qcow2", "qcow2"), ("base.raw", "raw")]
    first = overlay.stat().st_ino
    disk.device(1)
    disk.device(1)
    assert overlay.stat().st_ino == first
    with pytest.raises(InputError, match=r"not one of .*other.raw"):
        Disk.parse(f"{other},overlay={overlay}").files()
    # Several machines at once, each with its own.
    machines = [Disk.parse(f"{base},overlay").device(1) for _ in range(2)]
    assert len(machines) == 2
    with pytest.raises(InputError, match="needs no overlay"):
        Disk.parse(f"{base},ro,overlay")


def test_two_writers_of_one_image_are_one_too_many(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk.qcow2")
    first = Disk.parse(disk).device(1)
    with pytest.raises(CoreError, match="another machine uses it"):
        Disk.parse(disk).device(1)
    del first


def run(*words: object) -> int:
    return run_command(["image", *map(str, words)])


def test_images_are_made_shown_copied_and_resized(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw, disk, back = tmp_path / "a.raw", tmp_path / "b.qcow2", tmp_path / "c.raw"
    assert run("create", raw, "4M") == 0
    content = bytearray(4 * MIB)
    content[MIB : MIB + 3] = b"abc"
    raw.write_bytes(content)
    assert run("convert", raw, disk) == 0
    assert run("resize", disk, "8M") == 0
    assert run("resize", disk, "1M") == 2
    assert "--shrink" in capfd.readouterr().err
    assert run("convert", disk, back) == 0
    assert back.read_bytes() == bytes(content) + bytes(4 * MIB)
    assert back.stat().st_blocks * 512 < MIB, "zeroes take no space"
    assert run("create", tmp_path / "over.qcow2", "--backing", disk) == 0
    capfd.readouterr()
    assert run("info", tmp_path / "over.qcow2", "--json") == 0
    rows = json.loads(capfd.readouterr().out)
    assert [(row["format"], row["size"]) for row in rows] == [("qcow2", 8 * MIB)] * 2
    assert run("info", disk) == 0
    assert "8M" in capfd.readouterr().out
    for words, complaint in [
        (["create", disk, "1M"], "there already"),
        (["create", tmp_path / "x"], "how large"),
        (["create", tmp_path / "x", "100"], "multiple of 512"),
        (["info", tmp_path / "x"], "no image"),
        (["commit", disk], "nothing behind it"),
        (["snapshot", raw], "raw file"),
        (["snapshot", disk, "create"], "which snapshot"),
        (["convert", disk, tmp_path / "x", "--to", "vdi"], "no format 'vdi'"),
    ]:
        assert run(*words) == 2
        assert complaint in capfd.readouterr().err


def test_snapshots_and_commits_by_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, work = tmp_path / "base.qcow2", tmp_path / "work.qcow2"
    assert run("create", base, "4M") == run("create", work, "--backing", base) == 0
    assert run("snapshot", base, "create", "clean") == 0
    capfd.readouterr()
    assert run("snapshot", base) == 0
    assert capfd.readouterr().out.startswith("clean\t20")
    assert run("snapshot", base, "apply", "dirty") == 2
    assert "no snapshot" in capfd.readouterr().err
    assert run("snapshot", base, "apply", "clean") == run("snapshot", base, "delete", "clean") == 0
    assert run("commit", work) == 0
    assert run("check", base) == run("check", work) == 0
    if program := shutil.which("qemu-img"):
        for path in (base, work):
            subprocess.run([program, "check", path], check=True, capture_output=True)


def test_a_damaged_image_is_one_sentence_and_its_counts_are_repaired(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = image(tmp_path / "disk.qcow2")
    content = bytearray(disk.read_bytes())
    content[(2 << 16) + 2 * 200 + 1] = 1  # a cluster that is counted, and nobody uses
    disk.write_bytes(content)
    assert run("check", disk) == 3
    content[(2 << 16) + 1] = 0  # the header's own
    disk.write_bytes(content)
    assert run("check", disk) == 1
    assert "not counted" in capfd.readouterr().err
    assert run("check", disk, "--repair") == 0
    assert run("check", disk) == 0
    content[20:24] = b"\0\0\0\x40"
    disk.write_bytes(content)
    capfd.readouterr()
    assert run("check", disk) == 2
    message = capfd.readouterr().err
    assert "damaged" in message and message.count("\n") == 1


def test_a_copy_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk.qcow2", size=64 * MIB)

    def stop(done: int, total: int) -> None:
        assert total == 64 * MIB
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _core.image_convert([(str(disk), "qcow2")], str(tmp_path / "to.raw"), "raw", progress=stop)
    assert not (tmp_path / "to.raw").exists()
