"""Which documents training and evaluation are made of, as the configuration says."""

from __future__ import annotations

import numpy as np

from farspan.data.corpus import Corpus
from farspan.data.documents import Documents, Selection
from farspan.data.errors import DataError
from farspan.data.prepared import Prepared
from farspan.trainer.config import RunConfig
from farspan.trainer.data_config import PartSection


def training_documents(config: RunConfig, prepared: Prepared) -> dict[str, Documents]:
    """By the names of a blend's parts; all of them, without a name, where nothing is blended.

    DataError where a part has none, or Star Attention is to take contexts from documents that do not tell them.
    """
    corpus, blend = Corpus(prepared, "train"), config.data.blend
    parts: dict[str, Documents] = {"": corpus}
    if blend is not None:
        parts = {name: _select(corpus, prepared, name, part) for name, part in blend.parts.items()}
    for documents in parts.values():
        _check_contexts(config, documents)
    return parts


def heldout_documents(config: RunConfig, prepared: Prepared) -> Documents:
    """All that are held out; of these, where Star Attention asks for contexts, those that tell them.

    DataError where none does.
    """
    corpus = Corpus(prepared, "heldout")
    if _asks_for_contexts(config) and corpus.told.any():
        return Selection(corpus, np.flatnonzero(corpus.told))
    _check_contexts(config, corpus)
    return corpus


def check_documents(config: RunConfig, prepared: Prepared) -> None:
    """DataError where documents of either split do not go with the configuration; no row is made."""
    data = config.data
    whole = data.method in ("best_fit", "padded") and data.overlong != "split"
    for documents in (heldout_documents(config, prepared), *training_documents(config, prepared).values()):
        if documents.told.any() and not whole:
            method = "" if data.method in ("best_fit", "padded") else "data.method to best_fit or padded, and "
            raise DataError(
                f"data.directory holds conversations, which data.method {data.method} with data.overlong "
                f"{data.overlong} would cut: set {method}data.overlong to drop or truncate, or leave them out with "
                "data.blend.parts."
            )


def _asks_for_contexts(config: RunConfig) -> bool:
    return config.attention.star is not None and config.attention.star.mode == "sft"


def _check_contexts(config: RunConfig, documents: Documents) -> None:
    if _asks_for_contexts(config) and not documents.told.all():
        silent, count = np.count_nonzero(~documents.told), len(documents.told)
        raise DataError(
            f"attention.star.mode sft takes the end of each context from the data, and {silent:,} of {count:,} "
            f"documents of the {documents.split} split do not tell it: give their data.sources a chat_template, leave "
            "them out with data.blend.parts, or set attention.star.mode to lm."
        )


def _select(corpus: Corpus, prepared: Prepared, name: str, part: PartSection) -> Selection:
    source, key = part.source or name, f"data.blend.parts.{name}"
    if source not in prepared.sources:
        given = f"{key}.source is" if part.source else f"{key} has the name of a source,"
        raise DataError(
            f"{given} {source!r}, which data.directory does not have: set {key}.source to one of "
            f"{', '.join(prepared.sources)}."
        )
    here = prepared.sources[source][corpus.split]
    lengths = corpus.lengths[here.start : here.stop]
    longest = int(lengths.max(initial=0))
    fits = (lengths >= part.min_tokens) & (lengths <= (part.max_tokens or longest))
    if not fits.any():
        most = "" if part.max_tokens is None else f" and of {part.max_tokens:,} at most"
        raise DataError(
            f"{key} has no document of {part.min_tokens:,} tokens or more{most} among {len(lengths):,} of the "
            f"{corpus.split} split, of which the longest has {longest:,}: change its min_tokens or max_tokens, or "
            "leave it out."
        )
    return Selection(corpus, here.start + np.flatnonzero(fits))
