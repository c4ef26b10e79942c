"""Files of a guest: the real agent, as a process of this host, and archives that a hostile one might send."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringzero.errors import GuestError
from ringzero.machine import tar
from ringzero.machine.drive import Driven

from .agents import agent_here


@pytest.fixture(scope="module")
def here() -> Iterator[Driven]:
    with agent_here() as driven:
        yield driven


def make_tree(root: Path) -> Path:
    (root / "deep" / ("long" * 40) / "folder").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "deep" / "program").write_bytes(b"\x7fELF" * 1000)
    (root / "deep" / "program").chmod(0o750)
    (root / "deep" / ("long" * 40) / "folder" / "f").write_text("x")
    (root / "none").write_bytes(b"")
    (root / "of a block").write_bytes(b"b" * 512)
    (root / "odd \u00e4\udcff\nname").write_bytes(os.urandom(100_001))
    (root / "link").symlink_to("deep/program")
    (root / "dangling").symlink_to("/" + "nowhere" * 30)
    os.utime(root / "none", ns=(1, 1_234_567_890_123_456_789))
    os.utime(root / "dangling", ns=(1, -250_000_000), follow_symlinks=False)
    os.utime(root / "deep", ns=(1, 987_654_321_000_000_001))
    (root / "empty").chmod(0o511)
    return root


def described(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in [root, *root.rglob("*")]:
        facts = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mode = None if path.is_symlink() else facts.st_mode
        found[str(path.relative_to(root))] = (mode, facts.st_mtime_ns, content)
    return found


def test_a_tree_there_and_back(here: Driven, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    told: list[tuple[str, int]] = []
    here.files.put(tree, tmp_path / "there", progress=lambda name, size: told.append((name, size)))
    assert described(tmp_path / "there") == described(tree)
    assert sum(size for _, size in told) == sum(
        path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink()
    )
    here.files.get(tmp_path / "there", tmp_path / "back")
    assert described(tmp_path / "back") == described(tree)
    # Once more, over what is there: files are replaced, folders joined.
    (tmp_path / "back" / "none").write_text("other")
    (tmp_path / "back" / "of mine").write_text("stays")
    here.files.get(tmp_path / "there", tmp_path / "back")
    assert (tmp_path / "back" / "none").read_bytes() == b""
    assert (tmp_path / "back" / "of mine").read_text() == "stays"
    here.path(tmp_path / "there").rmtree()
    assert not (tmp_path / "there").exists()
    assert (tmp_path / "tree" / "deep" / "program").exists()


def test_one_file_there_and_back(here: Driven, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1_000_000))
    (tmp_path / "file").chmod(0o700)
    here.files.put(tmp_path / "file", tmp_path / "there")
    here.files.get(tmp_path / "there", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
    assert (tmp_path / "back").stat().st_mode == (tmp_path / "file").stat().st_mode
    (tmp_path / "link").symlink_to("there")
    here.files.get(tmp_path / "link", tmp_path / "followed")
    assert not (tmp_path / "followed").is_symlink()
    here.files.get("/proc/self/status", tmp_path / "status")
    assert b"Name:" in (tmp_path / "status").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back",
        "file",
        "followed",
        "link",
        "status",
        "there",
    ]


@pytest.mark.parametrize(
    ("what", "error", "path"),
    [
        (lambda files, tmp: files.get("/nonesuch", tmp / "x"), FileNotFoundError, "/nonesuch"),
        (lambda files, tmp: files.get("/dev/null", tmp / "x"), OSError, "/dev/null"),
        (lambda files, tmp: files.put(tmp / "nonesuch", "/tmp"), FileNotFoundError, "nonesuch"),
        (lambda files, tmp: files.put("/etc/hostname", tmp / "no" / "where"), FileNotFoundError, "no/where"),
        (lambda files, tmp: files.put("/etc/hostname", tmp), IsADirectoryError, ""),
        (lambda files, tmp: files.read_bytes(tmp), IsADirectoryError, ""),
        (lambda files, tmp: files.read_bytes("/etc/hostname/x"), NotADirectoryError, "/etc/hostname/x"),
        (lambda files, tmp: files.write_bytes(tmp / "no" / "where", b"x"), FileNotFoundError, "no/where"),
        (lambda files, tmp: files.path(tmp / "no").unlink(), FileNotFoundError, "no"),
        (lambda files, tmp: files.path(tmp).mkdir(), FileExistsError, ""),
        (lambda files, tmp: files.call("nonesuch", "x"), OSError, "nonesuch"),
        (lambda files, tmp: files.path("/" + "x" * 300).stat(), OSError, "xxx"),
    ],
)
def test_what_the_guest_refuses_is_what_it_would_be_here(
    here: Driven, tmp_path: Path, what: Callable, error: type[OSError], path: str
) -> None:
    with pytest.raises(error) as caught:
        what(here.files, tmp_path)
    assert path in str(caught.value.filename)
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_as_pathlib_has_it(here: Driven, tmp_path: Path) -> None:
    path = here.path(tmp_path) / "a" / "b"
    path.mkdir(parents=True)
    path.mkdir(exist_ok=True)
    file = path / "f.txt"
    assert (file.name, file.stem, file.suffix, file.parent) == ("f.txt", "f", ".txt", path)
    assert not file.exists()
    assert file.write_text("h\u00e4\r\n") == 4
    assert file.read_bytes() == "h\u00e4\r\n".encode()
    assert file.read_text() == "h\u00e4\n"
    file.chmod(0o640)
    assert file.write_bytes(b"again") == 5
    ours, theirs = os.stat(str(file)), file.stat()
    for name in (*(name for name in dir(ours) if name.startswith("st_") and hasattr(theirs, name)),):
        if name not in ("st_blksize", "st_blocks", "st_rdev"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.st_mode & 0o777 == 0o640
    (path / "link").symlink_to("f.txt")
    assert (path / "link").is_symlink()
    assert (path / "link").is_file()
    assert str((path / "link").readlink()) == "f.txt"
    (path / "link").write_text("through")
    assert (path / "link").is_symlink()
    assert file.read_text() == "through"
    (path / "hard").hardlink_to(file)
    assert (path / "hard").stat().st_nlink == 2
    assert sorted(one.name for one in path.iterdir()) == ["f.txt", "hard", "link"]
    file.utime(ns=(5, -1_500_000_000))
    assert file.stat().st_mtime_ns == -1_500_000_000
    file.touch()
    assert file.stat().st_mtime_ns > 0
    assert file.rename(path / "g") == path / "g"
    (path / "g").unlink()
    (path / "g").unlink(missing_ok=True)
    assert path.is_dir()
    path.parent.rmtree()
    assert not path.parent.exists()


def test_writing_in_place_where_no_file_can_be_made(here: Driven, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    here.path(tmp_path / "pipe").write_bytes(b"through a pipe")
    reader.join(20)
    assert got == [b"through a pipe"]


def test_what_is_cut_off_leaves_nothing_behind(here: Driven, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(1_000_000))

    def cut(_name: str, _size: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "there").write_text("before")
    for go in (here.files.put, here.files.get):
        with pytest.raises(KeyboardInterrupt):
            go(source, tmp_path / "there", progress=cut)
        assert (tmp_path / "there").read_text() == "before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "there"]
    assert here.run(["true"]).returncode == 0


# --- archives that a hostile agent sends


def member(name: str, kind: str = "0", content: bytes = b"", link: str = "") -> bytes:
    one = tar.Member(name, kind, 0o644, len(content), 0, link)
    return tar._head(one) + content + bytes(-len(content) % 512)


END = bytes(1024)
FOLDER = member(".", "5")


def unpacked(data: bytes, target: Path) -> None:
    pieces = memoryview(data)

    def read(size: int) -> bytes:
        nonlocal pieces
        data, pieces = bytes(pieces[:size]), pieces[size:]
        return data

    tar.unpack(tar.Reader(read), target)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        END,
        b"x" * 2048,
        member("other") + END,
        FOLDER + member("../out", content=b"x") + END,
        FOLDER + member("/tmp/ringzero-out", content=b"x") + END,
        FOLDER + member("a/../../out", content=b"x") + END,
        FOLDER + member("a//b", content=b"x") + END,
        FOLDER + member("a\0b" + "c" * 100, content=b"x") + END,
        FOLDER + member("link", "2", link="..") + member("link/out", content=b"x") + END,
        FOLDER + member("link", "2", link="..") + member("link", "5") + END,
        FOLDER + member("out", "1", link="/etc/passwd") + END,
        FOLDER + member("device", "3") + END,
        FOLDER + member("short", content=b"x" * 1000)[:-1],
        FOLDER + tar._block(b"x", 0, 1 << 30, 0, b"", b"") + bytes(4096),
        FOLDER + tar._block(b"x", 0, 10, 0, b"", b"") + b"999 a=b\nxx" + bytes(502) + END,
        FOLDER + tar._block(b"x", 0, 10, 0, b"", b"") + b"x" * 512 + END,
        FOLDER + bytearray(tar._block(b"0", 0, 0, 0, b"name", b"")).replace(b"name", b"eman2") + END,
        member(".", "0", b"one") + member("two") + END,
        member(".", "2", link="x") + member("x/y") + END,
    ],
)
def test_an_archive_that_would_do_harm_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises((GuestError, OSError)):
        unpacked(bytes(data), tmp_path / "in" / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert {path.name for path in (tmp_path / "in").iterdir()} <= {"target"}
    assert not Path("/tmp/ringzero-out").exists()


def test_set_user_bits_stay_in_the_guest(tmp_path: Path) -> None:
    head = tar._head(tar.Member(".", "0", 0o6755, 1, 0))
    unpacked(head + b"x" + bytes(511) + END, tmp_path / "program")
    assert (tmp_path / "program").stat().st_mode & 0o7777 == 0o755


def test_an_archive_that_would_do_harm_is_refused_by_the_agent(here: Driven, tmp_path: Path) -> None:
    for bad in (member("../out", content=b"x"), member("/tmp/ringzero-out"), member("d", "3"), b"x" * 512):
        with pytest.raises(OSError):
            here.files._stream_in(["put", str(tmp_path / "target")], [FOLDER, bad, END])
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert list((tmp_path / "target").iterdir()) == []
