"""The cache: what is whole is found, what is damaged is not, and nobody sees half an image."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from ringzero.errors import FetchError, InputError
from ringzero.images.cache import MANIFEST, ImageCache, cache_root


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    made = ImageCache(tmp_path / "ringzero")
    with made.locked(), made.writing("debian-6.1", {"package": "1.0"}) as directory:
        (directory / "vmlinuz").write_bytes(b"kernel" * 1000)
        (directory / "initrd").write_bytes(b"initrd" * 1000)
    return made


def test_what_was_written_is_found(cache: ImageCache) -> None:
    files = cache.find("debian-6.1", thorough=True)
    assert files is not None
    assert files["vmlinuz"].read_bytes() == b"kernel" * 1000
    assert cache.names() == ["debian-6.1"]
    manifest = cache.manifest("debian-6.1")
    assert manifest is not None
    assert manifest.made_from == {"package": "1.0"}


def test_a_changed_byte_is_damage(cache: ImageCache) -> None:
    path = cache.root / "debian-6.1" / "vmlinuz"
    path.write_bytes(b"Kernel" + path.read_bytes()[6:])
    assert cache.find("debian-6.1") is None


def test_a_changed_byte_behind_an_old_time_is_seen_when_it_is_read(cache: ImageCache) -> None:
    path = cache.root / "debian-6.1" / "vmlinuz"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"K")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.find("debian-6.1", thorough=True) is None


def test_a_new_time_alone_is_no_damage(cache: ImageCache) -> None:
    os.utime(cache.root / "debian-6.1" / "vmlinuz")
    assert cache.find("debian-6.1") is not None


@pytest.mark.parametrize("part", ["vmlinuz", "initrd", MANIFEST])
def test_a_missing_file_is_damage(cache: ImageCache, part: str) -> None:
    (cache.root / "debian-6.1" / part).unlink()
    assert cache.find("debian-6.1") is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "image": "x", "made_from": 3, "files": {}}']
)
def test_a_manifest_that_is_none_is_damage(cache: ImageCache, text: str) -> None:
    (cache.root / "debian-6.1" / MANIFEST).write_text(text)
    assert cache.find("debian-6.1") is None


def test_another_format_is_built_again(cache: ImageCache) -> None:
    path = cache.root / "debian-6.1" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    assert cache.find("debian-6.1") is None


def test_a_failure_leaves_the_old_image(cache: ImageCache) -> None:
    with pytest.raises(RuntimeError), cache.locked(), cache.writing("debian-6.1", {}) as directory:
        (directory / "vmlinuz").write_bytes(b"half")
        raise RuntimeError
    files = cache.find("debian-6.1", thorough=True)
    assert files is not None
    assert files["vmlinuz"].read_bytes() == b"kernel" * 1000
    assert [path.name for path in cache.root.iterdir()] == ["debian-6.1", "lock"] or sorted(
        path.name for path in cache.root.iterdir()
    ) == ["debian-6.1", "lock"]


def _hold(root: Path, held, release) -> None:
    with ImageCache(root).locked():
        held.set()
        release.wait(30)


def test_two_pulls_wait_for_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    try:
        assert held.wait(30)

        class Waiting:
            def __enter__(self) -> None:
                release.set()  # only now does the other let go: whoever is here was really kept waiting

            def __exit__(self, *_: object) -> None:
                pass

        with ImageCache(tmp_path).locked(waiting=Waiting()):
            assert release.is_set()
    finally:
        release.set()
        other.join(30)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="XDG_CACHE_HOME"), ImageCache(tmp_path / "file" / "x").locked():
        pass


def test_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "ringzero"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root() == Path("/home/someone/.cache/ringzero")


def test_a_name_that_is_no_image() -> None:
    from ringzero.images import resolve

    with pytest.raises(InputError, match="did you mean 'debian'"):
        resolve("debain")
    with pytest.raises(InputError, match="hello"):
        resolve("hello:3")
    assert resolve("debian:6.12") == ("debian", "6.12")
