"""Serve a store to the clients of a socket, from asyncio.

A client sends lines: ``put KEY TEXT`` stores a text, ``get KEY`` answers it, and
``count KEY`` counts and answers the number. Each call of the store runs in a thread, as
it may wait. The server ends in order at SIGTERM and at Ctrl-C.
"""

import argparse
import asyncio
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from lmdb_object_store import LmdbObjectStore

Store = LmdbObjectStore[str, "str | int"]


def count(store: Store, key: str) -> int:
    """Add one. The block begins and ends in one thread, as it has to."""
    with store.transaction():
        number = store.get(key, 0)
        number = number + 1 if isinstance(number, int) else 1
        store[key] = number
        return number


async def answer(store: Store, line: str) -> str:
    """Do what a client asks for, while the event loop goes on."""
    match line.split(maxsplit=2):
        case ["put", key, text]:
            await asyncio.to_thread(store.put, key, text)
            return "ok"
        case ["get", key]:
            return str(await asyncio.to_thread(store.get, key, ""))
        case ["count", key]:
            return str(await asyncio.to_thread(count, store, key))
    return "?"


async def talk(
    store: Store, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer the lines of one client, one after the other."""
    try:
        with suppress(ConnectionError):  # the client is gone
            async for line in reader:
                text = await answer(store, line.decode().strip())
                writer.write(text.encode() + b"\n")
                await writer.drain()
    finally:  # also when the program ends, which waits for that
        writer.close()


async def serve(path: Path, port: int) -> None:
    """Serve the store at `path` until this task is cancelled."""
    task = asyncio.current_task()
    assert task
    with suppress(NotImplementedError):  # on Windows, where SIGTERM just kills
        # The loop cancels between two steps, where an exception could come anywhere.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with Store(path, key_encoding="utf-8") as store:
        server = await asyncio.start_server(partial(talk, store), "127.0.0.1", port)
        async with server:
            print("port", server.sockets[0].getsockname()[1], flush=True)
            try:
                await asyncio.Event().wait()  # serve_forever() would wait for clients
            finally:
                for other in asyncio.all_tasks() - {task}:
                    other.cancel()


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", type=Path, required=True, help="of the store")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    arguments = parser.parse_args()
    try:
        asyncio.run(serve(arguments.path, arguments.port))
    except KeyboardInterrupt:
        pass
    except asyncio.CancelledError:  # by SIGTERM
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
