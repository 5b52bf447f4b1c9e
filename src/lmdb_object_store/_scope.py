"""Context managers whose end comes whatever interrupts it."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

_T = TypeVar("_T")


class Scope(ABC, Generic[_T]):
    """What a ``with`` statement enters and leaves."""

    @abstractmethod
    def enter(self) -> _T:
        """Begin, and return what the statement is to yield."""

    @abstractmethod
    def leave(self, failure: type[BaseException] | None) -> None:
        """End, or do nothing if that has been done.

        Where only a part of `enter` or of `leave` was done, undo what has begun.

        Parameters
        ----------
        failure : type, optional
            Of the exception that the statement is left with.
        """


def manager(scope: Scope[_T]) -> AbstractContextManager[_T, None]:
    """Return a context manager, for one use."""
    return cast("AbstractContextManager[_T, None]", _Manager(scope))


class _Exit:
    """The ``__exit__`` of `_Manager`."""

    def __get__(self, one: _Manager[Any] | None, owner: type) -> Callable[..., None]:
        if one is None:
            return self
        end = one.end and one.end()
        if end is None:
            end = partial(one.leave)
            one.end = weakref.ref(end, partial(_forsaken, one.scope))
        return end

    def __call__(self, one: _Manager[Any], *exc: Any) -> None:
        # So does contextlib.ExitStack, which looks it up on the class.
        one.leave(*exc)


class _Manager(Generic[_T]):
    """A context manager that is left whatever happens.

    1. A ``with`` statement ends and calls ``__exit__``.
    2. Ctrl-C: CPython looks for signals at the start of each Python function, so
       the KeyboardInterrupt is raised before the first line of it.
    3. Nothing has ended, but the statement is over. The traceback refers to the
       context manager, and interactive Python keeps the last traceback.

    So the statement gets an object that nothing else refers to. When that is gone,
    or the manager is, and the scope is still entered, it is left.
    """

    __exit__ = _Exit()

    def __init__(self, scope: Scope[_T]) -> None:
        self.scope = scope
        self.end: weakref.ref[Any] | None = None
        self._used = False

    def __enter__(self) -> _T:
        if self._used:
            raise RuntimeError("Call the method again for each `with` statement.")
        self._used = True
        scope = self.scope
        _entered[scope] = weakref.ref(self, partial(_forsaken, scope))
        try:
            return scope.enter()
        except BaseException as error:
            scope.leave(type(error))
            raise

    def leave(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.scope.leave(exc_type)
        _entered.pop(self.scope, None)
        self.end = None


_entered: dict[Scope[Any], weakref.ref[_Manager[Any]]] = {}


def _forsaken(scope: Scope[Any], _: object) -> None:
    scope.leave(BaseException)
    _entered.pop(scope, None)
