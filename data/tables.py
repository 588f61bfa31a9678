"""Texts of tables: Parquet, and the Arrow streams that Hugging Face's `datasets` saves."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.data.errors import DataError
from farspan.data.sources import InputFile

if TYPE_CHECKING:
    import pyarrow

_ROWS = 64  # rows that are decoded at once
_BUFFER = 1 << 19  # bytes of a column that are read at once


def columns(file: InputFile, skip: int, text_key: str) -> Iterator[tuple[pyarrow.Array, int]]:
    """A table's texts as bytes, which need be no UTF-8, some rows at a time, and the number of all its rows; the first
    `skip` rows are left out."""
    need_pyarrow(file.path)
    import pyarrow
    import pyarrow.parquet

    if file.kind == "parquet":
        # Not a whole row group at once: these can be gigabytes.
        table = pyarrow.parquet.ParquetFile(file.path, buffer_size=_BUFFER, pre_buffer=False)
        _check_column(file, table.schema_arrow, text_key)
        rows = table.metadata.num_rows
        groups: list[int] = []
        for group in range(table.num_row_groups):
            if skip >= (size := table.metadata.row_group(group).num_rows) and not groups:
                skip -= size
            else:
                groups.append(group)
        batches = table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[text_key]) if groups else iter(())
    else:
        with pyarrow.memory_map(str(file.path)) as mapped:
            rows = sum(len(batch) for batch in pyarrow.ipc.open_stream(mapped))
        stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file.path)))
        _check_column(file, stream.schema, text_key)
        batches = (batch.slice(first, _ROWS) for batch in stream for first in range(0, len(batch), _ROWS))
    for batch in batches:
        column = batch.column(text_key)
        left, skip = column.slice(min(skip, len(column))), max(0, skip - len(column))
        if len(left):
            yield left.cast(pyarrow.large_binary()), rows


def _check_column(file: InputFile, schema: pyarrow.Schema, text_key: str) -> None:
    import pyarrow

    if text_key not in schema.names:
        raise DataError(
            f"{file.path} of data.sources has no column {text_key!r}, but {', '.join(schema.names)}: name the one "
            "that holds the text in the source's text_key."
        )
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(
            f"{file.path} of data.sources has {kind} in its column {text_key!r}, and not text: name another one in "
            "the source's text_key."
        )


def need_pyarrow(path: Path) -> None:
    """Raises DataError where the package is missing."""
    if find_spec("pyarrow") is None:
        raise DataError(f"{path} of data.sources needs the package pyarrow: pip install 'farspan[data]'.")
