"""Shared set-up.

GPU tests are deselected where there is no GPU, so that a green run never hides a skipped one; what imports
Composer is not collected where that is not installed. Tests compute with one thread: tiny matrices gain nothing from
more, and several processes would fight for the cores.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from tests.support import PATIENCE

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what Lightning calls of it
torch.set_num_threads(1)

OF_COMPOSER = ("algorithms", "composer_suite", "spike_no_more_composer", "stability_monitor_composer")
collect_ignore = [] if importlib.util.find_spec("composer") else [f"test_{name}.py" for name in OF_COMPOSER]
collect_ignore += [] if importlib.util.find_spec("ray") else ["test_ablations_cluster.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server, Debian's package, on a folder of its own, as which root can't run it: address, control."""
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: no initdb")
    binaries = Path(found).parent
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    as_postgres = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        as_postgres = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program, *arguments):
        # Into a file: the server keeps what it inherits open.
        with (folder.parent / f"{folder.name}.log").open("ab") as log:
            command = [*as_postgres, str(binaries / program), "-D", str(folder / "data"), *arguments]
            subprocess.run(command, cwd="/", check=True, stdout=log, stderr=log, timeout=PATIENCE)

    call("initdb", "--username=optuna", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
    start = ("-o", f"-F -p {port} -k {folder} -c listen_addresses=127.0.0.1", "start")

    def control(*arguments):
        call("pg_ctl", "-w", *(start if arguments == ("start",) else arguments))

    control("start")
    yield f"127.0.0.1:{port}", control
    control("-m", "immediate", "stop")
    shutil.rmtree(folder)
    (folder.parent / f"{folder.name}.log").unlink()


@pytest.fixture
def database(server, request):
    """URL of an empty database."""
    import psycopg  # of PostgreSQL alone

    name = re.sub(r"\W", "_", request.node.name).lower()
    address, _ = server
    with psycopg.connect(f"postgresql://optuna@{address}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"postgresql+psycopg://optuna@{address}/{name}"
