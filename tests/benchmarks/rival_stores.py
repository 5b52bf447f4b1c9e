"""The stores to compare, each used as its documentation advises.

Values are pickled with the highest protocol everywhere. A store that takes str keys
gets them, the others get bytes.
"""

import dbm
import platform
import shelve
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from pickle import HIGHEST_PROTOCOL, dumps, loads
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

pickled = partial(dumps, protocol=HIGHEST_PROTOCOL)

Pairs = Iterable[tuple[Any, object]]


class Rival:
    """A store with the operations that are measured.

    `get`, `put`, `has` and `delete` are the store's own functions where it has them, so
    that nothing comes in between.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    durable: ClassVar[str | None]  # how a write is on disk when it returns; None: can't
    buffered: ClassVar[str]  # how a write may be lost
    lost: ClassVar[str]  # then
    encode: ClassVar[Callable[[str], Any]] = str
    durable_arrays: ClassVar[bool] = True  # whether that holds for large values, too

    get: Callable[[Any], Any]
    put: Callable[[Any, object], Any]
    has: Callable[[Any], bool]
    delete: Callable[[Any], Any]

    def __init__(self, path: Path, durable: bool) -> None:
        raise NotImplementedError

    def put_batch(self, pairs: Pairs) -> None:
        raise NotImplementedError

    def items(self) -> Iterable[tuple[Any, Any]]:
        return self.db.items()

    def items_of(self, prefix: Any) -> Iterator[tuple[Any, Any]]:
        """Yield what has the prefix, by a look at all keys."""
        return ((key, self.get(key)) for key in self.db if key.startswith(prefix))

    def finish(self) -> None:
        """Hand over to the operating system what is still pending."""

    def close(self) -> None:
        self.db.close()

    def use(self, db: Any) -> None:
        """Take the functions of a mapping."""
        self.db = db
        self.get, self.put = db.get, db.__setitem__
        self.has, self.delete = db.__contains__, db.__delitem__


class Ours(Rival):
    name, package = "lmdb-object-store", "lmdb-object-store"
    durable = "`batch_size=1`"
    buffered = "as it comes, but `autoflush_on_read=False`"
    lost = "kill: 1 s; power failure: 1 s"
    sync = True

    def __init__(self, path: Path, durable: bool) -> None:
        from lmdb_object_store import LmdbObjectStore

        if durable:
            options: dict[str, Any] = {"batch_size": 1}
        else:
            options = {"autoflush_on_read": False, "sync": self.sync}
        self.use(LmdbObjectStore(path, key_encoding="utf-8", **options))
        self.put, self.delete = self.db.put, self.db.delete
        self.put_batch, self.finish = self.db.put_many, self.db.flush
        self.items_of = self.db.items


class Unsynced(Ours):
    """For comparison with those stores that don't wait for the disk, either."""

    name = "lmdb-object-store, sync=False"
    durable = None
    buffered = "`sync=False`, `autoflush_on_read=False`"
    lost = "kill: 1 s; power failure: perhaps the file"
    sync = False


class Lmdb(Rival):
    name, package = "py-lmdb by hand", "lmdb"
    durable = "a transaction for each write"
    buffered = "a dict of 1,000 writes, then a transaction"
    lost = "kill: 1,000 writes; power failure: 1,000 writes"
    encode = str.encode

    def __init__(self, path: Path, durable: bool) -> None:
        from by_hand import ByHand

        self.db = db = ByHand(path, 1 if durable else 1000, map_size=2**32)
        self.get, self.put, self.has = db.get, db.put, db.__contains__
        self.delete, self.put_batch = db.delete, db.put_many
        self.items_of, self.finish = db.items_of, db.flush
        if not durable:
            self.get = self.get_pending

    def get_pending(self, key: bytes) -> Any:
        if key not in self.db.buffer:
            return self.db.get(key)
        raw = self.db.buffer[key]
        return None if raw is None else loads(raw)


class Lmdbm(Rival):
    name, package = "lmdbm", "lmdbm"
    durable = "as it comes"
    buffered = "`sync=False`"
    lost = "kill: nothing; power failure: perhaps the file"

    def __init__(self, path: Path, durable: bool) -> None:
        from lmdbm import Lmdb as Base

        class PickledLmdb(Base):  # as its README makes a JsonLmdb
            _pre_value = staticmethod(pickled)
            _post_value = staticmethod(loads)

            def _pre_key(self, key: str) -> bytes:
                return key.encode()

            def _post_key(self, key: bytes) -> str:
                return key.decode()

        self.use(PickledLmdb.open(str(path), "c", sync=durable))
        self.put_batch = self.db.update


class Zict(Rival):
    name, package = "zict.LMDB", "zict"
    durable = None
    buffered = "as it comes: `sync=False`, `writemap=True`"
    lost = "kill: nothing; power failure: perhaps the file"

    def __init__(self, path: Path, durable: bool) -> None:
        import zict

        self.use(zict.Func(pickled, loads, zict.LMDB(path)))
        self.put_batch = self.db.update


