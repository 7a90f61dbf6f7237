import gzip
import json

import pytest


@pytest.fixture(scope="session")
def prepared_rows(tmp_path_factory):
    """One cache for all tests, so that later tests reuse prepared rows."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(prepared_rows, monkeypatch):
    monkeypatch.setenv("LPO_CACHE", str(prepared_rows))


@pytest.fixture
def write(tmp_path):
    """Write rows to a file in the format given by its name; return its path."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        else:
            whole = name.removesuffix(".gz").endswith(".json")
            text = json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows)
            path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write
