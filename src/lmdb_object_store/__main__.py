"""Run the command line: ``python -m lmdb_object_store``."""

from ._cli import run

if __name__ == "__main__":
    raise SystemExit(run())