class Shelve(Rival):
    # What a shelf keeps its data in depends on how Python was built.
    with TemporaryDirectory() as folder:
        shelve.DbfilenameShelf(f"{folder}/shelf").close()
        backend = dbm.whichdb(f"{folder}/shelf")
    name, package = f"shelve ({backend})", ""  # comes with Python
    buffered = "as it comes"
    durable = {
        "dbm.gnu": "`sync()` after each write",
        "dbm.sqlite3": "as it comes",
    }.get(backend)
    lost = {
        "dbm.gnu": "kill: nothing; power failure: perhaps the file",
        "dbm.sqlite3": "nothing",
    }.get(backend, "kill, power failure: perhaps the file")

    def __init__(self, path: Path, durable: bool) -> None:
        self.use(shelve.DbfilenameShelf(str(path), protocol=HIGHEST_PROTOCOL))
        self.finish = self.db.sync
        if durable and self.backend == "dbm.gnu":
            self.put, self.delete = self.put_synced, self.delete_synced

    def put_synced(self, key: str, obj: object) -> None:
        self.db[key] = obj
        self.db.sync()

    def delete_synced(self, key: str) -> None:
        del self.db[key]
        self.db.sync()

    def put_batch(self, pairs: Pairs) -> None:
        for key, obj in pairs:
            self.db[key] = obj
        self.db.sync()


class Sqlitedict(Rival):
    name, package = "sqlitedict", "sqlitedict"
    durable = None
    buffered = (
        "`autocommit=False` as it comes, `commit()` at the end; `outer_stack=False`"
    )
    lost = "kill: all since `commit()`; power failure: perhaps the file"

    def __init__(self, path: Path, durable: bool) -> None:
        from sqlitedict import SqliteDict

        self.use(SqliteDict(str(path), outer_stack=False))
        self.finish = self.db.commit

    def put_batch(self, pairs: Pairs) -> None:
        self.db.update(pairs)
        self.db.commit()


class Diskcache(Rival):
    name, package = "diskcache", "diskcache"
    durable = (
        "`sqlite_synchronous=2`; values of 32 KiB and more are files without fsync"
    )
    buffered = "`sqlite_synchronous=1` as it comes"
    lost = "kill: nothing; power failure: all since a checkpoint, and large values"
    durable_arrays = False

    def __init__(self, path: Path, durable: bool) -> None:
        from diskcache import Cache

        level = 2 if durable else 1
        # As diskcache.Index does: a store that drops nothing.
        settings = {"eviction_policy": "none", "sqlite_synchronous": level}
        self.use(Cache(str(path), **settings))

    def put_batch(self, pairs: Pairs) -> None:
        with self.db.transact():
            for key, obj in pairs:
                self.db[key] = obj

    def items(self) -> Iterator[tuple[Any, Any]]:
        return ((key, self.get(key)) for key in self.db)


class Rocksdict(Rival):
    name, package = "rocksdict", "rocksdict"
    durable = "`WriteOptions.sync = True`"
    buffered = "as it comes"
    lost = "kill: nothing; power failure: the last writes"

    def __init__(self, path: Path, durable: bool) -> None:
        import rocksdict

        self.use(rocksdict.Rdict(str(path)))
        self.db.set_dumps(pickled)
        options = rocksdict.WriteOptions()
        options.sync = durable
        self.db.set_write_options(options)
        self.batch, self.options = rocksdict.WriteBatch, options

    def put_batch(self, pairs: Pairs) -> None:
        batch = self.batch()
        batch.set_dumps(pickled)
        for key, obj in pairs:
            batch[key] = obj
        self.db.write(batch, self.options)

    def items_of(self, prefix: str) -> Iterator[tuple[Any, Any]]:
        for key, obj in self.db.items(from_key=prefix):
            if not key.startswith(prefix):
                break
            yield key, obj


class Plyvel(Rival):
    name, package = "plyvel", "plyvel"
    durable = "`sync=True`"
    buffered = "as it comes"
    lost = "kill: nothing; power failure: the last writes"
    encode = str.encode

    def __init__(self, path: Path, durable: bool) -> None:
        import plyvel

        self.db = plyvel.DB(str(path), create_if_missing=True)
        self.delete = partial(self.db.delete, sync=durable)
        self.sync = durable

    def get(self, key: bytes) -> Any:
        raw = self.db.get(key)
        return None if raw is None else loads(raw)

    def put(self, key: bytes, obj: object) -> None:
        self.db.put(key, dumps(obj, HIGHEST_PROTOCOL), sync=self.sync)

    def has(self, key: bytes) -> bool:
        return self.db.get(key) is not None

    def put_batch(self, pairs: Pairs) -> None:
        with self.db.write_batch(sync=self.sync) as batch:
            for key, obj in pairs:
                batch.put(key, dumps(obj, HIGHEST_PROTOCOL))

    def items(self) -> Iterator[tuple[Any, Any]]:
        return ((key, loads(raw)) for key, raw in self.db)

    def items_of(self, prefix: bytes) -> Iterator[tuple[Any, Any]]:
        found = self.db.iterator(prefix=prefix)
        return ((key, loads(raw)) for key, raw in found)


_ALL = (Ours, Unsynced, Lmdb, Lmdbm, Zict, Shelve, Sqlitedict, Diskcache)
RIVALS: dict[str, type[Rival]] = {
    rival.name: rival for rival in (*_ALL, Rocksdict, Plyvel)
}


def version(rival: type[Rival]) -> str | None:
    """Return the version that is installed, or None."""
    if issubclass(rival, Ours):  # there is no metadata of a source tree
        from lmdb_object_store import __version__

        return __version__
    if rival is Shelve:
        return platform.python_version()
    try:
        return metadata.version(rival.package)
    except metadata.PackageNotFoundError:
        return None
