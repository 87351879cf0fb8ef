"""Where trials are kept: an Optuna journal file or a database, opened with clear errors."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

JOURNAL = "journal.log"
_JOURNAL_BEGINS = b'{"op_code"'


class StorageError(RuntimeError):
    """A storage can't be used, or no longer; what was finished stays in it."""


@contextmanager
def opened(storage: str | None, folder: Path) -> Iterator[tuple[BaseStorage, bool]]:
    """A storage to write to.

    A local file (a journal or SQLite's) is locked until the end of the context or of the process, however that ends. A
    last line that a killed process or a full disk left unfinished is cut off.

    Args:
        storage: The path of a journal, the URL of a database (postgresql+psycopg://…), or None for a journal in the
            folder.
        folder: The folder of the study's files.

    Yields:
        The storage, and whether this process alone can write to it.

    Raises:
        StorageError: The storage can't be reached or written to, is no journal, or another process has it; or what it
            is used for in the context fails.
    """
    with _explained(storage, folder):
        file = _file(storage, folder)
        if file is None:
            with _connected(storage, folder) as backend:
                yield backend, False
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"storage {file} is in use by another process; several may share a database such as PostgreSQL"
                ) from error
            if not _is_url(storage):
                _mend(file)
            with _connected(storage, folder) as backend:
                yield backend, True


@contextmanager
def reading(storage: str | None, folder: Path) -> Iterator[BaseStorage]:
    """A storage as in `opened`, which must exist, to read from.

    Raises:
        StorageError: It does not exist, can't be reached or is no journal.
    """
    with _explained(storage, folder):
        file = _file(storage, folder)
        if file is not None and not file.exists():
            raise StorageError(f"storage {file} does not exist: nothing has been run")
        with _connected(storage, folder) as backend:
            yield backend


@contextmanager
def _connected(storage: str | None, folder: Path) -> Iterator[BaseStorage]:
    if storage is None or not _is_url(storage):
        file = _file(storage, folder)
        try:
            journal = JournalStorage(JournalFileBackend(str(file)))
        except (ValueError, KeyError) as error:
            raise StorageError(f"storage {file} is no journal of Optuna, or is damaged: {error}") from error
        yield journal
        return
    database = _database(storage)
    try:
        yield database
    finally:
        database.remove_session()
        database.engine.dispose()


def _database(url: str) -> RDBStorage:
    for _ in range(3):
        with suppress(IntegrityError, ProgrammingError):  # another parent makes the tables at the same moment
            RDBStorage(url, {"poolclass": NullPool})  # which leaves no connection behind when it fails
            break
        time.sleep(0.5)
    return RDBStorage(url, {"pool_pre_ping": True})


@contextmanager
def _explained(storage: str | None, folder: Path) -> Iterator[None]:
    """Turns what operating system, database driver and Optuna raise into a `StorageError`."""
    try:
        yield
    except (OSError, SQLAlchemyError, StorageInternalError, ImportError) as error:
        name = make_url(storage).render_as_string() if storage and _is_url(storage) else _file(storage, folder)
        cause = error.__cause__ or error
        reason = str(cause).strip().partition("\n")[0]
        raise StorageError(f"storage {name} can't be used: {reason}") from error


def _is_url(storage: str | None) -> bool:
    return storage is not None and "://" in storage


def _file(storage: str | None, folder: Path) -> Path | None:
    """The local file, if it is one."""
    if storage is None:
        return folder / JOURNAL
    if not _is_url(storage):
        return Path(storage)
    try:
        url = make_url(storage)
    except (SQLAlchemyError, ValueError) as error:
        raise StorageError("storage must be the path of a journal or the URL of a database, got neither") from error
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _mend(journal: Path) -> None:
    """Cuts off an unfinished last line, where Optuna would write on, and removes Optuna's lock of a dead process."""
    content = journal.read_bytes()
    if not (content.startswith(_JOURNAL_BEGINS) or _JOURNAL_BEGINS.startswith(content)):
        raise StorageError(f"storage {journal} is no journal of Optuna")
    end = content.rfind(b"\n") + 1
    try:
        for line in content[:end].splitlines()[-1:]:  # Optuna would forgive it, and write on
            json.loads(line)
    except ValueError as error:
        raise StorageError(f"storage {journal} is damaged at its end: {error}") from error
    os.truncate(journal, end)
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
