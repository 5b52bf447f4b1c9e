"""A thread-safe, dict-like store of Python objects on disk, built on LMDB."""

from ._mapping import Snapshot
from .exceptions import (
    BusyError,
    ClosedError,
    ConflictError,
    CorruptedError,
    DiskError,
    GrowthError,
    LoadError,
    LostWritesError,
    NamedDatabaseError,
    ReadersFullError,
    ReadOnlyError,
    ReplacedError,
    SizeError,
    SnapshotOpenError,
    UnpickleError,
    WrongFileError,
)
from .store import LmdbObjectStore

__version__ = "2.0.0"

__all__ = [
    "BusyError",
    "ClosedError",
    "ConflictError",
    "CorruptedError",
    "DiskError",
    "GrowthError",
    "LmdbObjectStore",
    "LoadError",
    "LostWritesError",
    "NamedDatabaseError",
    "ReadOnlyError",
    "ReadersFullError",
    "ReplacedError",
    "SizeError",
    "Snapshot",
    "SnapshotOpenError",
    "UnpickleError",
    "WrongFileError",
]
