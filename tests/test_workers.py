"""A store that worker processes get: data loaders, processes, executors."""

import importlib.util
import os

import pytest

from test_faults import verify

METHODS = ["spawn"] if os.name == "nt" else ["fork", "spawn", "forkserver"]
methods = pytest.mark.parametrize("method", METHODS)
# Queues and executors have threads, and Python 3.12+ warns of a fork beside them.
OPTIONS = ("-W", "default", "-W", "ignore::DeprecationWarning")

DATASET = """
import multiprocessing, os, sys
from lmdb_object_store import LmdbObjectStore

SIZE = 200
WORKERS = 4
EPOCHS = 2
TIMEOUT = 30


class Dataset:
    "Map-style: what a loader's workers get is this object, with its store."

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return {"index": index, "square": self.store[b"%d" % index], "by": os.getpid()}


def check(items):
    "In one epoch each item came once, with its value, from the workers."
    assert sorted(item["index"] for item in items) == list(range(SIZE))
    assert all(item["square"] == item["index"] ** 2 for item in items)
    processes = {item["by"] for item in items}
    assert len(processes) == WORKERS and os.getpid() not in processes


def open_store():
    store = LmdbObjectStore("db", sync=False)
    store.update((b"%d" % n, n ** 2) for n in range(SIZE))
    store.flush()
    return store
"""

# What torch.utils.data.DataLoader does: batches of indices go to the workers in turn,
# each has a queue for them and two batches in advance; all answer in one queue.
STAND_IN = f"""{DATASET}
def work(dataset, indices, results):
    while (batch := indices.get()) is not None:
        number, keys = batch
        results.put((number, [dataset[key] for key in keys]))


class Loader:
    def __init__(self, dataset, batch_size, context):
        self.dataset = dataset
        self.batch_size = batch_size
        self.context = context

    def __iter__(self):
        results = self.context.Queue()
        queues = [self.context.Queue() for _ in range(WORKERS)]
        workers = [
            self.context.Process(target=work, args=(self.dataset, queue, results))
            for queue in queues
        ]
        for worker in workers:
            worker.start()
        keys = range(len(self.dataset))
        starts = range(0, len(keys), self.batch_size)
        todo = enumerate(keys[start:start + self.batch_size] for start in starts)
        for _, batch in zip(range(2 * WORKERS), todo):
            queues[batch[0] % WORKERS].put(batch)
        early = {{}}
        for number in range(len(starts)):
            while number not in early:
                done, items = results.get(timeout=TIMEOUT)
                early[done] = items
                if batch := next(todo, None):
                    queues[batch[0] % WORKERS].put(batch)
            yield from early.pop(number)
        for queue in queues:
            queue.put(None)
        for worker in workers:
            worker.join(TIMEOUT)
            assert worker.exitcode == 0


if __name__ == "__main__":
    with open_store() as store:
        loader = Loader(Dataset(store), 8, multiprocessing.get_context(sys.argv[1]))
        for _ in range(EPOCHS):
            items = list(loader)
            assert [item["index"] for item in items] == list(range(SIZE))
            check(items)
"""


@pytest.mark.one_in(3)
@methods
def test_workers_of_a_data_loader_read_every_item_once(tmp_path, run, stored, method):
    assert run(STAND_IN, method, options=OPTIONS).stderr == ""
    assert stored() == {str(n): n**2 for n in range(200)}
    verify(tmp_path / "db")


# An import of PyTorch takes seconds: both methods share that of the parent, and workers
# that are started by spawn stay for both epochs. By fork each epoch has its own.
TORCH = f"""{DATASET}
def read(store, method):
    loader = DataLoader(
        Dataset(store),
        batch_size=8,
        shuffle=True,
        num_workers=WORKERS,
        multiprocessing_context=method,
        persistent_workers=method == "spawn",
        timeout=TIMEOUT,
    )
    for _ in range(EPOCHS):
        items = []
        for batch in loader:
            columns = [column.tolist() for column in batch.values()]
            items += [dict(zip(batch, item)) for item in zip(*columns)]
        check(items)


if __name__ == "__main__":
    from torch.utils.data import DataLoader

    with open_store() as store:
        for method in sys.argv[1:]:
            read(store, method)
            print(method)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="needs PyTorch: pip install --group torch",
)
def test_workers_of_pytorch_read_every_item_once(tmp_path, run, stored):
    methods = [method for method in METHODS if method != "forkserver"]
    result = run(TORCH, *methods, options=OPTIONS)
    assert result.stdout.split() == methods
    # PyTorch itself may warn, for example that there is no NumPy.
    assert "ResourceWarning" not in result.stderr
    assert "Traceback" not in result.stderr
    assert stored() == {str(n): n**2 for n in range(200)}
    verify(tmp_path / "db")


WRITERS = """
import multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor
from lmdb_object_store import LmdbObjectStore


def write(store, name):
    for number in range(50):
        store[f"{name} {number}"] = number  # pending when the process or task ends
    return os.getpid(), store[f"{name} 0"], store["given"]


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with LmdbObjectStore("db", key_encoding="utf-8", sync=False) as store:
        store["given"] = "given"
        store.flush()
        processes = [
            context.Process(target=write, args=(store, f"process {number}"))
            for number in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
        assert len(store) == 1 + 3 * 50
        with ProcessPoolExecutor(2, mp_context=context) as executor:
            tasks = [
                executor.submit(write, store, f"task {number}") for number in range(6)
            ]
            for task in tasks:
                pid, *read = task.result(30)
                assert pid != os.getpid() and read == [0, "given"]
        assert len(store) == 1 + 9 * 50
"""


@methods
def test_what_processes_and_tasks_write_is_on_disk(tmp_path, run, stored, method):
    assert run(WRITERS, method, options=OPTIONS).stderr == ""
    names = [f"process {n}" for n in range(3)] + [f"task {n}" for n in range(6)]
    written = {f"{name} {number}": number for name in names for number in range(50)}
    assert stored() == {"given": "given", **written}
    verify(tmp_path / "db")


JOBLIB = f"""{WRITERS.partition("if __name__")[0]}
from joblib import Parallel, delayed

if __name__ == "__main__":
    with LmdbObjectStore("db", key_encoding="utf-8", sync=False) as store:
        store["given"] = "given"
        for backend in sys.argv[1:]:
            names = [f"{{backend}} {{number}}" for number in range(6)]
            tasks = (delayed(write)(store, name) for name in names)
            for pid, *read in Parallel(2, backend=backend, timeout=30)(tasks):
                assert (pid == os.getpid()) == (backend == "threading")
                assert read == [0, "given"]
            assert all(store[f"{{name}} 49"] == 49 for name in names)
"""


def test_what_tasks_of_joblib_write_is_on_disk(tmp_path, run, stored):
    backends = ["loky", "threading"]
    errors = run(JOBLIB, *backends, options=OPTIONS).stderr
    # coverage.py may warn that one process got no task, and so imported nothing.
    assert "ResourceWarning" not in errors
    assert "Traceback" not in errors
    names = [f"{backend} {n}" for backend in backends for n in range(6)]
    numbers = {f"{name} {number}": number for name in names for number in range(50)}
    assert stored() == {"given": "given", **numbers}
    verify(tmp_path / "db")
