"""The entries that every store is given: keys, values, random orders."""

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

SEED = 20
DIGITS = 12
MIB = 2**20
ROOM = 2**34  # bytes, a map that is large enough for all


def key(number: int) -> str:
    return f"user:{number:0{DIGITS}}"


def value(number: int) -> dict[str, object]:
    """Return a small dict: about 100 bytes when it is pickled."""
    return {
        "id": number,
        "name": f"user{number}",
        "plan": "pro",
        "tags": ["a", "b"],
        "score": number / 7,
    }


def shuffled(numbers: Iterable[int]) -> list[int]:
    """Return the numbers in an order that is the same in every run."""
    found = list(numbers)
    random.Random(SEED).shuffle(found)
    return found


def chunks(numbers: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(numbers)
    while chunk := list(islice(iterator, size)):
        yield chunk
