"""Stanford ColBERT's PLAID indexes: torch files and JSON, read and written without torch.

The files are those of colbert-ai 0.2.22 (`indexing/collection_indexer.py`, `index_updater.py`).
Older indexes differ in the inverted lists (`ivf.pt`) and in types, which are all read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.embeddings import offsets_from_lengths
from colbert_jax.files import present, replacing, write_json
from colbert_jax.index.folder import naming
from colbert_jax.index.format import IndexFormatError
from colbert_jax.index.layouts.stored import (
    DiskIndex,
    are_lengths,
    checked_rows,
    make_codec,
    read_fields,
    read_lengths,
    require,
)
from colbert_jax.tensors.stored import Stored
from colbert_jax.tensors.torch_file import Streamed, read_torch_file, write_torch_file

CHUNK_DOCUMENTS = 25_000  # the library's own limit
_SPARE = 512  # rows that the library keeps behind the last token, and that may have been saved


# --- Reading --------------------------------------------------------------------------------


def read_stanford(folder: Path) -> DiskIndex:
    """An index of Stanford ColBERT. All but the large arrays is read and checked.

    A document that was removed there has no token. Where only the lists of embeddings of older
    versions are there (`ivf.pt`), the result has no inverted lists.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing, damaged or inconsistent.
    """
    settings = folder / "metadata.json"
    metadata = read_fields(settings, config=dict, num_chunks=int)
    config = metadata["config"]
    for name in ("dim", "nbits"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise IndexFormatError(
                f"{settings}: config.{name} must be a whole number, got {config.get(name)!r}"
            )
    dim, nbits = config["dim"], config["nbits"]
    buckets = folder / "buckets.pt"
    cutoffs, weights = (tensor.read() for tensor in _tensors(buckets, 2))
    codec = make_codec(
        dict(
            settings=settings,
            centroids=folder / "centroids.pt",
            cutoffs=buckets,
            weights=buckets,
        ),
        centroids=_tensors(folder / "centroids.pt", 1)[0].read(),
        cutoffs=cutoffs,
        weights=weights,
        dim=dim,
        nbits=nbits,
    )
    num_centroids = len(codec.centroids)
    if metadata.get("num_partitions", num_centroids) != num_centroids:
        raise IndexFormatError(
            f"{folder / 'centroids.pt'}: holds {num_centroids} centroids, but {settings.name} says "
            f"num_partitions {metadata['num_partitions']!r}"
        )
    lengths, codes, residuals, passages = [], [], [], 0
    for i in range(metadata["num_chunks"]):
        chunk = _chunk_lengths(folder, i, passages)
        passages += len(chunk)
        tokens, spare = int(chunk.sum()), _SPARE if i == metadata["num_chunks"] - 1 else 0
        stored = _tensors(folder / f"{i}.codes.pt", 1)[0]
        codes.append(checked_rows(stored, "iu", (), tokens, spare))
        stored = _tensors(folder / f"{i}.residuals.pt", 1)[0]
        residuals.append(checked_rows(stored, "u", (dim * nbits // 8,), tokens, spare))
        lengths.append(chunk)
    lists, list_lengths = _lists(folder, num_centroids)
    name = config.get("checkpoint")
    return DiskIndex(
        layout="stanford",
        folder=folder,
        codec=codec,
        lengths=np.concatenate([np.zeros(0, np.int64), *lengths]),
        codes=codes,
        residuals=residuals,
        lists=lists,
        list_lengths=list_lengths,
        config=config,
        checkpoint=name if isinstance(name, str) and name else None,
        avg_residual=_avg_residual(folder / "avg_residual.pt"),
    )


def _chunk_lengths(folder: Path, i: int, passages: int) -> np.ndarray:
    """The lengths of a chunk's documents.

    Its `num_embeddings` and `embedding_offset` are not looked at: the library's updater gets them
    wrong, and its search does not use them.
    """
    chunk = read_lengths(folder / f"doclens.{i}.json")
    file = folder / f"{i}.metadata.json"
    fields = read_fields(file, passage_offset=int, num_passages=int)
    if (fields["passage_offset"], fields["num_passages"]) != (passages, len(chunk)):
        raise IndexFormatError(
            f"{file}: says {fields['num_passages']} passages from {fields['passage_offset']} on, "
            f"but doclens.{i}.json holds {len(chunk)} and {passages} come before"
        )
    return chunk


def _tensors(file: Path, count: int) -> tuple[Stored, ...]:
    """The tensor of a torch file, or the tuple of two."""
    require(file)
    value = read_torch_file(file)
    found = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(found) != count or not all(isinstance(tensor, Stored) for tensor in found):
        expected = "one tensor" if count == 1 else f"a tuple of {count} tensors"
        raise IndexFormatError(f"{file}: expected {expected}")
    return found


def _avg_residual(file: Path) -> float | None:
    """A scalar, of older versions in one dimension. Nothing depends on it."""
    if not present(file):
        return None
    value = _tensors(file, 1)[0].read()
    if value.size == 0 or value.dtype.kind != "f":
        raise IndexFormatError(f"{file}: expected a float, got {value.dtype} {list(value.shape)}")
    return float(value.astype(np.float64).mean())


def _lists(folder: Path, num_centroids: int) -> tuple[Stored | None, np.ndarray | None]:
    """Inverted lists and their lengths, without the zeros that may follow the last."""
    file = folder / "ivf.pid.pt"
    if not present(file) and present(folder / "ivf.pt"):
        return None, None
    lists, sizes = _tensors(file, 2)
    lengths = sizes.read()
    right = lengths.dtype.kind in "iu" and lengths.shape == (num_centroids,)
    if not right or not are_lengths(lengths):
        raise IndexFormatError(
            f"{file}: expected the lengths of {num_centroids} lists, found {lengths.dtype} "
            f"{list(lengths.shape)}"
        )
    lengths = lengths.astype(np.int64)
    total = int(lengths.sum())
    if lists.dtype.kind not in "iu" or len(lists.shape) != 1 or lists.shape[0] < total:
        raise IndexFormatError(
            f"{file}: holds {lists.dtype} {list(lists.shape)}, but the lists' lengths add up to "
            f"{total}"
        )
    return lists.rows(0, total), lengths


# --- Writing --------------------------------------------------------------------------------


def check_stanford(index: DiskIndex) -> None:
    """Raises ValueError where the library could not read the index that `write_stanford` writes."""
    if index.dim % 8:
        raise ValueError(
            f"{index.folder}: {index.dim} dimensions: Stanford ColBERT reads multiples of 8 only"
        )


def write_stanford(
    index: DiskIndex,
    folder: Path,
    config: Mapping[str, Any],
    chunk_documents: int = CHUNK_DOCUMENTS,
) -> Iterator[int]:
    """Fill a folder with an index's files, a block of tokens in memory at a time.

    Args:
      index: its inverted lists must be there.
      config: settings for `metadata.json` beside dim and nbits.
      chunk_documents: most documents of a chunk.

    Yields:
      The number of documents written since, for a progress bar.
    """
    assert index.lists is not None and index.list_lengths is not None
    codec, dim, nbits = index.codec, index.dim, index.codec.nbits
    average = index.avg_residual
    if average is None:  # the weights stand for equal shares of the components
        average = float(np.abs(codec.bucket_weights).mean())
    _write_torch(folder / "centroids.pt", codec.centroids.astype(np.float16))
    _write_torch(folder / "buckets.pt", (codec.bucket_cutoffs, codec.bucket_weights))
    _write_torch(folder / "avg_residual.pt", np.array(average, np.float32))
    _write_torch(
        folder / "ivf.pid.pt",
        (
            _streamed(np.int32, (_padded_size(index.list_lengths),), lambda: _padded_lists(index)),
            index.list_lengths,
        ),
    )
    offsets = offsets_from_lengths(index.lengths)
    row = index.residuals[0].shape[1:]
    starts = range(0, len(index.lengths), chunk_documents)
    for i, first in enumerate(starts):
        lengths = index.lengths[first : first + chunk_documents]
        begin, end = int(offsets[first]), int(offsets[first + len(lengths)])
        codes = _streamed(np.int32, (end - begin,), lambda b=begin, e=end: index.code_blocks(b, e))
        _write_torch(folder / f"{i}.codes.pt", codes)
        residuals = _streamed(
            np.uint8, (end - begin, *row), lambda b=begin, e=end: index.residual_blocks(b, e)
        )
        _write_torch(folder / f"{i}.residuals.pt", residuals)
        _write_text(folder / f"doclens.{i}.json", [json.dumps(lengths.tolist()).replace(" ", "")])
        chunk = {
            "passage_offset": first,
            "num_passages": len(lengths),
            "num_embeddings": end - begin,
            "embedding_offset": begin,
        }
        _write_json(folder / f"{i}.metadata.json", chunk)
        yield len(lengths)
    average_length = index.num_tokens / len(index.lengths)
    shared = {
        "config": {**config, "dim": dim, "nbits": nbits},
        "num_chunks": len(starts),
        "num_partitions": index.num_centroids,
    }
    estimates = {
        "num_embeddings_est": float(index.num_tokens),
        "avg_doclen_est": average_length,
    }
    _write_json(folder / "plan.json", shared | estimates)
    totals = {"num_embeddings": index.num_tokens, "avg_doclen": average_length}
    _write_json(folder / "metadata.json", shared | totals)


def write_collection(folder: Path, texts: Iterable[str]) -> Path:
    """`collection.tsv` as the library reads it: position, tab, text on one line each."""
    file = folder / "collection.tsv"
    blanks = str.maketrans("\t\n\r", "   ")
    _write_text(file, (f"{i}\t{text.translate(blanks)}\n" for i, text in enumerate(texts)))
    return file


def write_pids(folder: Path, pids: Iterable[str]) -> None:
    """`pids.jsonl`, the documents' own ids by position, which the library has no place for."""
    lines = (json.dumps(pid, ensure_ascii=False) + "\n" for pid in pids)
    _write_text(folder / "pids.jsonl", lines)


