"""Pickles that may name only some classes and functions."""

from __future__ import annotations

import builtins
import copyreg
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from enum import Enum
from importlib import import_module
from io import BytesIO
from types import BuiltinFunctionType, FunctionType, GenericAlias, ModuleType
from typing import Any, ClassVar

_PLAIN = "bool bytearray bytes complex dict float frozenset int list range set slice "
_PLAIN += "str tuple Ellipsis NotImplemented"
_NAMED = (type, FunctionType, BuiltinFunctionType)
_NEVER = {"builtins.getattr", "builtins.setattr", "builtins.eval", "builtins.exec"}
_NEVER |= {"builtins.__import__", "builtins.open", "builtins.compile", "_codecs"}
_NEVER |= {"_operator", "copyreg", "importlib", "nt", "operator", "os", "pickle"}
_NEVER |= {"posix", "runpy", "subprocess", "sys"}
"""Modules and functions that can do anything: no message advises to allow them."""
_whichmodule: Callable[[object, str], str] = vars(pickle)["whichmodule"]
_reduce_ex: Any = object.__reduce_ex__
_reduce: Any = object.__reduce__
_dispatch: dict[int, Any] = pickle._Unpickler.dispatch
_LONGEST = 200  # characters of a name in a message: the name comes from the file
_extensions: dict[int, tuple[str, str]] = vars(copyreg)["_inverted_registry"]


class Allowed:
    """Plain data, and the classes and functions that pickles may name besides.

    Parameters
    ----------
    allow : iterable
        Classes, functions and modules, or their names. A module stands for the classes
        that it defines itself: not for its functions and submodules.
    """

    def __init__(self, allow: Iterable[Any]) -> None:
        if isinstance(allow, (str, bytes, type)) or not isinstance(allow, Iterable):
            raise TypeError(f"allow must be a list or the like; put {allow!r} into one")
        self.allow = tuple(  # a module can't be pickled
            item.__name__ if isinstance(item, ModuleType) else item for item in allow
        )
        self._objects: dict[str, Any] = {
            f"builtins.{name}": vars(builtins)[name] for name in _PLAIN.split()
        }
        self._names = {item for item in self.allow if isinstance(item, str)}
        others = (item for item in self.allow if not isinstance(item, str))
        self._objects.update((_name_of(item), item) for item in others)

    def dumps(self, obj: object, protocol: int) -> bytes:
        """Pickle `obj`; PicklingError if `loads` would refuse something in it."""
        file = BytesIO()
        _Pickler(file, protocol, self).dump(obj)
        return file.getvalue()

    def loads(self, raw: bytes) -> Any:
        """Unpickle; UnpicklingError if the pickle names something that is not allowed.

        Python's unpickler, the slower of the two, can look after the classes that a
        pickle names, and after codes of ``copyreg``, which the other doesn't show.
        """
        if not _extensions:
            try:
                return _Unpickler(raw, self).load()
            except _CareNeededError:
                pass  # nothing was called: all before the first name was plain data
        return _CarefulUnpickler(raw, self).load()

    def holds(self, module: str, name: str, obj: object) -> bool:
        """Return whether a pickle may name `obj` like this."""
        try:
            return self.find(module, name) is obj
        except pickle.UnpicklingError:
            return False

    def find(self, module: str, name: str) -> Any:
        """Return the object of a name. Nothing is imported that is not allowed."""
        found = self._find(module, name)
        if found is None:  # pickles of protocol 2 and before have names of Python 2
            today = NAME_MAPPING.get((module, name))
            found = self._find(*today or (IMPORT_MAPPING.get(module, module), name))
        if found is None:
            raise pickle.UnpicklingError(_refusal(module, name))
        return found

    def _find(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._objects:
            return self._objects[full]
        if full in self._names:
            try:
                found: Any = import_module(module)
                for part in name.split("."):
                    found = getattr(found, part)
            except (ImportError, AttributeError) as error:
                raise pickle.UnpicklingError(f"there is no {_shown(full)}") from error
            if not (callable(found) or isinstance(found, Enum)):
                text = "can't be allowed: it is no class and no function"
                raise pickle.UnpicklingError(f"{_shown(full)} {text}")
            return found
        return _class_in(import_module(module), name) if module in self._names else None

    def is_plain(self) -> bool:
        """Return whether only plain data is allowed, whose types can't be changed."""
        return not self.allow


def _refusal(module: str, name: str) -> str:
    """Return the message about a class or function that is not allowed."""
    full = f"{module}.{name}"
    shown = _shown(full)
    if full in _NEVER or module.partition(".")[0] in _NEVER:
        return f"{shown} is not allowed: it could let the value run any code"
    return (
        f"{shown} is not allowed. If that can do no harm, with any arguments, add "
        f"{shown} to the list allow=[...] of Pickle. The value may name others, too"
    )


def _shown(name: str) -> str:
    return repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...")


def _name_of(obj: Any) -> str:
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not (callable(obj) and isinstance(module, str) and isinstance(name, str)):
        raise TypeError(
            "allow takes classes, functions, modules and names such as "
            f"'module.name', not {obj!r}"
        )
    if "<" in name:
        raise ValueError(f"allow: {obj!r} is local, and can't be pickled by its name")
    return f"{module}.{name}"


def _class_in(module: ModuleType, name: str) -> type | None:
    """Return a class that `module` defines, by its qualified name.

    Looks into the module and its classes only, and calls no ``__getattr__``.
    """
    found: Any = module
    for part in name.split("."):
        found = vars(found).get(part)
        if not isinstance(found, type):
            return None
    here = found.__module__, found.__qualname__
    return found if here == (module.__name__, name) else None


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO, protocol: int, allowed: Allowed) -> None:
        super().__init__(file, protocol, fix_imports=False)  # no names of Python 2
        self._protocol = protocol
        self._allowed = allowed

    def reducer_override(self, obj: Any) -> Any:
        kind: Any = type(obj)
        reduced = NotImplemented
        if issubclass(kind, _NAMED):
            module, name = obj.__module__, obj.__qualname__
            if "<" in name or not isinstance(module, str):
                return reduced  # can't be pickled at all, or as something else
        elif kind in copyreg.dispatch_table or (
            kind.__reduce_ex__ is _reduce_ex and kind.__reduce__ is _reduce
        ):
            return reduced
        else:
            reduced = obj.__reduce_ex__(self._protocol)
            if not isinstance(reduced, str):
                return reduced
            module, name = _whichmodule(obj, reduced), reduced
        if not self._allowed.holds(module, name, obj):
            raise pickle.PicklingError(_refusal(module, name))
        return reduced


