"""What the daemon keeps on disk: which VMs there are, how those that ended did, and events. SQLite, one file.

It is memory of the daemon's for its next start, and nothing that a VM needs: each VM's process knows its own spec. So a
database that is full, damaged or gone costs history, and refuses new VMs while nothing can be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringzero.errors import InputError
from ringzero.host.spec import GuestSpec

__all__ = ["Event", "KnownVm", "State"]

MOST_EVENTS = 10_000
_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS vms (
    name TEXT PRIMARY KEY,
    spec TEXT NOT NULL,
    pid INTEGER,                -- NULL when it has ended
    began REAL NOT NULL,        -- seconds since 1970
    ended REAL,
    reason TEXT
);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,           -- seconds since 1970
    kind TEXT NOT NULL,
    vm TEXT,
    text TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class KnownVm:
    """A VM as the database has it; `reason` is None while it runs."""

    spec: GuestSpec
    pid: int | None
    began: float
    ended: float | None
    reason: str | None


@dataclass(frozen=True)
class Event:
    """Something that happened on the host. `at` is in seconds since 1970."""

    number: int
    at: float
    kind: str
    vm: str | None
    text: str


class State:
    """The database. Raises InputError, one sentence, where what must be kept cannot be written."""

    def __init__(self, path: Path) -> None:
        """Open the database, and make it where it is missing; one that is damaged is put aside."""
        self.path = path
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if not path.exists():
                raise InputError(f"the database {path} cannot be made: {error}") from error
            aside = path.with_suffix(".damaged")
            os.replace(path, aside)
            for rest in ("-wal", "-shm"):
                Path(f"{path}{rest}").unlink(missing_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as again:
                raise InputError(f"the database {path} cannot be made: {again}") from again
            self.event("damaged", None, f"the database was damaged ({error}); it is now {aside}")

    def _open(self) -> None:
        # Nobody else may read it: made before SQLite does.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._base = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        try:
            # Rows survive kill -9 of the daemon; a crash of the host ends all VMs anyway.
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")
            (format_found,) = self._base.execute("PRAGMA user_version").fetchone()
            if format_found not in (0, _FORMAT):
                raise sqlite3.DatabaseError(
                    f"it has format {format_found}, and this ringzero knows {_FORMAT}"
                )
            self._base.executescript(_SCHEMA)
            self._base.execute(f"PRAGMA user_version = {_FORMAT}")
        except BaseException:
            self._base.close()
            raise

    def close(self) -> None:
        """Close the database."""
        self._base.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._base.execute("ROLLBACK")
            raise InputError(
                f"the host's state cannot be written to {self.path} ({error}): make room there"
            ) from error

    def vms(self) -> list[KnownVm]:
        """Return all VMs, the oldest first. Rows that make no sense are left out."""
        found = []
        rows = self._base.execute("SELECT spec, pid, began, ended, reason FROM vms ORDER BY began, name")
        for text, pid, began, ended, reason in rows:
            with contextlib.suppress(ValueError, InputError):
                found.append(KnownVm(GuestSpec.from_json(json.loads(text)), pid, began, ended, reason))
        return found

    def add(self, specs: list[GuestSpec], began: float) -> None:
        """Keep VMs that are about to start, all of them or none."""
        with self._writing() as base:
            base.executemany(
                "INSERT OR REPLACE INTO vms (name, spec, began) VALUES (?, ?, ?)",
                [(spec.name, json.dumps(spec.as_json()), began) for spec in specs],
            )

    def started(self, name: str, pid: int) -> None:
        """Note the process of a VM."""
        with self._writing() as base:
            base.execute("UPDATE vms SET pid = ? WHERE name = ?", (pid, name))

    def ended(self, name: str, reason: str) -> None:
        """Note that a VM has ended."""
        with self._writing() as base:
            base.execute(
                "UPDATE vms SET pid = NULL, ended = ?, reason = ? WHERE name = ?", (time.time(), reason, name)
            )

    def forget(self, names: list[str]) -> None:
        """Forget VMs."""
        with self._writing() as base:
            base.executemany("DELETE FROM vms WHERE name = ?", [(name,) for name in names])

    def event(self, kind: str, vm: str | None, text: str) -> Event:
        """Keep an event; where it cannot be written it is still returned, with number 0."""
        at = time.time()
        number = 0
        with contextlib.suppress(InputError), self._writing() as base:
            cursor = base.execute(
                "INSERT INTO events (at, kind, vm, text) VALUES (?, ?, ?, ?)", (at, kind, vm, text)
            )
            number = cursor.lastrowid or 0
            if number % 100 == 0:
                base.execute("DELETE FROM events WHERE number <= ?", (number - MOST_EVENTS,))
        return Event(number, at, kind, vm, text)

    def events(self, after: int = 0, most: int = 1000) -> list[Event]:
        """Return the newest events behind number `after`, at most so many, the oldest first."""
        rows: list[Any] = self._base.execute(
            "SELECT number, at, kind, vm, text FROM events WHERE number > ? ORDER BY number DESC LIMIT ?",
            (after, most),
        ).fetchall()
        return [Event(*row) for row in reversed(rows)]
