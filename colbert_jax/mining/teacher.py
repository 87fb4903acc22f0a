"""Teachers: models that score a query and a document, for a student to be distilled from.

A cross-encoder reads both together, as ColBERTv2's teacher did (Santhanam et al., 2022, section
3.2). Weaker teachers are a bi-encoder, which compares a vector of each, and a late-interaction
model, which compares their tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax import runtime
from colbert_jax.batching import Batch, BatchRunner, ladder_length, one_ahead, pad_rows
from colbert_jax.checkpoints import Checkpoint, bi_encoder, cross_encoder, detect_layout, hub
from colbert_jax.checkpoints.bi_encoder import SingleVector
from colbert_jax.checkpoints.common import fingerprint
from colbert_jax.colbert import ColBERT
from colbert_jax.models.cross_encoder import pair_scores
from colbert_jax.models.pooling import sentence_embeddings
from colbert_jax.progress import progress_bar
from colbert_jax.scoring.maxsim import maxsim_ragged
from colbert_jax.text import TokenIds, as_texts


def load_teacher(
    name_or_path: str | Path,
    *,
    maxlen: int | None = None,
    dtype: Any = None,
    devices: Sequence[jax.Device] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> CrossEncoder | BiEncoder | LateInteraction:
    """Load a teacher from a folder or the hub; its files tell which kind it is.

    A `config.json` that names a sequence classifier is a cross-encoder. A single-vector model of
    sentence-transformers is a bi-encoder, and so is a plain encoder, with mean pooling; its token
    embeddings are a teacher as `LateInteraction(ColBERT.from_pretrained(...))`. A late-interaction
    checkpoint of any layout scores as it retrieves.

    Args:
      name_or_path: a folder or a Hugging Face hub id.
      maxlen: tokens that a text, or a pair of a cross-encoder, is cut to. If None, what the
        files say, else all positions. Stanford's scorer has 180.
      dtype: of the dense layers. If None, bfloat16 on accelerators, float32 on a CPU.
      devices: if None, all local ones.
      revision, token: for the hub.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    folder = hub.resolve(name_or_path, revision=revision, token=token)
    if cross_encoder.detect(folder):
        return CrossEncoder(cross_encoder.read(folder), maxlen=maxlen, dtype=dtype, devices=devices)
    layout = detect_layout(folder)
    if layout == "single-vector":
        checkpoint, kind = bi_encoder.read(folder)
    elif layout == "huggingface":
        checkpoint, kind = bi_encoder.read_plain(folder)
    else:
        cut: dict[str, Any] = (
            {} if maxlen is None else {"query_maxlen": maxlen, "doc_maxlen": maxlen}
        )
        model = ColBERT.from_pretrained(folder, dtype=dtype, devices=devices, images=None, **cut)
        return LateInteraction(model)
    return BiEncoder(checkpoint, kind, maxlen=maxlen, dtype=dtype, devices=devices)


