"""Where a figure comes from: one line for every report of recipes, studies and benchmarks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from msign_lightning import __version__


def provenance(accelerator: str | None = None) -> str:
    """Version and commit of this package, date in UTC, versions of Python and PyTorch, processor.

    Args:
        accelerator: Name of the GPU or the like on which was computed; None for the processor alone.
    """
    # An imported PyTorch knows the CUDA that it was built for; importing it takes a second.
    torch = sys.modules["torch"].__version__ if "torch" in sys.modules else version("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = [
        f"msign-lightning {__version__}",
        f"commit {commit()}",
        f"{datetime.now(timezone.utc):%Y-%m-%d}",
        f"Python {platform.python_version()}",
        f"torch {torch}",
        *([] if accelerator is None else [accelerator]),
        f"{processor()} ({cores} core{'s' * (cores > 1)})",
    ]
    return ", ".join(facts)


def commit() -> str:
    """The commit of the checkout that this file belongs to, and whether files differ from it; "none" if installed."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", here.parent, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.decode().strip()

    # An environment may lie in somebody else's repository, which does not hold this file.
    if (
        git("ls-files", "--error-unmatch", here.name) is None
        or (head := git("rev-parse", "--short=10", "HEAD")) is None
    ):
        return "none"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{head} with changes" if changed else head


def processor() -> str:
    """The model of the processor as the system names it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), "") or platform.processor() or platform.machine()
