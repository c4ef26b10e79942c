"""What the daemon keeps on disk, and what it does where it cannot."""

import sqlite3
from pathlib import Path

import pytest

from ringzero.errors import InputError
from ringzero.host.runtime import VARIABLE, Runtime, checked_name
from ringzero.host.spec import GuestSpec
from ringzero.host.state import MOST_EVENTS, State


def spec(name: str) -> GuestSpec:
    return GuestSpec.checked(name=name, memory="64M", min="16M", shares=5, group="g")


def test_vms_and_events_are_kept(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    state.add([spec("a"), spec("b")], 100.0)
    state.started("a", 4711)
    state.ended("b", "poweroff")
    state.event("started", "a", "vm 'a' is process 4711")
    state.close()
    state = State(tmp_path / "state.db")
    a, b = state.vms()
    assert (a.spec, a.pid, a.began, a.reason) == (spec("a"), 4711, 100.0, None)
    assert (b.pid, b.reason) == (None, "poweroff") and b.ended is not None
    assert [(event.kind, event.vm) for event in state.events()] == [("started", "a")]
    state.forget(["a", "b"])
    assert state.vms() == []
    state.close()


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    state.add([spec("a")], 1.0)
    (pages,) = state._base.execute("PRAGMA page_count").fetchone()
    state._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(InputError, match="make room"):
        for number in range(10_000):
            state.add([spec(f"more-{number}")], 2.0)
    # Events are told even so; that they are not kept shows in their number.
    while (event := state.event("test", None, "x" * 1000)).number:
        pass
    assert event.text == "x" * 1000
    kept = len(state.vms())
    assert kept >= 1
    state._base.execute("PRAGMA max_page_count = 100000")
    state.add([spec("last")], 3.0)
    assert len(state.vms()) == kept + 1
    state.close()


def test_all_vms_of_a_request_are_kept_or_none(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    (pages,) = state._base.execute("PRAGMA page_count").fetchone()
    state._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(InputError):
        state.add([spec(f"vm-{number}") for number in range(1000)], 2.0)
    assert state.vms() == []
    state.close()


@pytest.mark.parametrize("content", [b"no database at all" * 500, None])
def test_a_damaged_database_is_put_aside(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "state.db"
    if content is None:
        with sqlite3.connect(path) as base:
            base.execute("PRAGMA user_version = 99")
        base.close()
    else:
        path.write_bytes(content)
    state = State(path)
    assert [event.kind for event in state.events()] == ["damaged"]
    assert path.with_suffix(".damaged").exists()
    assert path.stat().st_mode & 0o077 == 0
    state.close()


def test_events_are_bounded(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    state._base.execute("BEGIN")
    rows = [(0.0, "test", None, str(number)) for number in range(MOST_EVENTS + 150)]
    state._base.executemany("INSERT INTO events (at, kind, vm, text) VALUES (?, ?, ?, ?)", rows)
    state._base.execute("COMMIT")
    for _ in range(100):
        state.event("test", None, "more")
    (count,) = state._base.execute("SELECT COUNT(*) FROM events").fetchone()
    assert count <= MOST_EVENTS + 100
    assert [event.text for event in state.events(most=2)] == ["more", "more"]
    state.close()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "a b", "a\n", "x" * 64, "-a", "\u00e4"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError):
        checked_name(name)


def test_specs_survive_json() -> None:
    assert GuestSpec.from_json(spec("a").as_json()) == spec("a")
    for wrong in (
        [],
        {},
        {"name": 3},
        {"name": "a", "memory": "x"},
        {"name": "a", "memory": True},
        {"name": "a", "shares": 0},
        {"name": "a", "cpus": "many"},
        {"name": "a", "min": "1G", "memory": "128M"},
        {"name": "a", "kernel": "relative"},
        {"name": "a", "kernel": 3},
        {"name": "a", "group": "a/b"},
        {"name": "a", "bogus": 1},
        {"name": "a", "engine": "warp"},
    ):
        with pytest.raises(InputError):
            GuestSpec.from_json(wrong)


def test_the_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    runtime = Runtime.default()
    runtime.prepare()
    assert runtime.root.stat().st_mode & 0o777 == 0o700
    held = runtime.lock()
    assert held is not None and runtime.lock() is None
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(InputError, match="alone"):
        Runtime(tmp_path / "link").prepare()
    monkeypatch.setenv(VARIABLE, "relative")
    with pytest.raises(InputError, match="absolute"):
        Runtime.default()
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert Runtime.default().root == tmp_path / "ringzero"