class BiEncoder:
    """A single-vector model: a pair's score is the similarity of its two vectors.

    Attributes:
      dim: width of the vectors, H.
      fingerprint: a short hash of settings and weights, equal for teachers that score equally.
      pairs_at_once: how many pairs are compared at a time; bounds the memory.
    """

    pairs_at_once = 4096

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: SingleVector,
        *,
        maxlen: int | None = None,
        dtype: Any = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Arguments: what `checkpoints.bi_encoder.read` returned, the rest as of `load_teacher`."""
        encoder = checkpoint.encoder
        maxlen = checkpoint.config.text.doc_maxlen if maxlen is None else maxlen
        _check_maxlen(maxlen, checkpoint)
        text = dataclasses.replace(checkpoint.config.text, query_maxlen=maxlen, doc_maxlen=maxlen)
        self._tokenizer = checkpoint.with_text_config(text).text_tokenizer()
        self._kind, self.dim = kind, encoder.dim
        dtype = runtime.compute_dtype() if dtype is None else jnp.dtype(dtype)
        self._runner = BatchRunner(devices, encoder.backbone.max_length)
        self._params = self._runner.put(checkpoint.params)
        self._program = self._runner.program(
            lambda params, ids, attended: sentence_embeddings(
                encoder,
                params,
                ids,
                attended,
                pooling=kind.pooling,
                normalized=kind.normalized,
                dtype=dtype,
            ),
            2,
        )
        known = ["bi-encoder", dataclasses.asdict(text), dataclasses.asdict(kind), str(dtype)]
        known += [self._tokenizer.fingerprint, dataclasses.asdict(encoder)]
        self.fingerprint = fingerprint(known, checkpoint.params)

    def encode_queries(
        self, queries: str | Sequence[str], *, progress: bool | None = False
    ) -> np.ndarray:
        """Embed queries, float32[N, H], of unit length where the model's own modules say so."""
        return self._encode(as_texts(queries, "query"), True, "queries", progress)

    def encode_documents(
        self, documents: str | Sequence[str], *, progress: bool | None = None
    ) -> np.ndarray:
        """Embed documents, float32[N, H]. If `progress` is None, a bar shows on a terminal."""
        return self._encode(as_texts(documents, "document"), False, "documents", progress)

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Score pairs, queries[i] with documents[i]. Each distinct text is embedded once.

        Returns:
          float32[N].

        Raises:
          ValueError, TypeError: lists of different lengths, or anything in them but texts.
        """
        (q, rows_q), (d, rows_d) = _encode_pairs(self, queries, documents, progress)
        return self.similarity(q, d, rows_q, rows_d)

    def similarity(
        self, queries: np.ndarray, documents: np.ndarray, rows_q: np.ndarray, rows_d: np.ndarray
    ) -> np.ndarray:
        """Score the pairs (rows_q[i], rows_d[i]) of vectors [., H]: float32[N]."""

        def compare(rows_q: np.ndarray, rows_d: np.ndarray) -> np.ndarray:
            q, d = queries[rows_q], documents[rows_d]
            if self._kind.similarity == "cosine" and not self._kind.normalized:
                q, d = _unit(q), _unit(d)
            return np.einsum("nh,nh->n", q, d)

        return _in_parts(compare, rows_q, rows_d, self.pairs_at_once)

    def _encode(
        self, texts: list[str], is_query: bool, name: str, progress: bool | None
    ) -> np.ndarray:
        tokenize = self._tokenizer.queries if is_query else self._tokenizer.documents
        parts = [np.zeros((0, self.dim), np.float32)]
        with progress_bar(len(texts), f"teacher: {name}", "text", progress) as bar:
            for token_ids in one_ahead(tokenize, self._runner.windows(texts)):
                parts.append(self._embed(token_ids, bar))
        return np.concatenate(parts)

    def _embed(self, token_ids: TokenIds, bar: Any) -> np.ndarray:
        out = np.empty((len(token_ids.ids), self.dim), np.float32)
        pad = self._tokenizer.special.pad
        _run(self._runner, self._program, self._params, token_ids.ids, pad, [], out, bar)
        return out


class LateInteraction:
    """A late-interaction model as a teacher: a pair's score is the sum, over the query's tokens, of
    the best similarity with a token of the document.

    Attributes:
      fingerprint: a short hash of settings and weights, equal for teachers that score equally.
      pairs_at_once: how many pairs are compared at a time; bounds the memory.
    """

    pairs_at_once = 4096

    def __init__(self, model: ColBERT):
        self._model = model
        known = ["late interaction", model.fingerprint(), repr(model.config.text)]
        self.fingerprint = fingerprint(known, model.query_params)

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Score pairs, queries[i] with documents[i]: float32[N], as `BiEncoder.score`."""
        with runtime.apart():
            return self._score(*_encode_pairs(self._model, queries, documents, progress))

    def _score(self, queries: Any, documents: Any) -> np.ndarray:
        (q, rows_q), (d, rows_d) = queries, documents
        values, offsets = jnp.asarray(d.values), jnp.asarray(d.offsets, jnp.int32)
        length = ladder_length(int(d.lengths.max(initial=1)))

        def compare(rows_q: np.ndarray, rows_d: np.ndarray) -> np.ndarray:
            rows, ids = jnp.asarray(q[rows_q]), rows_d.astype(np.int32)[:, None]
            return np.asarray(maxsim_ragged(rows, values, offsets, ids, length=length))[:, 0]

        return _in_parts(compare, rows_q, rows_d, self.pairs_at_once)


