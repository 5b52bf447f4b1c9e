"""Context managers whose end comes whatever interrupts it."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, TypeVar, cast

_T = TypeVar("_T")


class Scope(ABC, Generic[_T]):
    """The beginning and the end of a ``with`` statement."""

    @abstractmethod
    def enter(self) -> _T:
        """Begin, and return the object that the statement yields."""

    @abstractmethod
    def leave(self, failure: type[BaseException] | None) -> None:
        """End, by an exception of type `failure` perhaps.

        Complete a part of `enter` or `leave` that an interrupt has left; do nothing
        after a complete `leave`.
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
        one.leave(*exc)  # for contextlib.ExitStack, which asks the class


class _Manager(Generic[_T]):
    """A context manager that is left whatever happens.

    1. A ``with`` statement ends and calls ``__exit__``.
    2. Ctrl-C: CPython looks for signals at the start of each Python function, so
       a KeyboardInterrupt is raised before the first line of ``__exit__``.
    3. The scope has not ended, but the statement is over. The traceback refers to the
       context manager, and interactive Python keeps the last traceback.

    So the statement gets an object that nothing else refers to. When this object or
    the manager is gone while the scope is still entered, the scope is left.
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

    def leave(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self.scope.leave(exc_type)
        _entered.pop(self.scope, None)
        self.end = None


_entered: dict[Scope[Any], weakref.ref[_Manager[Any]]] = {}


def _forsaken(scope: Scope[Any], _: object) -> None:
    scope.leave(BaseException)
    _entered.pop(scope, None)
