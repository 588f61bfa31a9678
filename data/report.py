"""What a preparation made of its sources: as JSON, as text, and as a picture."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farspan.data.errors import DataError
from farspan.data.histogram import Histogram

REPORT = "report.json"
_TEXT = "report.txt"
_PICTURE = "lengths.png"


def describe(
    documents: Mapping[str, NDArray[np.int64]],
    sources: Mapping[str, Mapping[str, range]],
    dropped: Sequence[Counter[str]],
) -> dict[str, Any]:
    """Counts by source and of all: documents, tokens, bytes of text, bytes a token, what was dropped, and lengths.

    documents: by split, tokens, bytes of text and notes of each document, int64 [documents, 3].
    """
    parts = [
        [documents[split][here.start : here.stop] for split, here in ranges.items()] for ranges in sources.values()
    ]
    return {
        "all": _counts(list(documents.values()), sum(dropped, Counter())),
        "sources": {name: _counts(part, counts) for name, part, counts in zip(sources, parts, dropped, strict=True)},
        "lengths": Histogram.of(_lengths(documents)).as_json(),
    }


def _lengths(documents: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([records[:, 0] for records in documents.values()])


def _counts(parts: Sequence[NDArray[np.int64]], dropped: Counter[str]) -> dict[str, Any]:
    """Of documents in several parts, which are not copied: there may be very many."""
    size = sum(int(part[:, 1].sum()) for part in parts)
    tokens = sum(int(part[:, 0].sum(where=part[:, 1] > 0)) for part in parts)  # those that came from text
    return {
        "documents": sum(map(len, parts)),
        "tokens": sum(int(part[:, 0].sum()) for part in parts),
        "text_bytes": size,
        "bytes_per_token": round(size / tokens, 4) if tokens else None,
        "dropped": dict(sorted(dropped.items())),
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for people to read."""
    width = max(len(name) for name in (*report["sources"], "source", "all"))
    table = [f"{'source':{width}} {'documents':>12} {'tokens':>16} {'text MB':>12} {'bytes/token':>11}"]
    for name, counts in (*report["sources"].items(), ("all", report["all"])):
        ratio = f"{counts['bytes_per_token']:.2f}" if counts["bytes_per_token"] else "-"
        table.append(
            f"{name:{width}} {counts['documents']:>12,} {counts['tokens']:>16,} {counts['text_bytes'] / 1e6:>12,.1f} "
            f"{ratio:>11}"
        )
    for name, counts in report["sources"].items():
        table.extend(f"dropped of {name}: {number:,} {reason}" for reason, number in counts["dropped"].items())
    return table


def write_report(report: Mapping[str, Any], documents: Mapping[str, NDArray[np.int64]], folder: Path) -> list[str]:
    """Writes `report.json`, `report.txt` and, where matplotlib is installed, `lengths.png`. Returns the text."""
    lengths = _lengths(documents)
    text = [*lines(report), "", *Histogram.of(lengths).lines()]
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / _TEXT).write_text("\n".join(text) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        return [*text, f"no picture of the lengths ({_PICTURE}), for which matplotlib is needed: farspan[plot]"]
    plot_lengths(lengths, folder / _PICTURE)
    return text


def read_report(folder: Path) -> list[str]:
    """The table of sources that `write_report` has left in a folder; nothing where it was removed."""
    path = folder / REPORT
    return lines(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def check_plot(path: Path) -> None:
    """DataError unless a picture can be drawn there."""
    if find_spec("matplotlib") is None:
        raise DataError("--plot needs matplotlib: pip install 'farspan[plot]'")
    from matplotlib.figure import Figure

    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise DataError(f"--plot {path}: the name must end in one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise DataError(f"--plot {path}: there is no folder {path.parent}")


def plot_lengths(lengths: NDArray[np.int64], path: Path) -> None:
    """Documents and tokens by the length of documents, in powers of two, and the share of both up to each length."""
    from matplotlib.figure import Figure

    histogram = Histogram.of(lengths)
    rows = np.arange(histogram.first, len(histogram.documents))
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    counts, shares = figure.subplots(1, 2)
    for offset, name, values in ((0.3, "documents", histogram.documents), (0.7, "tokens", histogram.tokens)):
        share = values[rows] / max(1, values.sum())
        counts.bar(rows + offset, share, 0.4, label=name)
        shares.plot(rows + 1, np.cumsum(share), marker="o", label=name)
    for axes, words in ((counts, "share in documents of this length"), (shares, "share in shorter documents")):
        axes.set(xlabel="tokens a document", ylabel=words)
        marks = np.arange(histogram.first, len(histogram.documents) + 1)
        axes.set_xticks(marks, [_short(1 << int(row)) for row in marks], fontsize="small")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _short(tokens: int) -> str:
    for size, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if tokens >= size:
            return f"{tokens // size}{letter}"
    return str(tokens)