def write_fields(folder: Path, fields: Iterable[Mapping[str, Any]]) -> None:
    """`fields.jsonl`, the documents' fields by position, dates as ISO writes them; the library has
    no place for them either."""
    as_iso = methodcaller("isoformat")
    lines = (json.dumps(one, ensure_ascii=False, default=as_iso) + "\n" for one in fields)
    _write_text(folder / "fields.jsonl", lines)


def _write_torch(file: Path, value: Any) -> None:
    with naming(file):
        write_torch_file(file, value)


def _write_json(file: Path, value: Any) -> None:
    with naming(file):
        write_json(file, value)


def _write_text(file: Path, parts: Iterable[str]) -> None:
    with naming(file), replacing(file) as stream:
        stream.writelines(parts)


def _streamed(dtype: Any, shape: tuple[int, ...], blocks: Any) -> Streamed:
    return Streamed(np.dtype(dtype), shape, blocks)


def _padded_size(list_lengths: np.ndarray) -> int:
    """With as many zeros as the longest list has entries, unless it is the last: the library reads
    every list with the length of a longer one."""
    longest = int(list_lengths.max())
    return int(list_lengths.sum()) + (longest if longest > list_lengths[-1] else 0)


def _padded_lists(index: DiskIndex) -> Iterator[np.ndarray]:
    assert index.list_lengths is not None
    yield from index.list_blocks()
    yield np.zeros(_padded_size(index.list_lengths) - int(index.list_lengths.sum()), np.int32)
