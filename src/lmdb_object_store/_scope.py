"""Context managers whose end comes whatever interrupts it."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class _Exit:
    """The ``__exit__`` of `Scope`: a new object for each ``with`` statement."""

    def __get__(self, scope: Scope[Any] | None, owner: type) -> Callable[..., None]:
        if scope is None:
            return self
        leave = partial(scope._leave)
        scope._end = weakref.ref(leave, scope._forsaken)
        return leave

    def __call__(self, scope: Scope[Any], *exc: Any) -> None:
        # So does contextlib.ExitStack, which looks it up on the class.
        scope._leave(*exc)


class Scope(ABC, Generic[_T]):
    """A context manager for one use, which never stays entered.

    1. A ``with`` statement ends and calls ``__exit__``.
    2. Ctrl-C: CPython looks for signals at the start of each Python function, so
       the KeyboardInterrupt is raised before the first line of it.
    3. Nothing has ended, but the statement is left. The traceback refers to the
       context manager, and interactive Python keeps the last traceback.

    So the statement gets an object that nothing else refers to. When it is gone
    and `leave` has not been called, `leave` is.
    """

    __exit__ = _Exit()

    def __init__(self) -> None:
        self._used = self._ended = False
        self._end: weakref.ref[Any] | None = None

    @abstractmethod
    def enter(self) -> _T:
        """Begin, and return what the statement is to yield."""

    @abstractmethod
    def leave(self, normally: bool) -> None:
        """End. Where nothing (or not all) of `enter` was done, undo what was."""

    def __enter__(self) -> _T:
        if self._used:
            raise RuntimeError("Call the method again for each `with` statement.")
        self._used = True
        return self.enter()

    def __del__(self) -> None:
        if self._used and not self._ended:  # contextlib.ExitStack's, say
            self.leave(False)

    def _leave(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave(exc_type is None)
        self._ended = True
        self._end = None

    def _forsaken(self, _: object) -> None:
        self.leave(False)
