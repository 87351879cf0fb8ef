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
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.pool import NullPool

JOURNAL = "journal.log"
PATIENCE = 600.0  # seconds for which a database server is asked again that has stopped answering
_JOURNAL_BEGINS = b'{"op_code"'
_log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """A storage can't be used, or no longer; what was finished stays in it."""


@contextmanager
def opened(
    storage: str | None, folder: Path, check: Callable[[], None] = lambda: None
) -> Iterator[tuple[BaseStorage, bool]]:
    """A storage to write to.

    A local file (a journal or SQLite's) is locked until the end of the context or of the process, however that ends. A
    last line that a killed process or a full disk left unfinished is cut off.

    Args:
        storage: Path of a journal, URL of a database (postgresql+psycopg://…), or None for a journal in the folder.
        folder: The folder of the study's files.
        check: Called now and then while a database server does not answer; what it raises ends the waiting.

    Yields:
        The storage, and whether this process alone can write to it.

    Raises:
        StorageError: The storage can't be reached or written to, is no journal, or another process has it; or what it
            is used for in the context fails. A server that has answered before is asked again for ten minutes.
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
        yield stack.enter_context(_connected(url, file, check)), file is not None


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
        with _connected(url, file, lambda: None) as backend:
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
    """A database on a server, which is asked again while it does not answer: as it restarts.

    What is written may be written twice then: a trial that no parent knows of.
    """

    def __init__(self, url: str, check: Callable[[], None]) -> None:
        self.check = check
        self.silent_since: float | None = None
        super().__init__(url, {"pool_pre_ping": True})


def _is_silent(error: BaseException | None) -> bool:
    """Whether no answer came from a server, rather than an answer that it can't."""
    if not isinstance(error, DBAPIError):  # Optuna reads again in a transaction whose connection is gone
        return isinstance(error, PendingRollbackError)
    state = getattr(error.orig, "sqlstate", None) or "08"  # of SQL: 08 and 57P are about connections
    return error.connection_invalidated or (isinstance(error, OperationalError) and state.startswith(("08", "57P")))


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def ask(self: _Server, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                answer = method(self, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                reason = error if isinstance(error, SQLAlchemyError) else error.__cause__
                if not _is_silent(reason):
                    raise
                told = f"storage {self.engine.url.render_as_string()} does not answer"
                if self.silent_since is None:
                    self.silent_since = time.monotonic()
                    _log.warning("%s and is asked again for %g s: %s", told, PATIENCE, str(reason).partition("\n")[0])
                if time.monotonic() - self.silent_since > PATIENCE:
                    raise StorageError(f"{told}; what is finished is kept: run the command again") from error
                self.check()
                time.sleep(0.5)
            else:
                self.silent_since = None
                return answer

    return ask


for _name in (*BaseStorage.__abstractmethods__, "_get_trials", "_create_new_trial", "_set_trial_param"):
    setattr(_Server, _name, _patient(getattr(RDBStorage, _name)))


@contextmanager
def _connected(url: URL | None, file: Path | None, check: Callable[[], None]) -> Iterator[BaseStorage]:
    if url is None:
        try:
            journal = JournalStorage(JournalFileBackend(str(file)))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise StorageError(f"storage {file} is no journal of Optuna, or is damaged: {error}") from error
        yield journal
        return
    address = url.render_as_string(hide_password=False)
    for _ in range(3):
        with suppress(IntegrityError, ProgrammingError):  # another parent makes the tables at the same moment
            RDBStorage(address, {"poolclass": NullPool})  # which leaves no connection behind when it fails
            break
        time.sleep(0.5)
    database = RDBStorage(address) if file is not None else _Server(address, check)
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
