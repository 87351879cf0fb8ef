"""Where trials are kept: an Optuna journal file or a database, opened with clear errors."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

JOURNAL = "journal.log"
PATIENCE = 600.0  # seconds for which a database server is asked again that has stopped answering
_JOURNAL_BEGINS = b'{"op_code"'
_log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """A storage can't be used, or no longer; what was finished stays in it."""


@contextmanager
def opened(storage: str | None, folder: Path) -> Iterator[tuple[BaseStorage, bool]]:
    """A storage to write to.

    A local file (a journal or SQLite's) is locked until the end of the context or of the process, however that ends. A
    last line that a killed process or a full disk left unfinished is cut off.

    Args:
        storage: Path of a journal, URL of a database (postgresql+psycopg://…), or None for a journal in the folder.
        folder: The folder of the study's files.

    Yields:
        The storage, and whether this process alone can write to it.

    Raises:
        StorageError: The storage can't be reached or written to, is no journal, or another process has it; or what it
            is used for in the context fails. A database server that has answered before is given ten minutes.
    """
    url, file = _parse(storage, folder)
    with _explained(url, file), ExitStack() as stack:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                fcntl.flock(stack.enter_context(file.open("ab")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                rule = "several may share a database such as PostgreSQL"
                raise StorageError(f"storage {file} is in use by another process; {rule}") from error
            if url is None:
                _mend(file)
        yield stack.enter_context(_connected(url, file)), file is not None


@contextmanager
def reading(storage: str | None, folder: Path) -> Iterator[BaseStorage]:
    """A storage as in `opened`, which must exist, to read from.

    Raises:
        StorageError: It does not exist, can't be reached or is no journal.
    """
    url, file = _parse(storage, folder)
    with _explained(url, file):
        if file is not None and not file.exists():
            raise StorageError(f"storage {file} does not exist: nothing has been run")
        with _connected(url, file) as backend:
            yield backend


def _parse(storage: str | None, folder: Path) -> tuple[URL | None, Path | None]:
    """The URL if the storage is a database, and its local file if it has one."""
    if storage is None or "://" not in storage:
        return None, Path(storage or folder / JOURNAL)
    try:
        url = make_url(storage)
    except (SQLAlchemyError, ValueError) as error:
        raise StorageError("storage must be the path of a journal or the URL of a database, got neither") from error
    return url, Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


@contextmanager
def _explained(url: URL | None, file: Path | None) -> Iterator[None]:
    """Turns what operating system, database driver and Optuna raise into a `StorageError`."""
    try:
        yield
    except (OSError, SQLAlchemyError, StorageInternalError, ImportError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise StorageError(f"storage {url.render_as_string() if url else file} can't be used: {reason}") from error


class _Server(RDBStorage):
    """A database on a server, which is asked again, after growing pauses, while it does not answer: as it restarts.

    What is written may be written twice then: a trial that no parent knows of.
    """

    _silent_since: float | None = None


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def ask(self: _Server, *args: Any, **kwargs: Any) -> Any:
        pause = 0.1
        while True:
            try:
                answer = method(self, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                reason = error.__cause__ or error
                began = self._silent_since or time.monotonic()
                if not isinstance(reason, OperationalError) or time.monotonic() - began > PATIENCE:
                    raise
                if self._silent_since is None:
                    told = str(reason).partition("\n")[0]
                    _log.warning("storage does not answer, and is asked again for %g s: %s", PATIENCE, told)
                self._silent_since = began
                time.sleep(pause)
                pause = min(2 * pause, 10.0)
            else:
                self._silent_since = None
                return answer

    return ask


for _name in (*BaseStorage.__abstractmethods__, "_get_trials", "_create_new_trial", "_set_trial_param"):
    setattr(_Server, _name, _patient(getattr(RDBStorage, _name)))


@contextmanager
def _connected(url: URL | None, file: Path | None) -> Iterator[BaseStorage]:
    if url is None:
        try:
            journal = JournalStorage(JournalFileBackend(str(file)))
        except (ValueError, KeyError) as error:
            raise StorageError(f"storage {file} is no journal of Optuna, or is damaged: {error}") from error
        yield journal
        return
    address = url.render_as_string(hide_password=False)
    for _ in range(3):
        with suppress(IntegrityError, ProgrammingError):  # another parent makes the tables at the same moment
            RDBStorage(address, {"poolclass": NullPool})  # which leaves no connection behind when it fails
            break
        time.sleep(0.5)
    database = (_Server if file is None else RDBStorage)(address, {"pool_pre_ping": True})
    try:
        yield database
    finally:
        database.remove_session()
        database.engine.dispose()


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