class _CareNeededError(Exception):
    """A pickle names something, and could change that."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, raw: bytes, allowed: Allowed) -> None:
        super().__init__(BytesIO(raw))
        self._allowed = allowed

    def find_class(self, module: str, name: str, /) -> Any:
        if self._allowed.is_plain():
            return self._allowed.find(module, name)
        raise _CareNeededError


def _guarded(opcode: bytes, position: int) -> Callable[[_CarefulUnpickler], None]:
    """Return a handler of `opcode`, which changes the object at `position`.

    0 stands for the object below the last mark.
    """

    def load(self: _CarefulUnpickler) -> None:
        state = vars(self)
        stack = state["stack"] if position else state["metastack"][-1]
        self.check_target(stack[position or -1])
        _dispatch[opcode[0]](self)

    return load


class _CarefulUnpickler(pickle._Unpickler):
    """Changes nothing that others have, and looks up codes of ``copyreg``, too."""

    dispatch: ClassVar[Any] = {
        **_dispatch,
        pickle.BUILD[0]: _guarded(pickle.BUILD, -2),
        pickle.APPEND[0]: _guarded(pickle.APPEND, -2),
        pickle.SETITEM[0]: _guarded(pickle.SETITEM, -3),
        pickle.APPENDS[0]: _guarded(pickle.APPENDS, 0),
        pickle.SETITEMS[0]: _guarded(pickle.SETITEMS, 0),
        pickle.ADDITEMS[0]: _guarded(pickle.ADDITEMS, 0),
    }

    def __init__(self, raw: bytes, allowed: Allowed) -> None:
        super().__init__(BytesIO(raw))
        self._allowed = allowed
        self._found: dict[int, object] = {}  # by id()

    def find_class(self, module: str, name: str, /) -> Any:
        found = self._allowed.find(module, name)
        self._found[id(found)] = found
        return found

    def check_target(self, target: object) -> None:
        """Raise if `target` is a class, a member of an enum, or found by its name.

        Or if it is one of ``list[int]``, whose attributes are those of the class.
        """
        if isinstance(target, (type, Enum, GenericAlias)) or id(target) in self._found:
            raise pickle.UnpicklingError(
                f"The pickle would change {_shown(repr(target))} for the whole process"
            )

    def get_extension(self, code: int) -> None:
        if code not in _extensions:
            raise pickle.UnpicklingError(f"copyreg has no extension code {code}")
        vars(self)["append"](self.find_class(*_extensions[code]))
