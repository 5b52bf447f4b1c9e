"""A thread-safe, dict-like store of Python objects on disk, built on LMDB."""

from ._mapping import Snapshot
from .exceptions import (
    BusyError,
    ClosedError,
    ConflictError,
    DiskError,
    GrowthError,
    LostWritesError,
    ReadersFullError,
    ReadOnlyError,
    SizeError,
    SnapshotOpenError,
    UnpickleError,
)
from .store import LmdbObjectStore

__version__ = "1.0.0"

__all__ = [
    "BusyError",
    "ClosedError",
    "ConflictError",
    "DiskError",
    "GrowthError",
    "LmdbObjectStore",
    "LostWritesError",
    "ReadOnlyError",
    "ReadersFullError",
    "SizeError",
    "Snapshot",
    "SnapshotOpenError",
    "UnpickleError",
]
