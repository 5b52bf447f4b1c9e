"""What the store raises beside `TypeError`, `ValueError` and `KeyError`.

Each class is a subclass of what py-lmdb or Python would raise for the same
thing, so that ``except lmdb.MapFullError`` and ``except GrowthError`` both work.
"""

import lmdb


class ClosedError(lmdb.Error):
    """The store, the snapshot or the transaction block is closed."""


class ReadOnlyError(lmdb.ReadonlyError):
    """The store was opened with ``readonly=True`` and can't be written to."""


class SizeError(lmdb.BadValsizeError, ValueError):
    """A key is empty or too long, or a pickled value is larger than LMDB stores."""


class GrowthError(lmdb.MapFullError):
    """The map is full and can't grow; whatever was pending is still pending."""


class SnapshotOpenError(GrowthError):
    """The map is full and can't grow, since that would end open snapshots.

    Raised at once to a thread that has opened one of them itself, else after
    `LmdbObjectStore.timeout` seconds. Close snapshots sooner, or give the
    store a larger ``map_size``, so that it need not grow.
    """


class ConflictError(lmdb.Error):
    """Another process has written while a transaction block had to let it.

    That can be so only where room had to be made in the map for the block, or after
    an I/O error. Nothing of the block is written: run it again.
    """


class DiskError(lmdb.DiskError):
    """The disk is full or failing; whatever was pending is still pending."""


class ReadersFullError(lmdb.ReadersFullError):
    """All reader slots of the file are taken, by living readers.

    Raised after `LmdbObjectStore.timeout` seconds, or at once where this thread
    has them all itself. Close snapshots sooner, or open the file with a larger
    ``max_readers`` in all processes.
    """


class BusyError(lmdb.Error):
    """The call can't be served at this moment without a deadlock.

    Raised to code that runs *inside* an operation of the same store on the same
    thread (a signal handler, a finalizer, an unpickling), after
    `LmdbObjectStore.timeout` seconds to a call that waits for reads that
    don't end, and for what can't be done inside a transaction block: by another
    asyncio task of its thread, or to close the store or take a snapshot. Also, to
    open a file that is just being closed, or that this process can't open since it was
    forked at a bad moment.
    """


class UnpickleError(RuntimeError):
    """A stored value can't be unpickled; the cause is chained."""


class LostWritesError(RuntimeError):
    """The final flush failed; `LmdbObjectStore.write_buffer` holds what was lost."""
