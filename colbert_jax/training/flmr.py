"""Training of FLMR and PreFLMR on questions about images.

In each step a question has one of its positives, drawn at random, and negatives drawn uniformly
from all passages; which ones depends on the seed and the question's place in the run alone, so a
run that goes on draws what one that never stopped would have. The loss contrasts a question's
positive with all passages of the batch, as `FLMRModelForRetrieval.forward` does; a passage with the
text of one of its positives takes no part in that.

The vision encoder is frozen by default: no gradients, no moments, no room in checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from colbert_jax import processes
from colbert_jax.checkpoints.common import fingerprint
from colbert_jax.config import TrainingConfig
from colbert_jax.data.m2kr import M2KR
from colbert_jax.files import publishing
from colbert_jax.flmr.modeling import FLMRModelForRetrieval
from colbert_jax.images import ImageConfig, pixel_blocks
from colbert_jax.models.colbert import EncoderConfig, make_encoder, unit_length
from colbert_jax.models.flmr import ImageEncoderConfig, make_image_encoder
from colbert_jax.models.layers import TrainMode
from colbert_jax.text import TokenIds
from colbert_jax.training.batch import ExampleBatch, Images, Passages, TokenBatch
from colbert_jax.training.callbacks import Callback
from colbert_jax.training.loader import Loader, Mixture, check_divides
from colbert_jax.training.step import (
    Logged,
    Loss,
    embed_documents,
    embed_tokens,
    no_negatives,
    parameter_sharding,
    query_keys,
    score_loss,
    spread_rows,
    with_changes,
)
from colbert_jax.training.trainer import Job, Trained, compute_dtype, run_job

# FLMR's own recipe (Lin et al., 2024; the values of its fine-tuning example): four negatives a
# question, 8 questions at a time, 8 times a step.
FLMR_TRAINING = TrainingConfig(
    loss="contrastive",
    nway=5,
    use_ib_negatives=False,
    bsize=64,
    accumsteps=8,
    lr=1e-5,
    warmup=100,
    maxsteps=10_000,
    seed=42,
)
_LOSSES = ("contrastive", "cross-entropy")
_MOST_POSITIVES = 16  # of a question that are looked for in a batch
_ONLY = {"warmup_bert": 0, "freeze_layers": 0, "coupled_weight": 0.0}


def train_flmr(
    model: FLMRModelForRetrieval,
    data: M2KR,
    folder: str | Path,
    config: TrainingConfig = FLMR_TRAINING,
    *,
    freeze_vision: bool = True,
    image_config: ImageConfig | None = None,
    callbacks: Sequence[Callback] = (),
    devices: Sequence[jax.Device] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Trained:
    """Train a model on questions about images, or go on where a run in `folder` stopped.

    Resuming, signals, processes and the model's parameters are as in `trainer.train`. Questions
    without an image learn from their text alone.

    Args:
      model: what training starts from.
      data: questions and passages. Questions without a positive among the passages are left out.
      folder: of the run; `last/` in it is a checkpoint of FLMR.
      config: losses are "contrastive", over all documents of a batch, and "cross-entropy", over a
        question's own. `nway` counts its positive and its negatives; if None, 5. `lr` is the rate
        of all that is trained.
      freeze_vision: whether the vision encoder stays as it is.
      image_config: how images become pixel values. If None, the model's own.
      callbacks: told what the run measures, see `training.callbacks`.
      devices: if None, all of the job.

    Raises:
      ValueError: settings, data and a model that do not fit together; missing images, by name; an
        image that cannot be used, naming its question.
    """
    devices = list(jax.devices() if devices is None else devices)
    config = dataclasses.replace(config, nway=config.nway or FLMR_TRAINING.nway)
    encoder = model.encoder_config
    data = data.with_instruction_end(model.text_tokenizer.config.mask_instruction_token)
    images = _check(model, data, config, devices)
    if images is None:
        image_config = None
    elif image_config is None:
        image_config = model.image_config
    source = _Source(data, config)
    frozen = ["vision"] if freeze_vision else []
    params, fixed = _split(model.params, None if images is None else frozen)
    if config.maxsteps is None:
        passes = config.epochs * len(source)
        config = dataclasses.replace(config, maxsteps=max(1, math.ceil(passes / config.batch_size)))
    config = dataclasses.replace(
        config, use_ib_negatives=config.in_batch, warmup=config.warmup_steps
    )

    def put_fixed(mesh: Mesh) -> dict:
        where = parameter_sharding(mesh, fixed, fsdp=config.fsdp)
        return jax.device_put(jax.tree.map(np.asarray, fixed), where)

    def take(params: dict) -> None:
        model.params = jax.device_put(with_changes(model.params, params))

    def save(place: Path, params: dict, step: int) -> None:
        own = model.params
        model.params = with_changes(own, params)
        try:
            with publishing(place, replace=True) as draft:
                model.save_pretrained(draft)
        finally:
            model.params = own

    tokenizer = model.text_tokenizer
    job = Job(
        configs=[config],
        prefixes=[""],
        about={
            "training": dataclasses.asdict(config),
            "encoder": dataclasses.asdict(encoder),
            "images": None if images is None else dataclasses.asdict(images),
            "pixels": None if image_config is None else dataclasses.asdict(image_config),
            "text": dataclasses.asdict(tokenizer.config),
            "freeze_vision": freeze_vision,
            "start": fingerprint([tokenizer.fingerprint], model.params),
            "examples": source.fingerprint,
        },
        params=params,
        lengths=(tokenizer.config.query_maxlen, tokenizer.config.doc_maxlen),
        fixed=put_fixed,
        make_loss=_Loss(encoder, images, model.config.query_concat_output_from_text_encoder).make,
        mixture=partial(_mixture, source, model, config, image_config, _local(devices)),
        take=take,
        save=save,
    )
    return run_job(
        job, folder, devices, callbacks=callbacks, overwrite=overwrite, progress=progress
    )


def _local(devices: Sequence[jax.Device]) -> int:
    return sum(device.process_index == jax.process_index() for device in devices)


def _check(
    model: FLMRModelForRetrieval,
    data: M2KR,
    config: TrainingConfig,
    devices: Sequence[jax.Device],
) -> ImageEncoderConfig | None:
    """Raise ValueError for what does not fit together; give the image encoder that questions need,
    or None."""
    check_divides(config.batch_size, config.accumsteps, jax.process_count(), _local(devices))
    if config.loss not in _LOSSES:
        raise ValueError(
            f"the loss of questions about images is one of {_LOSSES}, got {config.loss!r}: others "
            "need a teacher's scores"
        )
    for name, only in _ONLY.items():
        if getattr(config, name) != only:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, which training on images does not have: "
                f"leave it {only!r}"
            )
    if config.loss == "contrastive" and config.nway == 1 and config.bsize == config.accumsteps:
        raise ValueError(
            f"bsize {config.bsize} and accumsteps {config.accumsteps} leave one question in a "
            "micro-batch, and nway is 1: there is nothing to tell a positive from. Raise either"
        )
    numbers = [i for i in data.answered().tolist() if data[i].image is not None]
    if numbers and model.images is None:
        raise ValueError(
            f"{len(numbers)} of {len(data)} questions have an image, and the model has no vision "
            "encoder: start from a checkpoint of PreFLMR or FLMR, or leave img_path out of the data"
        )
    missing = data.missing_images(numbers)
    if missing:
        raise ValueError(
            f"{data.name_missing(missing)}\nGive the folder that img_path begins in (images), or "
            "take these questions out"
        )
    wanted = numbers and model.config.query_concat_output_from_vision_encoder
    return model.images if wanted else None


def _split(params: dict, frozen: Sequence[str] | None) -> tuple[dict, dict]:
    """What is trained, and what is not: of the image encoder the parts `frozen`, or all of it if
    None; and an image encoder of documents, which have no images here."""
    texts = {name: params[name] for name in ("context", "query") if name in params}
    if frozen is None:
        return texts, {}
    images = params["images"]
    learns = {name: part for name, part in images.items() if name not in frozen}
    return texts | {"images": learns}, {"images": {name: images[name] for name in frozen}}


# --- The loss -------------------------------------------------------------------------------


class _Loss(NamedTuple):
    """The loss of a batch, see `step.Loss`.

    encoder: of texts. images: the image encoder; None if queries are texts.
    with_text: whether the text of a query with an image is part of its embeddings.
    """

    encoder: EncoderConfig
    images: ImageEncoderConfig | None
    with_text: bool

    def make(self, config: TrainingConfig, mesh: Mesh) -> Loss:
        """The loss under settings, over the devices of a mesh."""
        dtype = compute_dtype(config)
        documents = embed_tokens(self.encoder, config, dtype, mesh)
        queries = spread_rows(partial(self._queries, config, dtype), config, mesh)

        def loss(
            params: dict, batch: ExampleBatch, key: jax.Array, fixed: Any
        ) -> tuple[jax.Array, Logged]:
            if self.images is not None:
                params = params | {"images": params["images"] | fixed["images"]}
            rows = queries(params, (batch.queries, batch.images, query_keys(batch, key)))
            embedded = embed_documents(documents, params["context"], batch, key)
            assert batch.passages is not None
            alike = no_negatives(batch.passages)
            return score_loss(config, rows, *embedded, None, mesh, None, alike)

        return loss

    def _queries(
        self,
        config: TrainingConfig,
        dtype: Any,
        params: dict,
        part: tuple[TokenBatch, Images | None, jax.Array],
    ) -> jax.Array:
        """float32[N, rows, D] of N queries, rows of unit length or zeros."""
        tokens, images, keys = part
        train = TrainMode(keys, config.dropout, config.remat)
        text = make_encoder(self.encoder, params.get("query", params["context"]), dtype)
        states = text.states(tokens.ids, tokens.attended, train)
        words = text.project(states) * tokens.kept[..., None]
        if self.images is None or images is None:
            return unit_length(words)
        encoder = make_image_encoder(self.images, params["images"], dtype)
        seen = encoder.see(images.pixels)
        patches = None if encoder.mapping is None else seen.patches[:, None]
        # Random numbers of its own: the text encoder's places come before these.
        own = train.at(self.encoder.backbone.num_hidden_layers + 1)
        rows = encoder.rows(seen.class_token[:, None], patches, states, own)
        given = images.given[:, None, None]
        if not self.with_text:
            words = words * ~given
        return unit_length(jnp.concatenate([words, rows * given], axis=1))


# --- Examples -------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """A question with its documents.

    number: among all questions. documents: W passages, a positive first.
    keys: int64[W], of their texts; positives: int64[P], those of all its positives.
    """

    number: int
    query: str
    image: Path | None
    documents: list[str]
    keys: np.ndarray
    positives: np.ndarray


class _Source:
    """Questions that have a positive, with documents drawn for each place of a run.

    numbers: int64[N], of these questions among all.
    """

    scored = False

    def __init__(self, data: M2KR, config: TrainingConfig):
        """Raises ValueError: no question, or too few passages."""
        assert config.nway is not None
        self.data, self.nway, self._seed = data, config.nway, config.seed
        self.numbers = data.answered()
        left = len(data) - len(self.numbers)
        if not len(self.numbers):
            raise ValueError("no question has a positive among the passages")
        if left:
            warnings.warn(
                f"{left} of {len(data)} questions have no positive among the passages, and are "
                "left out of training",
                stacklevel=3,
            )
        self._keys = data.passages.keys
        own, number = max(
            (len(np.unique(self._keys[data.positives(i)])), i) for i in self.numbers.tolist()
        )
        others = len(np.unique(self._keys)) - own
        if others < self.nway - 1:
            raise ValueError(
                f"nway is {self.nway}, but beside the positives of {data.where(number)}, there are "
                f"only {others} passages to draw negatives from: lower nway"
            )
        self.most_positives = min(own, _MOST_POSITIVES)
        self.fingerprint = data.fingerprint

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Any:
        return self.draw(i, i)

    def draw(self, i: int, place: int) -> _Drawn:
        """Question i of these at a place of the run's sequence. Raises ValueError for a row that
        can't be read."""
        number = int(self.numbers[i])
        question, own = self.data[number], self.data.positives(number)
        positives = np.unique(self._keys[own])
        chosen = self._choose(own, positives, place)
        return _Drawn(
            number,
            question.text,
            question.image,
            [self.data.passages[row] for row in chosen],
            self._keys[chosen],
            positives,
        )

    def _choose(self, own: np.ndarray, positives: np.ndarray, place: int) -> list[int]:
        """Passages: one of `own`, then negatives of different texts, each as likely as others."""
        # Raw words, which NumPy keeps as they are from version to version.
        words = np.random.Philox(np.random.SeedSequence([self._seed, place, 1]))
        chosen = [int(own[words.random_raw() % len(own)])]
        taken = set(positives.tolist())
        while len(chosen) < self.nway:
            row = int(words.random_raw() % len(self._keys))
            key = int(self._keys[row])
            if key not in taken:
                taken.add(key)
                chosen.append(row)
        return chosen