class CrossEncoder:
    """A model that reads query and document together; a pair's score is its raw logit.

    Attributes:
      fingerprint: a short hash of settings and weights, equal for teachers that score equally.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        maxlen: int | None = None,
        dtype: Any = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Arguments: what `checkpoints.cross_encoder.read` returned, and as of `load_teacher`."""
        encoder = checkpoint.encoder
        self.maxlen = checkpoint.config.text.doc_maxlen if maxlen is None else maxlen
        _check_maxlen(self.maxlen, checkpoint)
        self._texts = checkpoint.text_tokenizer()  # for its checks
        self._tokenizer = checkpoint.tokenizer.tokenizer
        cross_encoder.check_pairs(checkpoint)
        self._tokenizer.enable_truncation(
            self.maxlen,
            strategy="longest_first",
            direction=checkpoint.tokenizer.truncation_side,
        )
        dtype = runtime.compute_dtype() if dtype is None else jnp.dtype(dtype)
        self._runner = BatchRunner(devices, encoder.backbone.max_length)
        self._params = self._runner.put(checkpoint.params)
        self._program = self._runner.program(
            lambda params, *batch: pair_scores(encoder, params, *batch, dtype=dtype), 3
        )
        known = ["cross-encoder", self.maxlen, str(dtype), self._texts.fingerprint]
        self.fingerprint = fingerprint([*known, dataclasses.asdict(encoder)], checkpoint.params)

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Score pairs, queries[i] with documents[i]: float32[N], as `BiEncoder.score`."""
        queries, documents = _pairs(queries, documents)
        parts = [np.zeros(0, np.float32)]
        pairs = list(zip(queries, documents, strict=True))
        with progress_bar(len(pairs), "teacher", "pair", progress) as bar:
            for tokens in one_ahead(self._tokenize, self._runner.windows(pairs)):
                parts.append(self._score(*tokens, bar))
        return np.concatenate(parts)

    def _tokenize(self, pairs: list[tuple[str, str]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each pair the ids of `[CLS] query [SEP] document [SEP]`, and the token types."""
        try:
            encodings = self._tokenizer.encode_batch_fast(pairs)
        except (TypeError, UnicodeEncodeError):
            queries, documents = zip(*pairs, strict=True)
            self._texts.queries(queries)  # raise an error that names the text
            self._texts.documents(documents)
            raise
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids, [np.array(encoding.type_ids, np.int32) for encoding in encodings]

    def _score(self, ids: list[np.ndarray], types: list[np.ndarray], bar: Any) -> np.ndarray:
        out = np.empty(len(ids), np.float32)
        pad = self._texts.special.pad
        _run(self._runner, self._program, self._params, ids, pad, [types], out, bar)
        return out


def _run(
    runner: BatchRunner,
    program: Callable[..., jax.Array],
    params: dict,
    ids: list[np.ndarray],
    pad: int,
    others: list[list[np.ndarray]],
    out: np.ndarray,
    bar: Any,
) -> None:
    """out[i] = program(params, ids, attended, *others) of row i; `others` are padded with zeros."""
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))

    def work(batch: Batch) -> None:
        size, length, rows = batch.size, batch.length, batch.rows
        arrays = [pad_rows([column[i] for i in rows], size, length) for column in others]
        result = runner.run(
            program,
            params,
            pad_rows([ids[i] for i in rows], size, length, pad),
            np.pad(lengths[rows], (0, size - len(rows))),
            *arrays,
        )
        out[rows] = result[: len(rows)]

    runner.for_each(lengths, work, bar)


def _check_maxlen(maxlen: int, checkpoint: Checkpoint) -> None:
    positions = checkpoint.encoder.backbone.max_length
    if isinstance(maxlen, bool) or not isinstance(maxlen, int) or not 3 <= maxlen <= positions:
        raise ValueError(
            f"maxlen must be a whole number from 3 to {positions}, the positions of "
            f"{checkpoint.folder}, got {maxlen!r}"
        )


def _pairs(queries: Sequence[str], documents: Sequence[str]) -> tuple[list[str], list[str]]:
    if isinstance(queries, str) or isinstance(documents, str):
        raise TypeError("score takes two lists of texts, got one string")
    queries, documents = as_texts(queries, "query"), as_texts(documents, "document")
    if len(queries) != len(documents):
        raise ValueError(
            f"score takes pairs, got {len(queries)} queries and {len(documents)} documents"
        )
    return queries, documents


def _encode_pairs(
    model: BiEncoder | ColBERT,
    queries: Sequence[str],
    documents: Sequence[str],
    progress: bool | None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[Any, np.ndarray]]:
    """What the model makes of the distinct queries and documents, and which of them each pair has.

    Raises ValueError or TypeError as `_pairs` does.
    """
    queries, documents = _pairs(queries, documents)
    (queries, rows_q), (documents, rows_d) = _distinct(queries), _distinct(documents)
    q = model.encode_queries(queries, progress=progress)
    return (q, rows_q), (model.encode_documents(documents, progress=progress), rows_d)


def _in_parts(
    compare: Callable[..., np.ndarray], rows_q: np.ndarray, rows_d: np.ndarray, size: int
) -> np.ndarray:
    """compare(rows_q, rows_d) of `size` pairs at a time: float32[N]."""
    starts = range(0, len(rows_q), size)
    parts = [compare(rows_q[i : i + size], rows_d[i : i + size]) for i in starts]
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32, copy=False)


def _distinct(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """The distinct texts in the order of first appearance, and of each text its place there."""
    places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(places), np.fromiter((places[text] for text in texts), np.int64, len(texts))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
