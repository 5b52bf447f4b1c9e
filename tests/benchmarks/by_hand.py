"""What an expert writes with py-lmdb and pickle, without this library.

Methods have the names of `LmdbObjectStore`, so that one function does the same work
with both. There is nothing else of the library's: one thread, one process, a map that
is large enough, bytes keys that are right.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import HIGHEST_PROTOCOL, dumps, loads
from typing import Any

import lmdb


class ByHand:
    def __init__(
        self,
        path: Path,
        batch_size: int = 1000,
        map_size: int = 2**28,
        sync: bool = True,
    ) -> None:
        self.env = lmdb.open(str(path), map_size=map_size, sync=sync)
        self.batch_size = batch_size
        self.buffer: dict[bytes, bytes | None] = {}

    def get(self, key: bytes, default: Any = None) -> Any:
        with self.env.begin(buffers=True) as txn:
            raw = txn.get(key)
            return default if raw is None else loads(raw)

    def __contains__(self, key: bytes) -> bool:
        with self.env.begin(buffers=True) as txn:
            return txn.get(key) is not None

    def get_many(self, keys: list[bytes]) -> tuple[dict[bytes, Any], list[bytes]]:
        with self.env.begin(buffers=True) as txn:
            get = txn.get
            found = {key: loads(raw) for key in keys if (raw := get(key)) is not None}
        if len(found) == len(keys):
            return found, []
        return found, [key for key in keys if key not in found]

    def put(self, key: bytes, obj: object) -> None:
        self.buffer[key] = dumps(obj, HIGHEST_PROTOCOL)
        if len(self.buffer) >= self.batch_size:
            self.flush()

    def delete(self, key: bytes) -> None:
        self.buffer[key] = None
        if len(self.buffer) >= self.batch_size:
            self.flush()

    def flush(self) -> None:
        if not self.buffer:
            return
        items = sorted(self.buffer.items())
        with self.env.begin(write=True) as txn:
            if None not in self.buffer.values():
                txn.cursor().putmulti(items)
            else:
                for key, raw in items:
                    if raw is None:
                        txn.delete(key)
                    else:
                        txn.put(key, raw)
        self.buffer = {}

    def put_many(self, items: Iterable[tuple[bytes, object]]) -> None:
        raws = sorted((key, dumps(obj, HIGHEST_PROTOCOL)) for key, obj in items)
        with self.env.begin(write=True) as txn:
            txn.cursor().putmulti(raws)

    def delete_many(self, keys: Iterable[bytes]) -> int:
        with self.env.begin(write=True) as txn:
            return sum(map(txn.delete, sorted(keys)))

    def keys(self) -> Iterator[bytes]:
        with self.env.begin() as txn:
            yield from txn.cursor().iternext(values=False)

    def items(self) -> Iterator[tuple[bytes, Any]]:
        with self.env.begin() as txn:
            for key, raw in txn.cursor():
                yield key, loads(raw)

    def items_of(self, prefix: bytes) -> Iterator[tuple[bytes, Any]]:
        with self.env.begin() as txn:
            cursor = txn.cursor()
            if cursor.set_range(prefix):
                for key, raw in cursor:
                    if not key.startswith(prefix):
                        break
                    yield key, loads(raw)

    def __len__(self) -> int:
        return self.env.stat()["entries"]

    @contextmanager
    def transaction(self) -> Iterator[lmdb.Transaction]:
        with self.env.begin(write=True, buffers=True) as txn:
            yield txn

    @contextmanager
    def snapshot(self) -> Iterator[lmdb.Transaction]:
        with self.env.begin(buffers=True) as txn:
            yield txn

    def close(self) -> None:
        self.flush()
        self.env.close()


class TextByHand(ByHand):
    """Text keys, for the one operation that is measured with them."""

    def get(self, key: str, default: Any = None) -> Any:
        with self.env.begin(buffers=True) as txn:
            raw = txn.get(key.encode())
            return default if raw is None else loads(raw)