class _ImageLoader(Loader):
    """A `Loader` of questions: it draws their documents and decodes their images."""

    _source: _Source

    def __init__(self, source: _Source, *args: Any, pixels: ImageConfig | None, **kwargs: Any):
        """`pixels`: how images become pixel values; None to leave them out."""
        self._pixels = pixels
        super().__init__(source, *args, **kwargs)  # begins to read

    def _read(self, numbers: np.ndarray, places: np.ndarray) -> list[Any]:
        pairs = zip(numbers.tolist(), places.tolist(), strict=True)
        return [self._source.draw(i, place) for i, place in pairs]

    def _draft(self, examples: list[Any]) -> Any:
        return super()._draft(examples)._replace(images=self._images(examples))

    def _images(self, examples: Sequence[_Drawn]) -> Images | None:
        if self._pixels is None:
            return None
        given = np.array([example.image is not None for example in examples])
        pixels = np.zeros((len(examples), 3, *self._pixels.shape), np.float32)
        images = [example.image for example in examples if example.image is not None]
        places = np.flatnonzero(given)
        for block in pixel_blocks(images, self._pixels, rows=max(len(images), 1), on_error="keep"):
            for k, error in block.failed.items():
                number = examples[places[k]].number
                raise ValueError(
                    f"{self._source.data.where(number)}: column 'img_path': "
                    f"{str(error).removeprefix(f'image {k} ')}. Put a good image there and "
                    "run the same again, or take the question out and begin anew"
                ) from error
            pixels[places] = block.pixels
        return Images(pixels, given)

    def _passages(self, examples: list[Any], queries: TokenIds, documents: TokenIds) -> Passages:
        """By texts, and queries by their images too: two may ask the same of two images."""
        here = np.unique(np.concatenate([example.keys for example in examples]))
        labelled = np.empty((len(examples), self._labels), np.int64)
        for row, example in zip(labelled, examples, strict=True):
            row[:] = example.keys[0]
            # Those of this batch first, where there are more than there is room for.
            known = example.positives[np.argsort(~np.isin(example.positives, here), kind="stable")]
            row[: len(known)] = known[: len(row)]
        asked = [hash64(f"{example.query}\0{example.image}") for example in examples]
        keys = np.concatenate([example.keys for example in examples])
        return Passages(_halves(np.array(asked)), _halves(keys), _halves(labelled))


def hash64(text: str) -> int:
    """The same of the same text, in all processes."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _halves(keys: np.ndarray) -> np.ndarray:
    """int64[...] as int32[..., 2]."""
    flat = np.ascontiguousarray(keys, "<i8").view("<i4").astype(np.int32)
    return flat.reshape(*keys.shape, 2)


def _mixture(
    source: _Source,
    model: FLMRModelForRetrieval,
    config: TrainingConfig,
    pixels: ImageConfig | None,
    local: int,
    start: int,
    group: processes.Group,
) -> Mixture:
    """The steps of the run, from step `start` on."""

    def loader(start: int) -> Loader:
        return _ImageLoader(
            source,
            model.text_tokenizer,
            pixels=pixels,
            bsize=config.batch_size,
            nway=config.nway,
            accumsteps=config.accumsteps,
            seed=config.seed,
            shuffle=config.shuffle,
            start=start,
            devices=local,
            group=group,
            length_groups=config.length_groups,
            longest=model.encoder_config.backbone.max_length,
        )

    return Mixture([1.0], [loader], start)
