"""A thread-safe, dict-like store of Python objects on disk, built on LMDB."""

from .exceptions import (
    BusyError,
    ClosedError,
    DiskError,
    GrowthError,
    LostWritesError,
    ReadOnlyError,
    SizeError,
    UnpickleError,
)
from .store import LmdbObjectStore

__version__ = "1.0.0"

__all__ = [
    "BusyError",
    "ClosedError",
    "DiskError",
    "GrowthError",
    "LmdbObjectStore",
    "LostWritesError",
    "ReadOnlyError",
    "SizeError",
    "UnpickleError",
]
