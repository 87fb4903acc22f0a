"""`FLMRModelForRetrieval`: text and image encoders, masks, late interaction, loss.

Every method is a pure function of `params` (by default the model's own), so that gradients are
`jax.grad(lambda params: model(..., params=params).loss)(model.params)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from colbert_jax import runtime
from colbert_jax.checkpoints import carried, flmr, hub, read_checkpoint
from colbert_jax.checkpoints.common import Checkpoint, ImageSide
from colbert_jax.colbert import ColBERT
from colbert_jax.config import ColBERTConfig
from colbert_jax.files import replacing_files, write_json
from colbert_jax.flmr.configuration import FLMRConfig
from colbert_jax.flmr.outputs import (
    FLMRContextEncoderOutput,
    FLMRModelForRetrievalOutput,
    FLMRQueryEncoderOutput,
)
from colbert_jax.flmr.tokenization import (
    FLMRContextEncoderTokenizer,
    FLMRQueryEncoderTokenizer,
    model_tokenizer,
    text_settings,
)
from colbert_jax.images import ImageConfig
from colbert_jax.models.bert import BertConfig
from colbert_jax.models.colbert import EncoderConfig, TokenEncoder, make_encoder
from colbert_jax.models.flmr import ImageEncoder, ImageEncoderConfig, Seen, make_image_encoder
from colbert_jax.models.layers import MASKED
from colbert_jax.runtime import warn
from colbert_jax.search.arrays import Hits
from colbert_jax.text import outside_instruction

_MASKED_SCORE = -9999.0  # of a document position that is no token, upstream's number


class _Encoded(NamedTuple):
    """projected [B, L, D], the last states [B, L, H], and what was asked for beside."""

    projected: jax.Array
    last: jax.Array
    attentions: tuple[jax.Array, ...] | None
    hidden_states: tuple[jax.Array, ...] | None


class FLMRModelForRetrieval:
    """Late interaction of queries and documents of texts and images.

    Its stages can be called one by one: `encode_text`, `encode_image`, `map_image`, `score_matrix`.

    Attributes:
      config: FLMRConfig.
      images: architecture of the image encoder; None for a model of texts.
      params: {"context": ..., "query": ..., "images": ..., "context_images": ...}; no "query" where
        one text encoder serves both, no "context_images" where one image encoder does.
      query_tokenizer, context_tokenizer: as given, or the checkpoint's own.
      text_tokenizer: of both, as the model's settings have it.
      encoder_config: architecture of the text encoders.
    """

    def __init__(
        self,
        config: FLMRConfig,
        query_tokenizer: FLMRQueryEncoderTokenizer | None = None,
        context_tokenizer: FLMRContextEncoderTokenizer | None = None,
        *,
        seed: int = 0,
        dtype: Any = None,
        freeze_vision: bool = True,
        checkpoint: Checkpoint | None = None,
    ):
        """A model with random weights drawn from `seed`; see `from_pretrained` for trained ones.

        Args:
          query_tokenizer, context_tokenizer: one of them is needed unless a checkpoint is given:
            its vocabulary has the punctuation and the instruction token.
          dtype: of the dense layers' computation. If None, bfloat16 on accelerators and float32 on
            a CPU.
          freeze_vision: whether gradients end before the vision encoder, as in upstream's training.
        """
        if config.query_mask_input_ids_skip_list:
            raise ValueError("query_mask_input_ids_skip_list is not supported; leave it out")
        runtime.check_process()
        self.config, self._dtype = config, dtype
        self.query_tokenizer, self.context_tokenizer = query_tokenizer, context_tokenizer
        if checkpoint is None:
            tokenizer = model_tokenizer(context_tokenizer, query_tokenizer)
            if tokenizer is None:
                raise ValueError(
                    "pass query_tokenizer or context_tokenizer: the model needs its vocabulary"
                )
            checkpoint = _random_checkpoint(config, tokenizer, seed)
        settings = text_settings(query_tokenizer, context_tokenizer)
        settings["mask_punctuation"] = config.mask_punctuation
        settings["mask_instruction_token"] = flmr.instruction_token(
            vars(config), checkpoint.tokenizer
        )
        text = dataclasses.replace(checkpoint.config.text, **settings)
        # Arguments that load the same model again, for an index to remember.
        self._load = {"name_or_path": str(checkpoint.folder.resolve())} | {
            name: value
            for name, value in settings.items()
            if value != getattr(checkpoint.config.text, name)
        }
        self._checkpoint = dataclasses.replace(
            checkpoint.with_text_config(text), params={}, query_params=None, images=None
        )
        texts = self.text_tokenizer = self._checkpoint.text_tokenizer()
        self.encoder_config = checkpoint.encoder
        # [V] True for the ids that give no embedding in documents.
        self._context_skip = texts.skiplist
        self._instruction = texts.special.instruction
        self._positions = checkpoint.encoder.backbone.max_length
        compute = runtime.compute_dtype() if dtype is None else jnp.dtype(dtype)
        self._make_encoder = partial(make_encoder, checkpoint.encoder, dtype=compute)
        params = {"context": checkpoint.params}
        if checkpoint.query_params is not None:
            params["query"] = checkpoint.query_params
        self.images: ImageEncoderConfig | None = None
        self._freeze_vision = freeze_vision
        if checkpoint.images is not None:
            self.images = checkpoint.images.config
            self._pixel_settings = checkpoint.images.pixels
            sides = {"query": self.images, "context": checkpoint.images.context_config}
            self._make_image_encoder = {
                side: partial(make_image_encoder, one, dtype=compute) for side, one in sides.items()
            }
            params["images"] = checkpoint.images.params
            if checkpoint.images.context_params is not None:
                params["context_images"] = checkpoint.images.context_params
        self.params = jax.device_put(params, may_alias=True)
        self._encode = jax.jit(self._encode_ids, static_argnames="details")
        self._see = jax.jit(self._see_pixels, static_argnames=("side", "details"))
        self._map = jax.jit(self._map_states, static_argnames="side")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        query_tokenizer: FLMRQueryEncoderTokenizer | None = None,
        context_tokenizer: FLMRContextEncoderTokenizer | None = None,
        *,
        config: FLMRConfig | None = None,
        dtype: Any = None,
        freeze_vision: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> FLMRModelForRetrieval:
        """Load a folder or a hub id in the layout of FLMR or of Stanford ColBERT.

        Args:
          config: in place of the checkpoint's; with `use_vision_encoder=False` the text part of a
            checkpoint with images is loaded.

        Raises FileNotFoundError and ValueError as `ColBERT.from_pretrained`.
        """
        folder = hub.resolve(name_or_path, revision=revision, token=token)
        images = config is None or config.use_vision_encoder
        checkpoint = read_checkpoint(folder, images=images or None)
        if not isinstance(checkpoint.encoder.backbone, BertConfig) or not checkpoint.encoder.head:
            raise ValueError(f"{folder}: not a BERT encoder with a projection; use ColBERT instead")
        if config is None:
            config = _config_of(folder, checkpoint)
        text = checkpoint.config.text
        if query_tokenizer is None:
            settings = {
                "query_maxlen": text.query_maxlen,
                "attend_to_mask_tokens": text.attend_to_mask_tokens,
            }
            query_tokenizer = FLMRQueryEncoderTokenizer(checkpoint.tokenizer, settings)
        if context_tokenizer is None:
            context_tokenizer = FLMRContextEncoderTokenizer(
                checkpoint.tokenizer, {"doc_maxlen": text.doc_maxlen}
            )
        return cls(
            config,
            query_tokenizer,
            context_tokenizer,
            dtype=dtype,
            freeze_vision=freeze_vision,
            checkpoint=checkpoint,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint and both tokenizers; files of the same names are replaced."""
        with replacing_files(Path(folder)) as draft:
            checkpoint = self.checkpoint()
            flmr.write(checkpoint, draft)
            carried.write(checkpoint.config, flmr.kept(checkpoint.config), draft)
            fields = self.config.to_diff_dict() | {
                "architectures": ["FLMRModelForRetrieval"],
                "separate_query_and_context_text_encoder": "query" in self.params,
            }
            if checkpoint.images is None:
                fields |= _TEXT_ONLY
            else:
                written = flmr.image_fields(checkpoint.images)
                vision = fields["vision_config"] | written["vision_config"]
                # The configuration's own, which may leave out what is the default.
                del written["query_concat_output_from_vision_encoder"]
                fields |= written | {"vision_config": vision}
            write_json(draft / "config.json", fields)

    def checkpoint(self) -> Checkpoint:
        """The model with its present parameters, for `checkpoints.write_checkpoint`."""
        images = None
        if self.images is not None:
            images = ImageSide(
                self.images,
                _on_host(self.params["images"]),
                _on_host(self.params.get("context_images")),
                pixels=self._pixel_settings,
                in_queries=self._concat("query", "vision"),
                text_in_queries=self._concat("query", "text"),
            )
        return dataclasses.replace(self._text_checkpoint(), images=images)

    def _text_checkpoint(self) -> Checkpoint:
        params, query = map(_on_host, (self.params["context"], self.params.get("query")))
        return dataclasses.replace(self._checkpoint, params=params, query_params=query)

    @property
    def image_config(self) -> ImageConfig:
        """How images become pixel values: as the checkpoint says, else as CLIP does it."""
        if self.images is None:
            raise NotImplementedError(_NO_TOWER)
        return self._pixel_settings or ImageConfig.square(self.images.vision.image_size)

    def colbert(self, **text_settings: Any) -> ColBERT:
        """The same model as a `ColBERT`, which batches, indexes and ranks texts and images.

        Args:
          **text_settings: fields of `TextConfig` to change, such as `doc_maxlen=300`.
        """
        checkpoint = self.checkpoint().with_text(**text_settings)
        return ColBERT(checkpoint, load=self._load | text_settings, dtype=self._dtype)

    def rank(self, query: str, documents: Sequence[str], k: int | None = None) -> Hits:
        """Order documents for one query, without an index: see `ColBERT.rank`."""
        return self.colbert().rank(query, documents, k)

    def query(
        self,
        input_ids: Any,
        attention_mask: Any,
        pixel_values: Any = None,
        image_features: Any = None,
        concat_output_from_vision_encoder: Any = None,
        concat_output_from_text_encoder: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        params: dict | None = None,
    ) -> FLMRQueryEncoderOutput:
        """Encode queries to token embeddings: of the text, of the image, of its patches.

        Args:
          input_ids, attention_mask: int[B, L], from FLMRQueryEncoderTokenizer.
          pixel_values: float[B, channels, height, width] or, of several regions an image, float[B,
            regions, channels, height, width], normalised. If None, the queries are texts, whatever
            the configuration says.
          image_features: float[B, hidden_size] or float[B, regions, hidden_size], class tokens in
            place of pixel_values, for models without a mapping network.
          concat_output_from_vision_encoder, concat_output_from_text_encoder: whether the image and
            the text are part of the embeddings; or a list of one bool per query, where False leaves
            rows of zeros. If None, as the configuration says.

        Raises:
          NotImplementedError: an image, and the model has no vision encoder.
          ValueError: arrays of other shapes, or nothing that would be encoded.
        """
        ids, attended = self._ids(input_ids, attention_mask)
        flags = (concat_output_from_text_encoder, concat_output_from_vision_encoder)
        image = self._image("query", pixel_values, image_features, len(ids), flags[1])
        with_text, with_image = self._concatenated("query", len(ids), image is not None, *flags)
        details = (bool(output_attentions), bool(output_hidden_states))
        encoded, rows, _ = self._text_rows("query", ids, attended, details, params)
        parts, seen = [], None
        if with_text is not None:
            parts.append(rows * with_text)
        if with_image is not None and image is not None:
            image_rows, seen = self._image_rows("query", image, encoded.last, details, params)
            parts.append(image_rows * with_image)
        whole = jnp.concatenate(parts, axis=1)
        return FLMRQueryEncoderOutput(
            whole[:, 0],
            _unit(whole),
            encoded.attentions,
            encoded.hidden_states,
            None if seen is None else seen.attentions,
            None if seen is None else seen.states,
        )

    def doc(
        self,
        input_ids: Any,
        attention_mask: Any,
        pixel_values: Any = None,
        image_features: Any = None,
        concat_output_from_vision_encoder: Any = None,
        concat_output_from_text_encoder: Any = None,
        keep_dims: bool = True,
        return_mask: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        params: dict | None = None,
    ) -> FLMRContextEncoderOutput:
        """Encode documents to token embeddings, float32: of the image, of the text.

        Args:
          pixel_values, image_features, concat_output_from_vision_encoder,
            concat_output_from_text_encoder: as for `query`. An image gives the embeddings of its
            class token only, and by most configurations none: pass
            `concat_output_from_vision_encoder=True`.
          keep_dims: False gives a list of [tokens, D] on the host, without masked rows.
          return_mask: whether to give context_mask.
        """
        ids, attended = self._ids(input_ids, attention_mask)
        flags = (concat_output_from_text_encoder, concat_output_from_vision_encoder)
        image = self._image("context", pixel_values, image_features, len(ids), flags[1])
        with_text, with_image = self._concatenated("context", len(ids), image is not None, *flags)
        if image is not None and with_image is None and flags[1] is None:
            warn(
                "images of documents are left out: context_concat_output_from_vision_encoder is "
                "False in the configuration; pass concat_output_from_vision_encoder=True to use "
                "them, or False not to be told"
            )
        details = (bool(output_attentions), bool(output_hidden_states))
        encoded, rows, kept = self._text_rows("context", ids, attended, details, params)
        parts, masks, seen = [], [], None
        if with_image is not None and image is not None:
            image_rows, seen = self._image_rows("context", image, None, details, params)
            parts.append(image_rows)
            masks.append(jnp.broadcast_to(with_image, (*image_rows.shape[:2], 1)))
        if with_text is not None:
            parts.append(rows)
            masks.append(kept[..., None] & with_text)
        mask = jnp.concatenate(masks, axis=1)
        whole = _unit(jnp.concatenate(parts, axis=1) * mask)
        late: Any = whole
        if not keep_dims:
            chosen = np.asarray(mask)[..., 0]
            late = [row[flag] for row, flag in zip(np.asarray(whole), chosen, strict=True)]
        return FLMRContextEncoderOutput(
            whole[:, 0],
            late,
            mask if return_mask else None,
            encoded.attentions,
            encoded.hidden_states,
            None if seen is None else seen.attentions,
            None if seen is None else seen.states,
        )

    def encode_text(
        self,
        input_ids: Any,
        attention_mask: Any,
        *,
        side: str = "query",
        params: dict | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Run the text stage alone.

        Args:
          side: "query" or "context".

        Returns:
          token embeddings float32[B, L, D], masked and not normalised, and the text encoder's last
          states float32[B, L, H], which `map_image` takes.
        """
        _check_side(side)
        ids, attended = self._ids(input_ids, attention_mask)
        encoded, rows, _ = self._text_rows(side, ids, attended, (False, False), params)
        return rows, encoded.last

    def encode_image(
        self, pixel_values: Any, *, side: str = "query", params: dict | None = None
    ) -> Seen:
        """Run the vision encoder alone.

        Args:
          pixel_values: as for `query`.

        Returns:
          class_token float32[B, regions, hidden_size] and patches float32[B, regions, patches,
          hidden_size].
        """
        _check_side(side)
        return self._seen(side, self._pixels(pixel_values), (False, False), params)

    def map_image(
        self,
        class_tokens: Any,
        patches: Any = None,
        text: Any = None,
        *,
        side: str = "query",
        params: dict | None = None,
    ) -> jax.Array:
        """Run the stage from images to token embeddings alone.

        Args:
          class_tokens: float[B, regions, hidden_size], and patches float[B, regions, patches,
            hidden_size], both from `encode_image`. Patches are for the mapping network of queries.
          text: float[B, L, H], from `encode_text`.

        Returns:
          float32[B, rows, D], not normalised.
        """
        _check_side(side)
        if self.images is None:
            raise NotImplementedError(_NO_TOWER)
        mapped = side == "query" and self.images.mapping is not None
        if mapped != (patches is not None) or mapped != (text is not None):
            raise ValueError(
                "map_image takes patches and text for queries of a model with a mapping network, "
                "and neither otherwise"
            )
        return self._map(self._image_side(side, params), class_tokens, patches, text, side)

    def score(self, Q: Any, D_padded: Any, D_mask: Any) -> jax.Array:
        """Score each query with its document by MaxSim; masked positions have -9999, as upstream.

        Args:
          Q: [B, Lq, D] or [1, Lq, D]; D_padded [B, Ld, D]; D_mask bool[B, Ld, 1].

        Returns:
          float32[B].
        """
        Q, D_padded, D_mask = map(jnp.asarray, (Q, D_padded, D_mask))
        if Q.shape[0] not in (1, D_padded.shape[0]):
            raise ValueError(
                f"{Q.shape[0]} queries and {D_padded.shape[0]} documents; pass one query, or one "
                "for each document"
            )
        similarity = jnp.einsum(
            "bqd,bkd->bqk",
            jnp.broadcast_to(Q, (len(D_padded), *Q.shape[1:])),
            D_padded,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        masked = jnp.where(D_mask[..., 0][:, None], similarity, _MASKED_SCORE)
        return masked.max(axis=-1).sum(axis=-1)

    def score_matrix(self, Q: Any, D_padded: Any, D_mask: Any) -> jax.Array:
        """Score every query with every document by MaxSim: float32[B, N]."""
        every = jax.vmap(lambda q: self.score(q[None], D_padded, D_mask))
        return every(jnp.asarray(Q))

    def forward(
        self,
        query_input_ids: Any = None,
        query_attention_mask: Any = None,
        query_pixel_values: Any = None,
        query_image_features: Any = None,
        context_input_ids: Any = None,
        context_attention_mask: Any = None,
        context_pixel_values: Any = None,
        context_image_features: Any = None,
        use_in_batch_negatives: bool = True,
        in_batch_negatives_from_all_gpus: bool = False,
        num_negative_examples: int = 1,
        query_concat_output_from_vision_encoder: Any = None,
        query_concat_output_from_text_encoder: Any = None,
        context_concat_output_from_vision_encoder: Any = None,
        context_concat_output_from_text_encoder: Any = None,
        return_dict: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        *,
        own_documents_loss: bool = False,
        params: dict | None = None,
    ) -> Any:
        """Compute scores and losses of queries and their documents.

        Args:
          context_input_ids: of B (n + 1) documents: positive and n negatives of query 1, of 2, ...
          num_negative_examples: n; 0 for positives alone.
          use_in_batch_negatives: whether `loss` contrasts each positive with the documents of all
            queries. If False, with its query's documents only, and in_batch_negative_loss is None.
          in_batch_negatives_from_all_gpus: ignored: a batch is global over a JAX mesh.
          return_dict: False gives a plain tuple.
          own_documents_loss: whether `loss` is always over the query's own documents, as upstream
            had it before May 2024.

        Returns:
          FLMRModelForRetrievalOutput.

        Raises:
          ValueError: the number of documents is not B (n + 1).
        """
        del in_batch_negatives_from_all_gpus
        shared: dict[str, Any] = dict(
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            params=params,
        )
        if query_input_ids is None or context_input_ids is None:
            raise ValueError(
                "forward takes query_input_ids and context_input_ids; see query and doc"
            )
        batch, documents = len(query_input_ids), len(context_input_ids)
        ways = num_negative_examples + 1
        if documents != batch * ways:
            raise ValueError(
                f"{batch} queries with num_negative_examples={num_negative_examples} need "
                f"{batch * ways} documents, got {documents}; to score any number of documents use "
                "rank or score_matrix"
            )
        query = self.query(
            query_input_ids,
            query_attention_mask,
            query_pixel_values,
            query_image_features,
            query_concat_output_from_vision_encoder,
            query_concat_output_from_text_encoder,
            **shared,
        )
        context = self.doc(
            context_input_ids,
            context_attention_mask,
            context_pixel_values,
            context_image_features,
            context_concat_output_from_vision_encoder,
            context_concat_output_from_text_encoder,
            **shared,
        )
        every = self.score_matrix(
            query.late_interaction_output, context.late_interaction_output, context.context_mask
        )
        scores, own_loss, in_batch_loss = losses(every, ways)
        loss = in_batch_loss if use_in_batch_negatives and not own_documents_loss else own_loss
        output = FLMRModelForRetrievalOutput(
            loss,
            scores,
            in_batch_loss if use_in_batch_negatives else None,
            query.late_interaction_output,
            context.late_interaction_output,
            query.text_encoder_attentions,
            query.text_encoder_hidden_states,
            context.text_encoder_attentions,
            context.text_encoder_hidden_states,
        )
        if return_dict is not False:
            return output
        extras = 2 * (bool(output_attentions) + bool(output_hidden_states))
        return tuple(output)[:5] + tuple(v for v in output[5:] if v is not None)[:extras]

    __call__ = forward

    def eval(self) -> FLMRModelForRetrieval:
        """Return the model: it has no dropout to switch off."""
        return self

    def _ids(self, input_ids: Any, attention_mask: Any) -> tuple[jax.Array, jax.Array]:
        runtime.check_process()
        vocab_size = self._checkpoint.encoder.backbone.vocab_size
        ids, mask = (
            x if isinstance(x, jax.Array) else np.asarray(x) for x in (input_ids, attention_mask)
        )
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be [B, L], got {list(ids.shape)} and "
                f"{list(mask.shape)}"
            )
        if ids.shape[1] > self._positions:
            raise ValueError(
                f"input_ids have {ids.shape[1]} tokens, the encoder {self._positions} positions"
            )
        if (
            isinstance(ids, np.ndarray)
            and ids.size
            and not 0 <= ids.min() <= ids.max() < vocab_size
        ):
            raise ValueError(
                f"input_ids lie in {ids.min()}..{ids.max()}, the vocabulary in 0..{vocab_size - 1}"
            )
        return jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool)

    def _side(self, side: str, params: dict | None) -> dict:
        params = self.params if params is None else params
        return params.get(side, params["context"])

    def _image_side(self, side: str, params: dict | None) -> dict:
        params = self.params if params is None else params
        own = params.get("context_images") if side == "context" else None
        return params["images"] if own is None else own

    def _text_rows(
        self,
        side: str,
        ids: jax.Array,
        attended: jax.Array,
        details: tuple[bool, bool],
        params: dict | None,
    ) -> tuple[_Encoded, jax.Array, jax.Array]:
        """What the encoder gives, the masked token embeddings [B, L, D], and the mask [B, L]."""
        encoded = self._encode(self._side(side, params), ids, attended, details)
        kept = ids != 0
        if side == "context":
            kept &= ~jnp.asarray(self._context_skip)[ids]
        elif self._instruction is not None:
            kept &= outside_instruction(ids, self._instruction)
        return encoded, encoded.projected * kept[..., None], kept

    def _image_rows(
        self,
        side: str,
        image: tuple[jax.Array, bool],
        text: jax.Array | None,
        details: tuple[bool, bool],
        params: dict | None,
    ) -> tuple[jax.Array, Seen | None]:
        """Token embeddings of images [B, rows, D], and what the vision encoder gave."""
        assert self.images is not None
        array, has_pixels = image
        own, seen, patches = self._image_side(side, params), None, None
        if has_pixels:
            seen = self._seen(side, array, details, params)
            array = seen.class_token
            if side == "query" and self.images.mapping is not None:
                patches = seen.patches
        return self._map(own, array, patches, None if patches is None else text, side), seen

    def _seen(
        self, side: str, pixels: jax.Array, details: tuple[bool, bool], params: dict | None
    ) -> Seen:
        """What the vision encoder gives; class tokens and patches by batch and regions."""
        batch, regions = pixels.shape[:2]
        flat = pixels.reshape(-1, *pixels.shape[2:])
        seen = self._see(self._image_side(side, params), flat, side, details)
        return seen._replace(
            class_token=seen.class_token.reshape(batch, regions, -1),
            patches=seen.patches.reshape(batch, regions, *seen.patches.shape[1:]),
        )

    def _image(
        self, side: str, pixel_values: Any, image_features: Any, batch: int, flag: Any
    ) -> tuple[jax.Array, bool] | None:
        """Check what is given of images: [B, regions, ...] and whether it is of pixels, or None."""
        if pixel_values is None and image_features is None:
            if flag is not None and np.any(flag):
                if self.images is None:
                    raise NotImplementedError(_NO_TOWER)
                raise ValueError(
                    "concat_output_from_vision_encoder asks for images; pass pixel_values"
                )
            return None
        if self.images is None:
            raise NotImplementedError(_NO_TOWER)
        if pixel_values is not None and image_features is not None:
            raise ValueError("pass either pixel_values or image_features")
        if pixel_values is not None:
            return self._pixels(pixel_values, batch), True
        if side == "query" and self.images.mapping is not None:
            raise ValueError(
                "image_features are class tokens, but this model's mapping network needs the "
                "patches of images too; pass pixel_values"
            )
        array = _floats("image_features", image_features)
        array = array[:, None] if array.ndim == 2 else array
        width = self.images.vision.hidden_size
        if array.ndim != 3 or array.shape[0] != batch or array.shape[2] != width or not array.size:
            raise ValueError(
                f"image_features must be [{batch}, {width}] or [{batch}, regions, {width}], got "
                f"{list(np.shape(image_features))}"
            )
        return jnp.asarray(array, jnp.float32), False

    def _pixels(self, pixel_values: Any, batch: int | None = None) -> jax.Array:
        """Check images, of so many texts: float32[B, regions, channels, height, width]."""
        if self.images is None:
            raise NotImplementedError(_NO_TOWER)
        array = _floats("pixel_values", pixel_values)
        shape, given = self.images.vision.image_shape, list(array.shape)
        array = array[:, None] if array.ndim == 4 else array
        counts = batch is None or len(array) == batch
        if array.ndim != 5 or array.shape[2:] != shape or not counts or 0 in array.shape[:2]:
            one, size = ", ".join(map(str, shape)), "B" if batch is None else batch
            raise ValueError(
                f"pixel_values must be [{size}, {one}] or [{size}, regions, {one}] for this model "
                f"and its texts, got {given}"
            )
        return jnp.asarray(array, jnp.float32)

    def _concat(self, side: str, part: str) -> bool:
        return bool(getattr(self.config, f"{side}_concat_output_from_{part}_encoder"))

    def _concatenated(
        self, side: str, batch: int, has_image: bool, text: Any, image: Any
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Of text and image, bool[B, 1, 1] which rows count; None for a part that is left out."""
        if image is None:
            image = has_image and self._concat(side, "vision")
        if text is None:
            text = self._concat(side, "text") if has_image else True
        flags = []
        for part, flag in (("text", text), ("vision", image)):
            name = f"concat_output_from_{part}_encoder"
            if np.ndim(flag) == 0:
                flags.append(jnp.full((batch, 1, 1), True) if flag else None)
            elif np.shape(flag) != (batch,):
                raise ValueError(f"{name} has {len(flag)} flags for {batch} rows")
            else:
                flags.append(jnp.asarray(np.asarray(flag, bool))[:, None, None])
        if flags[0] is None and (flags[1] is None or not has_image):
            raise ValueError(
                "concat_output_from_text_encoder=False leaves nothing of a text-only query or "
                "document"
            )
        return flags[0], flags[1]

    def _see_pixels(
        self, params: dict, pixels: jax.Array, side: str, details: tuple[bool, bool]
    ) -> Seen:
        if self._freeze_vision:
            params = params | {"vision": jax.lax.stop_gradient(params["vision"])}
        encoder = self._image_encoder(side, params)
        seen = encoder.see(pixels)
        assert seen.states is not None
        if details[0]:
            every = jnp.ones(seen.states[0].shape[:2], bool)
            attentions = tuple(
                _attention_weights(layer.attention, layer.attention_norm(x), every)
                for layer, x in zip(encoder.vision.layers, seen.states, strict=False)
            )
            seen = seen._replace(attentions=attentions)
        return seen if details[1] else seen._replace(states=None)

    def _map_states(
        self, params: dict, class_tokens: Any, patches: Any, text: Any, side: str
    ) -> jax.Array:
        return self._image_encoder(side, params).rows(class_tokens, patches, text)

    def _image_encoder(self, side: str, params: dict) -> ImageEncoder:
        return self._make_image_encoder[side](params)

    def _encode_ids(
        self, params: dict, ids: jax.Array, attended: jax.Array, details: tuple[bool, bool]
    ) -> _Encoded:
        encoder = self._make_encoder(params)
        bert: Any = encoder.backbone
        x = bert.embeddings(ids, jnp.arange(ids.shape[1]))
        hidden, attentions = [x], []
        for layer in bert.layers:
            if details[0]:
                attentions.append(_attention_weights(layer.attention, x, attended))
            x = layer(x, attended)
            hidden.append(x)
        last = x
        for layer in encoder.head:
            x = layer(x)
        return _Encoded(
            x.astype(jnp.float32),
            last,
            tuple(attentions) if details[0] else None,
            tuple(hidden) if details[1] else None,
        )


# What of config.json is the vision part, as it stands in a text-only checkpoint.
_TEXT_ONLY = {
    "use_vision_encoder": False,
    "use_transformer_mapping_network": False,
    "query_concat_output_from_vision_encoder": False,
    "context_concat_output_from_vision_encoder": False,
}


def losses(every: jax.Array, ways: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores and the two losses of a score matrix.

    Args:
      every: [B, B * ways], of every query with every document; query i's own documents, its
        positive first, begin at column i * ways.

    Returns:
      scores [B, ways], of each query with its own documents; the mean cross-entropy over those;
      and over all documents.
    """
    batch = len(every)
    positives = jnp.arange(batch) * ways
    own = jnp.take_along_axis(every, positives[:, None] + jnp.arange(ways), axis=1)
    own_loss = -jax.nn.log_softmax(own, axis=-1)[:, 0].mean()
    in_batch = -jax.nn.log_softmax(every, axis=-1)[jnp.arange(batch), positives].mean()
    return own, own_loss, in_batch


def _attention_weights(attention: Any, x: jax.Array, attended: jax.Array) -> jax.Array:
    """[B, heads, L, L], the softmax that the layer computes."""

    def split(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], attention.heads, attention.head_dim)

    scores = jnp.einsum(
        "bqhd,bkhd->bhqk",
        split(attention.query(x)),
        split(attention.key(x)),
        preferred_element_type=jnp.float32,
    )
    bias = jnp.where(attended, 0.0, MASKED)[:, None, None]
    return jax.nn.softmax(scores * attention.head_dim**-0.5 + bias, axis=-1)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows of unit length; zeros stay zeros, and their gradient finite."""
    squares = (rows**2).sum(axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return rows / jnp.maximum(norm, 1e-12)


def _floats(name: str, value: Any) -> Any:
    """A NumPy or JAX array of finite floats."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be normalised floats, got {array.dtype}")
    if isinstance(array, np.ndarray) and array.ndim:
        wrong = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if wrong.any():
            raise ValueError(f"{name} of item {wrong.argmax()} hold NaN or infinite values")
    return array


def _on_host(params: dict | None) -> Any:
    return jax.tree.map(np.asarray, params)


def _check_side(side: str) -> None:
    if side not in ("query", "context"):
        raise ValueError(f"side must be 'query' or 'context', got {side!r}")


_NO_TOWER = (
    "images are not supported by this model, which is FLMR's text part without a vision encoder: "
    "leave out pixel_values and image_features, and leave concat_output_from_vision_encoder False"
)


def _config_of(folder: Path, checkpoint: Checkpoint) -> FLMRConfig:
    """The checkpoint's FLMRConfig; for Stanford's layout, made from its settings."""
    if flmr.detect(folder):
        return FLMRConfig.from_pretrained(folder)
    return FLMRConfig(**flmr.config_fields(checkpoint, checkpoint.query_params is not None))


def _random_checkpoint(config: FLMRConfig, tokenizer: Any, seed: int) -> Checkpoint:
    backbone = flmr.text_backbone({"text_config": vars(config.text_config)}, Path("FLMRConfig"))
    encoder = EncoderConfig.projecting(backbone, config.dim)

    def draw(seed: int) -> dict:
        make = partial(TokenEncoder, encoder)
        return nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(seed)), nnx.Param))

    images = None
    if config.use_vision_encoder:
        fields = vars(config) | {"vision_config": vars(config.vision_config)}
        side = flmr.read_image_config(fields, Path("FLMRConfig"), encoder)
        own = config.separate_query_and_context_vision_encoder
        drawn = nnx.to_pure_dict(nnx.state(ImageEncoder(side, rngs=nnx.Rngs(seed)), nnx.Param))
        without = {name: value for name, value in drawn.items() if name != "mapping"}
        images = ImageSide(side, drawn, without if own else None)
    separate = config.separate_query_and_context_text_encoder
    params = draw(seed)
    return Checkpoint(
        Path("."),
        encoder,
        ColBERTConfig(),
        tokenizer,
        params,
        # Upstream copies the one encoder when there are two.
        query_params=params if separate else None,
        images=images,
    )
