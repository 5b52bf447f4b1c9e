"""The exceptions of the store, beside `TypeError`, `ValueError` and `KeyError`.

Each subclasses the exception that py-lmdb or Python would raise in its place, so that
``except lmdb.MapFullError`` and ``except GrowthError`` both work.
"""

import lmdb


class ClosedError(lmdb.Error):
    """The store, the snapshot or the transaction block is closed."""


class ReadOnlyError(lmdb.ReadonlyError):
    """The store was opened with ``readonly=True`` and can't be written to."""


class SizeError(lmdb.BadValsizeError, ValueError):
    """A key is empty or too long, or a value is larger than LMDB stores."""


class GrowthError(lmdb.MapFullError):
    """The map is full and can't grow; pending writes are kept."""


class SnapshotOpenError(GrowthError):
    """The map has to move, which would end open snapshots.

    Raised at once in a thread that has opened one of them, else after
    `LmdbObjectStore.timeout` seconds. Close snapshots sooner, or give the store a
    larger ``map_size``, so that the map need not grow.
    """


class ConflictError(lmdb.Error):
    """Another process has written during a transaction block.

    LMDB lets other processes write only where the map has to grow for the block, or
    after an I/O error. Nothing of the block is written: run the block again.
    """


class WrongFileError(lmdb.InvalidError, ValueError):
    """The path has no file that the store can use: of another kind, or another use.

    It is no LMDB file, or one of another engine than ``lib_version`` asks for, a
    directory instead of a file or the reverse, or has a main database with flags.
    """


class ReplacedError(lmdb.Error):
    """The data file or the lock file was deleted, moved or replaced while open.

    What would be written could be lost, or damage the file; pending writes are kept.
    """


class CorruptedError(lmdb.CorruptedError):
    """The data file is damaged, or has been cut off."""


class NamedDatabaseError(lmdb.IncompatibleError):
    """A key is the name of a named database in the file, which another program made.

    The write under that key is refused, by the next flush of any kind; then that is
    logged, and `LmdbObjectStore.flush` or ``close(strict=True)`` raises. A flush does
    all other writes; of a `put_many`, a `delete_many` and a transaction block that is
    refused nothing is written.
    """

    keys: frozenset[bytes] = frozenset()
    """The keys at fault."""


class DiskError(lmdb.DiskError):
    """The disk is full or failing; pending writes are kept."""


class ReadersFullError(lmdb.ReadersFullError):
    """All reader slots of the file are taken, by living readers.

    Raised after `LmdbObjectStore.timeout` seconds, or at once where this thread has
    taken all of them. Close snapshots sooner, or open the file with a larger
    ``max_readers`` in all processes.
    """


class BusyError(lmdb.Error):
    """The call can't be served at this moment without a deadlock.

    - *Inside* an operation of the same store on the same thread: a signal handler, a
      finalizer, an unpickling.
    - After `LmdbObjectStore.timeout` seconds: a wait for a read that does not end, or
      for another thread's transaction block.
    - Inside a transaction block: another asyncio task of its thread, or a call that
      closes the store or takes a snapshot.
    - Opening a file that this process is just closing, or can't open since it was
      forked at a bad moment.
    - `maintenance.compact` of a store that a process has open.
    """


class LoadError(RuntimeError):
    """The serializer can't load a stored value.

    The message names the key. The serializer's own error is chained. `UnpickleError` is
    the older name of this class.
    """


UnpickleError = LoadError


class LostWritesError(RuntimeError):
    """The final flush failed; `LmdbObjectStore.write_buffer` holds the lost writes."""
