"""`ColBERT`: texts, and images where a model has an encoder for them, to token embeddings; the
tokenizer, the encoder, and the batching between them."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from colbert_jax import runtime
from colbert_jax.batching import (
    Batch,
    BatchRunner,
    ladder_length,
    one_ahead,
    over_rows,
    pad_rows,
)
from colbert_jax.checkpoints import Checkpoint, hub, read_checkpoint, write_checkpoint
from colbert_jax.checkpoints.common import fingerprint
from colbert_jax.compression.pooling import pool_tokens
from colbert_jax.config import ColBERTConfig, TextConfig, check_pooling
from colbert_jax.embeddings import DocumentEmbeddings, offsets_from_lengths
from colbert_jax.explanation import Explanation
from colbert_jax.models.colbert import (
    EncoderConfig,
    TokenEncoder,
    make_encoder,
    quantize,
    resolve_quantization,
)
from colbert_jax.multimodal import NO_IMAGES, ImagePart, Items, Query, as_items, in_order
from colbert_jax.progress import progress_bar
from colbert_jax.scoring.interactions import interact
from colbert_jax.search.arrays import Hits, check_k
from colbert_jax.search.raw import RawSearch
from colbert_jax.text import TextTokenizer, TokenIds, as_texts
from colbert_jax.three_way import (
    check_weights,
    encode_three_ways,
    lexical_scores,
    three_way_program,
)

_DOCUMENT_SETTINGS = (
    "doc_maxlen",
    "doc_token_id",
    "mask_punctuation",
    "skiplist_words",
    "keep_only_token_ids",
    "doc_prompt",
    "strip",
    "lowercase",
)

_POOLING_SETTINGS = ("pool_factor", "pool_protected", "pool_normalize")


class ColBERT:
    """A late-interaction encoder: texts in, token embeddings of unit length out.

    Make one with `ColBERT.from_pretrained`. Encoding runs on all local devices: parameters are
    replicated and the batch axis is sharded.

    A query is a text or, for a model with an image encoder, a pair (text, image) in a list: an
    image is a path, bytes, a PIL image or an array (`images`), or None for a text alone.

    Attributes:
      images: the image encoder (`multimodal.ImagePart`); None for a model of texts.
      positions: tokens that a text may have at most, by the encoder.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        load: dict[str, Any] | None = None,
        dtype: jnp.dtype | None = None,
        quantization: str | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """
        Args:
          checkpoint: what `checkpoints.read_checkpoint` returned.
          load: arguments of `from_pretrained` that load the same model again, for an index to
            remember. If None, the checkpoint's folder.
          dtype: of the dense layers' computation. If None, bfloat16 on accelerators and float32 on
            a CPU.
          quantization: "int8" makes the backbone's dense layers multiply 8-bit integers
            (`models.int8`), at a small loss of quality: four times smaller, and faster on devices
            with int8 units and on CPUs with VNNI. "int8-documents" does so for documents and keeps
            float weights for queries beside it, which loses less. "auto" is that on such CPUs and
            None elsewhere; which of them it became is in `quantization` and in the indexes that
            the model builds. If None, no quantization.
          devices: to encode on. If None, all local devices.

        Raises:
          ValueError: texts may be longer than the encoder has positions, or an unknown
            quantization.
        """
        quantization = resolve_quantization(quantization)
        runtime.check_process()
        config, encoder = checkpoint.config, checkpoint.encoder
        positions = encoder.backbone.max_length
        for limit in ("query_maxlen", "doc_maxlen"):
            if getattr(config.text, limit) > positions:
                raise ValueError(
                    f"{limit} is {getattr(config.text, limit)}, but the encoder of "
                    f"{checkpoint.folder} has {positions} positions"
                )
        self._chosen = None if devices is None else [device.id for device in devices]
        self._trained = False
        self.load = load or {"name_or_path": str(checkpoint.folder.resolve())}
        self.config: ColBERTConfig = config
        self.tokenizer: TextTokenizer = checkpoint.text_tokenizer()
        # Its parameters live on the devices from here on.
        self._checkpoint = dataclasses.replace(
            checkpoint, params={}, query_params=None, images=None
        )
        self.positions = positions
        self.dim = encoder.dim
        self._runner = BatchRunner(devices, positions)
        self.devices = self._runner.devices
        dtype = runtime.compute_dtype() if dtype is None else jnp.dtype(dtype)
        self._dtype, self._quantization = dtype, quantization

        def put(params: dict, quantization: str | None) -> dict:
            return self._runner.put(quantize(params, quantization))

        self.params = put(checkpoint.params, quantization)
        self._hashed: tuple[list, list, str] | None = None
        self.query_params = self.params  # or an encoder of the queries' own
        of_queries = None if quantization == "int8-documents" else quantization
        if checkpoint.query_params is not None or of_queries != quantization:
            self.query_params = put(checkpoint.query_params or checkpoint.params, of_queries)
        make = _maker(encoder, dtype)
        self.encode_ids = _encoding(make, self._runner.mesh)
        self.images: ImagePart | None = None
        if checkpoint.images is not None:
            self.images = ImagePart(checkpoint.images, self._runner, make, dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dim: int | None = None,
        seed: int = 0,
        dtype: jnp.dtype | None = None,
        quantization: str | None = None,
        devices: Sequence[jax.Device] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        base: str | Path | None = None,
        images: bool | None = True,
        truncate_dim: int | None = None,
        language: str | None = None,
        **text_settings: Any,
    ) -> ColBERT:
        """Load a checkpoint of any layout: Stanford ColBERT, FLMR, PyLate, sentence-transformers,
        plain Hugging Face, this library's own.

        A plain encoder without a late-interaction head gives its token embeddings at full width,
        without markers, [MASK] expansion or dropped punctuation (`TextConfig.untrained`).

        Args:
          name_or_path: a folder, a Hugging Face hub id, or a ColBERTv1 `.dnn` file.
          dim: width of a new projection for a plain encoder, with random weights drawn from `seed`,
            to be trained. If None, no projection is added.
          dtype, quantization, devices: see `ColBERT`.
          revision, token: of the hub.
          base: for a `.dnn` file, the folder or hub id of the model it was trained from, which has
            its configuration and tokenizer. If None, the files beside it, else the model it names.
          images: whether to load the image encoder of a checkpoint that has one. If False, its text
            part alone; None does the same with a warning.
          truncate_dim: how many of the first features of token embeddings to keep, for models that
            were trained for it, such as jina-colbert-v2 at 96 and 64. If None, all.
          language: which language's adapters to load of X-MOD (colbert-xm), such as "de_DE". If
            None, those of the checkpoint's default language.
          **text_settings: fields of `TextConfig` to change, such as `doc_maxlen=300`.

        Raises:
          FileNotFoundError, ValueError: naming the file and what is wrong with it.
          TypeError: an unknown setting.
        """
        names = {f.name for f in dataclasses.fields(TextConfig)}
        unknown = sorted(text_settings.keys() - names)
        if unknown:
            raise TypeError(
                f"from_pretrained has no setting {', '.join(unknown)}; text settings are "
                f"{', '.join(sorted(names))}"
            )
        quantization = resolve_quantization(quantization)
        runtime.check_process()
        path, base = hub.resolve_checkpoint(name_or_path, base=base, revision=revision, token=token)
        checkpoint = read_checkpoint(
            path, dim=dim, seed=seed, base=base, images=images, language=language
        )
        if truncate_dim is not None:
            checkpoint = checkpoint.truncated(truncate_dim)
        if text_settings:
            checkpoint = checkpoint.with_text(**text_settings)
        load: dict[str, Any] = {"name_or_path": str(name_or_path)}
        if Path(name_or_path).expanduser().exists():
            load = {"name_or_path": str(path.resolve())}
        if base is not None:
            load["base"] = str(Path(base).resolve())
        if dim is not None:
            load |= {"dim": dim, "seed": seed}
        if revision is not None:
            load["revision"] = revision
        if language is not None:
            load["language"] = language
        if truncate_dim is not None:
            load["truncate_dim"] = truncate_dim
        if quantization is not None:
            load["quantization"] = quantization
        if not images:
            load["images"] = images
        load |= text_settings
        return cls(checkpoint, load=load, dtype=dtype, quantization=quantization, devices=devices)

    @property
    def encoder_config(self) -> EncoderConfig:
        """The architecture: backbone, pooling of words, head."""
        return self._checkpoint.encoder

    @property
    def best_tokens(self) -> int | None:
        """How many of a query's best matches a score sums, for `Index.search`; None for all.

        Baleen's flipr sums the better half of `query_maxlen`.
        """
        flipr = self.config.interaction == "flipr"
        return max(self.config.text.query_maxlen // 2, 1) if flipr else None

    def module(self) -> nnx.Module:
        """The encoder as a Flax NNX module with the parameters of documents, in `dtype`.

        Called with token ids int32[B, L], the number of attended tokens int32[B] and which tokens
        are kept bool[B, L], it gives float32[B, L, D]; rows that are not kept are zeros.
        """
        return make_encoder(self.encoder_config, self.params, self._dtype)

    @property
    def quantization(self) -> str | None:
        """How the weights were quantised when they were loaded; None if they were not."""
        return self._quantization

    def set_params(self, params: dict) -> None:
        """Replace the parameters, for queries and documents alike.

        Args:
          params: float32 arrays in the form of `self.params`.
        """
        here = jax.tree.leaves(self.params)[0].sharding
        self.params = self.query_params = jax.device_put(params, here)
        self._hashed = None
        self._trained = True

    def __reduce__(self) -> Any:
        """Pickle how to load the model, not its parameters.

        The process that unpickles it loads it from the same folder or hub id, with the same
        settings. It raises ValueError if that is another model by then.

        Raises:
          pickle.PicklingError: the parameters were replaced since it was loaded.
        """
        if self._trained:
            raise pickle.PicklingError(
                "a model is pickled as the name of its checkpoint, and the parameters of this one "
                "were replaced since it was loaded: save_pretrained() it, load and pickle that"
            )
        reference = {
            "load": self.load,
            "text": vars(self.config.text),
            "dtype": str(self._dtype),
            "quantization": self._quantization,
            "devices": self._chosen,
            "fingerprint": self.fingerprint(),
        }
        return _load_again, (json.dumps(reference),)

    def save_pretrained(
        self,
        folder: str | Path,
        layout: str = "native",
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model as a new folder.

        Args:
          layout: "native" (safetensors and one JSON file), "stanford", "flmr", "pylate",
            "sentence-transformers" or "colbertv1"; the library of that name loads the result.
          metadata: further facts to keep, such as how the model was trained.

        Raises:
          ValueError: an unknown layout, a setting that the layout has no place for, or quantised
            weights.
          FileExistsError: `folder` exists and is not empty.
        """
        if self._quantization is not None:
            raise ValueError(
                f"the weights were quantised to {self._quantization} when they were loaded; load "
                "the checkpoint without quantization to save it"
            )
        own = self.query_params is not self.params
        known = {**self.config.metadata, **(metadata or {})}
        checkpoint = dataclasses.replace(
            self._checkpoint,
            config=dataclasses.replace(self.config, metadata=known),
            params=jax.tree.map(np.asarray, self.params),
            query_params=jax.tree.map(np.asarray, self.query_params) if own else None,
            images=None if self.images is None else self.images.on_host(),
        )
        write_checkpoint(checkpoint, Path(folder), layout)

    def encode_queries(
        self,
        queries: str | Sequence[Query] | Items,
        *,
        allow_blank: bool = False,
        progress: bool | None = False,
    ) -> np.ndarray:
        """Encode queries to token embeddings.

        Args:
          queries: one text, or a list of texts and pairs (text, image).
          allow_blank: encode empty and blank queries too, as other libraries do. They ask nothing,
            so searches refuse them.
          progress: True for a bar. If None, a bar on a terminal, else log lines.

        Returns:
          float32[B, Lq, D]. With query expansion Lq is `query_maxlen`; without it, or with a
          smaller `query_minlen`, Lq is the longest query's step of the length ladder. Where a query
          has an image, Lq has room for `images.query_rows` more: behind the rows of its text it
          has those of the image's class token, then one for each patch. Rows of zeros fill up; they
          add nothing to a score.

        Raises:
          ValueError, TypeError: an empty or blank query, or one that is no string, by its place; an
            image for a model of texts.
          ImageError (a ValueError): images that cannot be opened, all named, before any work; or
            one that cannot be decoded.
        """
        runtime.check_process()
        listed = self.as_queries(queries, allow_blank=allow_blank)
        token_ids = self.tokenizer.queries(listed.texts)
        with progress_bar(len(listed), "queries", "query", progress) as bar:
            if listed.images:
                rows = self._encode_with_images(listed, token_ids, bar)
            else:
                rows = self._encode(self.query_params, token_ids, self.tokenizer.kept_in_query, bar)
        longest = int(rows.lengths.max(initial=1))
        return rows.padded(self.query_width(longest, bool(listed.images)))[0]

    def as_queries(
        self,
        queries: str | Iterable[Query] | Items,
        first: int = 0,
        *,
        allow_blank: bool = False,
    ) -> Items:
        """Check queries, and the headers of their images; arguments and errors as for
        `encode_queries`.

        Args:
          first: the number of the first, for errors.
        """
        listed = as_items(
            queries, first=first, with_images=self.images is not None, allow_blank=allow_blank
        )
        return listed if self.images is None else self.images.wanted_in_queries(listed)

    def query_width(self, longest: int, with_image: bool) -> int:
        """Lq of queries of which the longest has so many token embeddings."""
        fixed = self.config.text.fixed_query_length
        more = self.images.query_rows if with_image and self.images is not None else 0
        return ladder_length(longest, self.positions + more) if fixed is None else fixed + more

    def encode_documents(
        self,
        documents: str | Sequence[Query],
        *,
        pool_factor: float | None = None,
        progress: bool | None = None,
    ) -> DocumentEmbeddings:
        """Encode documents to token embeddings, in their order.

        Args:
          documents: one text, or a list of texts and, for a model with an image encoder, pairs
            (text, image).
          pool_factor: of n token embeddings of a text keep n // `pool_factor`, means of similar
            ones. If None, the model's setting; for an index, load the model with
            `from_pretrained(..., pool_factor=2)`.
          progress: True for a bar, False for silence. If None, a bar on a terminal, else log lines.

        Raises:
          TypeError, ValueError: a document that is not a string or not valid Unicode, by position;
            a factor below 1.
        """
        check_pooling(1 if pool_factor is None else pool_factor, 0)
        if self.images is None:
            listed: Any = as_texts(documents, "document")  # type: ignore[arg-type]
        else:
            listed = as_items(documents, kind="document", with_images=True)
        with progress_bar(len(listed), "encoding", "doc", progress) as bar:
            windows = self._runner.windows(listed)
            parts = list(self.encode_windows(windows, bar, pool_factor=pool_factor))
        if len(parts) == 1:
            return parts[0]
        values = [part.values for part in parts] or [np.zeros((0, self.dim), np.float32)]
        lengths = np.concatenate([part.lengths for part in parts] or [np.zeros(0, np.int64)])
        return DocumentEmbeddings.from_lengths(np.concatenate(values), lengths)

    def encode_windows(
        self,
        windows: Iterable[list[str] | Items],
        bar: Any = None,
        *,
        pool_factor: float | None = None,
    ) -> Iterator[DocumentEmbeddings]:
        """Encode lists of documents in turn; the next list is tokenised meanwhile.

        The token embeddings of a document's image, those of its class token, come before those of
        its text.
        """
        runtime.check_process()

        def tokenized(window: list[str] | Items) -> tuple[list[str] | Items, TokenIds]:
            texts = window.texts if isinstance(window, Items) else window
            return window, self.tokenizer.documents(texts)

        for window, token_ids in one_ahead(tokenized, windows):
            rows = self._encode(self.params, token_ids, self.tokenizer.kept, bar)
            rows = self._pooled(rows, pool_factor)
            if isinstance(window, Items) and window.images:
                assert self.images is not None
                images = self.images.encode_documents(window)
                nothing = np.zeros((0, self.dim), np.float32)
                both = [np.concatenate([images.get(i, nothing), row]) for i, row in enumerate(rows)]
                rows = DocumentEmbeddings.from_list(both, self.dim)
            yield rows

    def _pooled(
        self, documents: DocumentEmbeddings, factor: float | None = None
    ) -> DocumentEmbeddings:
        """Documents with as many token embeddings as `pool_factor` leaves, or `factor`."""
        text = self.config.text
        factor = text.pool_factor if factor is None else factor
        if factor == 1:
            return documents
        return pool_tokens(
            documents, factor, protected=text.pool_protected, normalize=text.pool_normalize
        )

    def rank(
        self,
        queries: str | Sequence[Query] | Items,
        documents: Sequence[Query],
        k: int | None = None,
        *,
        weights: Sequence[float] | None = None,
        progress: bool | None = False,
    ) -> Hits:
        """Order documents by their exact score with a query, or with each of several; no index.

        Args:
          k: results per query. If None, all documents that have a token.
          weights: of the dense, the lexical and the multi-vector score of a model with the three
            heads of bge-m3, such as (1, 0.3, 1); the score is their weighted mean, the multi-vector
            score being the mean over a query's token embeddings. If None, MaxSim alone, a sum.

        Returns:
          positions in `documents` int32[k] and scores float32[k], best first; for a list of queries
          [B, k] each.

        Raises:
          ValueError: weights that are not three numbers, or a model without these heads.
        """
        k = None if k is None else check_k(k)
        listed = self.as_queries(queries)
        if weights is not None:
            hits = self._rank_three_ways(listed, documents, k, weights, progress)
            return Hits(hits.positions[0], hits.scores[0]) if isinstance(queries, str) else hits
        encoded = self.encode_documents(documents, progress=progress)
        count = int((encoded.lengths > 0).sum())
        k = count if k is None else min(k, count)
        hits = Hits(np.zeros((len(listed), k), np.int32), np.zeros((len(listed), k), np.float32))
        if k and listed:
            asked = self.encode_queries(listed)
            if self.config.interaction == "maxsim":
                hits = _exact_hits(encoded, asked, k)
            else:
                hits = _best(self.scores(asked, encoded), k)
        return Hits(hits.positions[0], hits.scores[0]) if isinstance(queries, str) else hits

    def scores(self, queries: np.ndarray, documents: DocumentEmbeddings) -> np.ndarray:
        """Score all documents for each query on the host, as the model's `interaction` says.

        Args:
          queries: float32[B, Lq, D]; rows of zeros are padding.

        Returns:
          float32[B, N]; minus infinity for a document without a token.
        """
        half = self.best_tokens or max(queries.shape[1], 1)
        return interact(queries, documents, self.config.interaction, half=half)

    def _rank_three_ways(
        self,
        queries: Items,
        documents: Sequence[Query],
        k: int | None,
        weights: Sequence[float],
        progress: bool | None,
    ) -> Hits:
        """See `rank`."""
        check_weights(weights, self._checkpoint.sparse, self._checkpoint.folder)
        texts = as_texts(documents, "document")  # type: ignore[arg-type]
        k = len(texts) if k is None else min(k, len(texts))
        if not k or not len(queries):
            shape = len(queries), k
            return Hits(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        tokenizer, encoded = self.tokenizer, []
        for token_ids, keep, kind in (
            (tokenizer.queries(queries.texts), tokenizer.kept_in_query, "query"),
            (tokenizer.documents(texts), tokenizer.kept, "doc"),
        ):
            with progress_bar(len(token_ids.ids), "encoding", kind, progress) as bar:
                encoded.append(
                    encode_three_ways(
                        self._runner,
                        self._three_way,
                        self.params,
                        token_ids,
                        [keep(ids) for ids in token_ids.ids],
                        widths=(self.dim, self.encoder_config.backbone.hidden_size),
                        pad=tokenizer.special.pad,
                        unweighted=tokenizer.special_ids,
                        bar=bar,
                    )
                )
        asked, found = encoded
        found = found._replace(tokens=self._pooled(found.tokens))
        lengths = asked.tokens.lengths
        padded = asked.tokens.padded(self.query_width(int(lengths.max(initial=1)), False))[0]
        hits = _exact_hits(found.tokens, padded, len(texts))
        multi = np.zeros((len(queries), len(texts)), np.float32)
        np.put_along_axis(multi, hits.positions, hits.scores, axis=1)
        dense = asked.dense @ found.dense.T
        lexical = lexical_scores(asked, found, tokenizer.vocab_size)
        parts = (dense, lexical, multi / np.maximum(lengths, 1)[:, None])
        scores = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
        return _best(scores, k)

    @cached_property
    def _three_way(self) -> Any:
        make = partial(make_encoder, self.encoder_config, dtype=self._dtype)
        return three_way_program(self._runner, make, self._checkpoint.sparse)

    def explain(self, query: Query, document: Query) -> Explanation:
        """Show which query words, and patches of its image, matched which document words."""
        items = self.as_queries([query])
        q, d = (
            self.encode_queries(items)[0],
            self.encode_documents([document], progress=False, pool_factor=1)[0],
        )
        words, picture = self.tokenizer.labels(items.texts[0], is_query=True), None
        if self.images is not None and items.images:
            words = words if self.images.side.text_in_queries else []
            picture = self.images.picture(items, len(words))
            words = words + self.images.labels(self.images.query_rows)
        text = document if isinstance(document, str) else document[0]
        labels = self.tokenizer.labels(text, is_query=False)
        if self.images is not None:
            labels = self.images.labels(len(d) - len(labels)) + labels
        return Explanation(words, labels, q[: len(words)] @ d.T, picture)

    def fingerprint(self) -> str:
        """Hash settings and weights: models that embed documents alike have equal fingerprints.

        Settings of queries are left out, because an index does not depend on them.
        """
        text = {name: getattr(self.config.text, name) for name in _DOCUMENT_SETTINGS}
        if self.config.text.pool_factor != 1:  # the others have the fingerprints that they had
            text |= {name: getattr(self.config.text, name) for name in _POOLING_SETTINGS}
        encoder = dataclasses.asdict(self._checkpoint.encoder)
        if encoder["normalized"]:  # the others have the fingerprints that they had
            del encoder["normalized"]
        known = [text, encoder, self.tokenizer.fingerprint]
        leaves = jax.tree.leaves(self.params)
        if self._hashed is not None:
            settings, hashed, value = self._hashed
            if settings == known and list(map(id, hashed)) == list(map(id, leaves)):
                return value
        value = fingerprint(known, self.params)
        self._hashed = known, leaves, value  # which keeps the arrays, so that no id is used again
        return value

    def image_fingerprint(self) -> str:
        """Hash what encodes documents' images: models that do it alike have equal fingerprints.

        Raises:
          ValueError: a model of texts.
        """
        if self.images is None:
            raise ValueError(f"documents have images, but {NO_IMAGES}")
        return self.images.fingerprint()

    def check_document_images(self, items: Items) -> dict[int, int]:
        """See `multimodal.ImagePart.check_documents`; for a model with an image encoder."""
        assert self.images is not None
        return self.images.check_documents(items)

    def describe(self) -> dict[str, Any]:
        """What an index remembers of the model: how to load it, how to know it, its search
        settings; JSON."""
        return {
            "load": self.load,
            "fingerprint": self.fingerprint(),
            "search": vars(self.config.search),
        }

    def _encode_with_images(
        self, items: Items, token_ids: TokenIds, bar: Any
    ) -> DocumentEmbeddings:
        """Embeddings of queries, in their order, of which some have an image."""
        assert self.images is not None
        keep, params, text = self.tokenizer.kept_in_query, self.query_params, self.config.text

        def of(places: list[int]) -> TokenIds:
            return TokenIds([token_ids.ids[i] for i in places], token_ids.attended[places])

        alone, seen = items.with_image(False), items.with_image()
        encoded = self.images.encode_queries(
            items.take(seen),
            of(seen),
            keep,
            params,
            length=text.query_maxlen,
            pad=self.tokenizer.special.pad,
            bar=bar,
        )
        rows = in_order([(seen, encoded), (alone, self._encode(params, of(alone), keep, bar))])
        return DocumentEmbeddings.from_list(rows, self.dim)

    def _encode(self, params: dict, token_ids: TokenIds, keep, bar) -> DocumentEmbeddings:
        """Embeddings of the rows, in their order; `keep` maps a row's ids to which are kept."""
        ids, attended = token_ids
        kept = [keep(row) for row in ids]
        offsets = offsets_from_lengths(np.array([row.sum() for row in kept], np.int64))
        values = np.empty((offsets[-1], self.dim), np.float32)
        pad = self.tokenizer.special.pad

        def run(batch: Batch) -> None:
            size, length = batch.size, batch.length
            block = pad_rows([ids[i] for i in batch.rows], size, length, pad)
            mask = pad_rows([kept[i] for i in batch.rows], size, length, False)
            count = np.zeros(size, np.int32)
            count[: len(batch.rows)] = attended[batch.rows]
            for i, row, where in zip(
                batch.rows, self._run_batch(params, block, count, mask), mask, strict=False
            ):
                values[offsets[i] : offsets[i + 1]] = row[where]

        self._runner.for_each(np.fromiter(map(len, ids), np.int64, len(ids)), run, bar)
        return DocumentEmbeddings(values, offsets)

    def _run_batch(self, params: dict, *batch: np.ndarray) -> np.ndarray:
        """The output of `TokenEncoder` for ids, attended and kept, on the host."""
        return self._runner.run(self.encode_ids, params, *batch)


# Models of one architecture on the same devices share their programs, so that the second one
# compiles nothing. Some are kept when their models are gone: a model is often opened again.


@lru_cache(maxsize=16)
def _maker(encoder: EncoderConfig, dtype: jnp.dtype) -> Callable[[dict], TokenEncoder]:
    return partial(make_encoder, encoder, dtype=dtype)


@lru_cache(maxsize=16)
def _encoding(
    make: Callable[[dict], TokenEncoder], mesh: jax.sharding.Mesh
) -> Callable[..., jax.Array]:
    return over_rows(lambda params, *batch: make(params)(*batch), mesh, 3)


def _best(scores: np.ndarray, k: int) -> Hits:
    """The k best of scores [B, N], equal ones by position."""
    positions = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, positions, axis=1)
    return Hits(positions.astype(np.int32), best.astype(np.float32))


@runtime.apart()
def _exact_hits(encoded: DocumentEmbeddings, queries: np.ndarray, k: int) -> Hits:
    """The k best of encoded documents for queries float32[B, Lq, D]."""
    return RawSearch(encoded.values, encoded.offsets).search(queries, k)


# The model that was unpickled last: a pool pickles it with every task.
_again: dict[str, ColBERT] = {}


def _load_again(reference: str) -> ColBERT:
    """Load a model that `ColBERT.__reduce__` has pickled."""
    model = _again.get(reference)
    if model is not None and not model._trained:
        return model
    known = json.loads(reference)
    here = {device.id: device for device in jax.local_devices()}
    chosen = [here[i] for i in known["devices"] or () if i in here]
    load = known["load"] | known["text"] | {"quantization": known["quantization"]}
    model = ColBERT.from_pretrained(**load, dtype=jnp.dtype(known["dtype"]), devices=chosen or None)
    if model.fingerprint() != known["fingerprint"]:
        raise ValueError(
            f"{known['load']['name_or_path']}: another checkpoint than the one that was pickled: "
            "its files have changed since; load it again, and pickle that"
        )
    model.load = known["load"]
    _again.clear()
    _again[reference] = model
    return model
