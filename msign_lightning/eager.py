"""Compiled models run uncompiled, for as long as someone wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_stance = ExitStack()
_inside = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled code runs uncompiled within, so that forward hooks are called; no graph is compiled anew.

    `torch.compiler.set_stance` puts back what it found, so two that overlap must end in reverse order. These may end in
    any order, as hooks do which are armed and disarmed one by one.
    """
    global _inside
    if not _inside:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            _stance.close()
