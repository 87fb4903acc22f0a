"""Texts with images: what a caller gives, and a model's image encoder on its devices."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import BatchRunner, one_ahead, over_rows, pad_rows
from colbert_jax.checkpoints.common import ImageSide, fingerprint
from colbert_jax.explanation import Picture
from colbert_jax.images import (
    Block,
    ImageConfig,
    ImageInput,
    check_images,
    fitted_image,
    pixel_blocks,
)
from colbert_jax.models.colbert import TokenEncoder, unit_length
from colbert_jax.models.flmr import (
    ImageEncoderConfig,
    image_rows,
    make_image_encoder,
    query_rows,
)
from colbert_jax.runtime import warn
from colbert_jax.text import TokenIds, as_queries, as_texts

Query: TypeAlias = "str | tuple[str, ImageInput | None]"  # a document, too

_TOKENS_AT_ONCE = 256  # class tokens that were computed before
_READ = 1 << 20  # bytes of a file

NO_IMAGES = (
    "the model has no image encoder, or was loaded with images=False: give the text alone, or load "
    "a checkpoint that has one"
)


@dataclass(frozen=True)
class ClassTokens:
    """What a document has in place of an image: class tokens that were computed before.

    values: float32[regions, hidden_size].
    """

    values: np.ndarray


@dataclass(frozen=True)
class Items:
    """Checked texts, some of them with an image.

    texts: all of them.
    images: by the place of their text.
    numbers: what errors call each place.
    kind: what errors call an item: "query" or "document".
    """

    texts: list[str]
    images: Mapping[int, ImageInput | ClassTokens]
    numbers: Sequence[int]
    kind: str = "query"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, places: slice) -> Items:
        return self.take(range(*places.indices(len(self))))

    def __iter__(self) -> Iterator[Any]:
        for place, text in enumerate(self.texts):
            yield (text, self.images[place]) if place in self.images else text

    def take(self, places: Iterable[int]) -> Items:
        """The items at these places, in this order."""
        places = list(places)
        images = {n: self.images[p] for n, p in enumerate(places) if p in self.images}
        numbers = [self.numbers[place] for place in places]
        return Items([self.texts[place] for place in places], images, numbers, self.kind)

    def with_image(self, yes: bool = True) -> list[int]:
        """The places that have an image, or those that have none, ascending."""
        return [place for place in range(len(self)) if (place in self.images) == yes]

    def label(self, place: int) -> str:
        """What errors call the image at a place."""
        return f"the image of {self.kind} {self.numbers[place]}"

    def check_images(self, config: ImageConfig | None = None) -> None:
        """Raise ImageError, naming them, if there are images that cannot be used.

        Args:
          config: whether to decode every image and make it what these settings say. If None, only
            headers are read.
        """
        places = [p for p, image in self.images.items() if not isinstance(image, ClassTokens)]
        if places:
            listed: Any = (self.images[place] for place in places)
            check_images(listed, config=config, label=lambda n: self.label(places[n]))


def as_items(
    items: str | Iterable[Any],
    *,
    kind: str = "query",
    first: int = 0,
    with_images: bool,
    allow_blank: bool = False,
) -> Items:
    """Check what a caller gives: texts and, for a model with an image encoder, pairs with images.

    Args:
      items: a text; a list of texts and pairs (text, image), where an image of None is none; or
        `Items`, which are checked already.
      kind, first: what they are and the number of the first, for errors.
      with_images: whether the model has an image encoder.
      allow_blank: whether queries may be empty and blank; those with an image may in any case.

    Raises:
      TypeError: an item that is neither, or one pair that is in no list.
      ValueError: a text that is not valid Unicode, a blank query, an image for a model of texts.
      ImageError (a ValueError): images that cannot be opened, all of them named.
    """
    if isinstance(items, Items):
        return items
    if with_images:
        refuse_bare_pair(items)
    listed: list[Any] = [items] if isinstance(items, str) else list(items)
    images: dict[int, Any] = {}
    for place, item in enumerate(listed):
        if isinstance(item, str):
            continue
        if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str):
            listed[place] = item[0]
            if item[1] is not None:
                images[place] = item[1]
        elif with_images:
            raise TypeError(
                f"{kind} {first + place} must be a string or a pair (text, image), got {item!r:.80}"
            )
    if images and not with_images:
        raise ValueError(f"{kind} {first + min(images)} has an image, but {NO_IMAGES}")
    if kind == "query" and not allow_blank:
        texts = as_queries(listed, first, may_be_blank={first + place for place in images})
    else:
        texts = as_texts(listed, kind, first)
    checked = Items(texts, images, range(first, first + len(texts)), kind)
    checked.check_images()
    return checked


def images_fingerprint(images: Mapping[int, Any]) -> str:
    """Hash the contents of images by position; files are read.

    Raises OSError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for position, image in images.items():
        digest.update(f"{position} ".encode())
        if isinstance(image, str | os.PathLike):
            with Path(os.fsdecode(image)).expanduser().open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            continue
        if isinstance(image, ClassTokens):
            image = image.values
        if not isinstance(image, bytes | bytearray | memoryview):
            array = np.asarray(image)
            digest.update(f"{getattr(image, 'mode', '')} {array.dtype}{array.shape}".encode())
            image = np.ascontiguousarray(array).tobytes()
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def refuse_bare_pair(items: Any) -> None:
    """Raise TypeError for a tuple that may be one text with its image, or two texts."""
    if isinstance(items, tuple) and len(items) == 2:
        text, image = items
        if isinstance(text, str) and not isinstance(image, tuple):
            raise TypeError(
                "a pair by itself may be a text and its image or two texts: put the pair in a "
                "list, [(text, image)]; or the two texts, [text, text]"
            )


def blocks(items: Any, size: int, check: Callable[[list[Any], int], Items]) -> Iterator[Items]:
    """Cut items into parts of `size`; `check` makes `Items` of a list and its first number."""
    if isinstance(items, Items):
        for start in range(0, len(items), size):
            yield items[start : start + size]
        return
    items, done = iter(items), 0
    while block := list(itertools.islice(items, size)):
        yield check(block, done)
        done += len(block)


@lru_cache(maxsize=16)
def _programs(
    config: ImageEncoderConfig,
    context: ImageEncoderConfig,
    make_text: Callable[[dict], TokenEncoder],
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
) -> tuple[Callable[..., Any], ...]:
    """Those of queries, of documents and of class tokens, shared by all models of an architecture.

    Args:
      config, context: of the image encoders of queries and of documents.
    """

    def query(params: dict, *batch: Any) -> Any:
        images = make_image_encoder(config, params["images"], dtype)
        return query_rows(make_text(params["text"]), images, *batch)

    def document(params: dict, pixels: Any) -> Any:
        return image_rows(make_image_encoder(context, params, dtype), pixels)

    def tokens(params: dict, classes: Any) -> Any:
        return unit_length(make_image_encoder(context, params, dtype).rows(classes, None, None))

    return over_rows(query, mesh, 4), over_rows(document, mesh, 1), over_rows(tokens, mesh, 1)


class ImagePart:
    """A model's image encoder: its parameters on the devices, and programs of a few batch sizes.

    Attributes:
      side: architecture and settings; the parameters are on the devices.
      query_rows, document_rows: token embeddings that an image adds to a query and to a document.
    """

    def __init__(
        self,
        side: ImageSide,
        runner: BatchRunner,
        make_text: Callable[[dict], TokenEncoder],
        dtype: jnp.dtype,
    ):
        """
        Args:
          side: architecture and parameters.
          runner: the devices, and what runs programs there.
          make_text: makes the text encoder of its parameters, inside a jitted function.
          dtype: of the dense layers' computation.
        """
        self.params = runner.put(side.params)
        self.context_params = self.params
        if side.context_params is not None:
            self.context_params = runner.put(side.context_params)
        own: dict | None = None if side.context_params is None else {}
        self.side, self._runner = dataclasses.replace(side, params={}, context_params=own), runner
        self.query_rows = side.config.rows() if side.in_queries else 0
        self.document_rows = side.config.prefix_length

        self._query, self._document, self._tokens = _programs(
            side.config, side.context_config, make_text, dtype, runner.mesh
        )
        self._fingerprint: str | None = None

    def encode_queries(
        self,
        items: Items,
        token_ids: TokenIds,
        keep: Callable[[np.ndarray], np.ndarray],
        params: dict,
        *,
        length: int,
        pad: int,
        bar: Any = None,
    ) -> Iterator[np.ndarray]:
        """Yield the token embeddings of queries that have an image each: text, class token,
        patches.

        Args:
          token_ids: of the texts.
          keep: maps a text's ids to those that give a token embedding.
          params: of the text encoder of queries.
          length: tokens of every query, padding included: what patches attend to must not depend
            on the other queries of a batch.
          pad: the token id of padding.

        Returns:
          float32[Lq, D] each.
        """
        kept = [keep(ids) for ids in token_ids.ids]
        params = {"text": params, "images": self.params}
        with_text = self.side.text_in_queries

        def run(block: Block) -> list[np.ndarray]:
            rows = slice(block.start, block.start + len(block.pixels))
            size = self._runner.padded_rows(len(block.pixels))
            mask = pad_rows(kept[rows], size, length, False)
            attended = np.zeros(size, np.int32)
            attended[: len(block.pixels)] = token_ids.attended[rows]
            ids = pad_rows(token_ids.ids[rows], size, length, pad)
            pixels = _padded(block.pixels, size)
            encoded = self._runner.run(self._query, params, ids, attended, mask, pixels)
            chosen = mask if with_text else np.zeros_like(mask)
            return [
                np.concatenate([row[:length][words], row[length:]])
                for row, words in zip(encoded, chosen[: len(block.pixels)], strict=False)
            ]

        yield from self._run(items, run, length, bar)

    def encode_documents(self, items: Items) -> dict[int, np.ndarray]:
        """The token embeddings of documents' images, float32[prefix_length, D] each, by place."""
        ready = {p: i.values for p, i in items.images.items() if isinstance(i, ClassTokens)}
        seen = [place for place in items.images if place not in ready]
        found = dict(zip(seen, self._encode_pictures(items.take(seen)), strict=True))
        if ready:
            rows = self._encode_tokens(np.concatenate(list(ready.values())))
            ends = np.cumsum([len(tokens) for tokens in ready.values()])[:-1]
            parts = (part.reshape(-1, part.shape[-1]) for part in np.split(rows, ends))
            found |= dict(zip(ready, parts, strict=True))
        return found

    def check_documents(self, items: Items) -> dict[int, int]:
        """Decode all images of documents; how many token embeddings each will give, by place.

        Raises ImageError, naming all images that cannot be used.
        """
        items.check_images(self.side.image_config)
        prefix = self.side.config.prefix_length
        return {
            place: prefix * (len(image.values) if isinstance(image, ClassTokens) else 1)
            for place, image in items.images.items()
        }

    def _encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Class tokens [n, hidden_size] to token embeddings [n, prefix_length, D]."""
        parts = []
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            part = tokens[start : start + _TOKENS_AT_ONCE]
            padded = np.zeros((self._runner.padded_rows(len(part)), 1, part.shape[1]), np.float32)
            padded[: len(part), 0] = part
            encoded = self._runner.run(self._tokens, self.context_params, padded)
            parts.append(encoded[: len(part)])
        return np.concatenate(parts)

    def _encode_pictures(self, items: Items) -> Iterator[np.ndarray]:

        def run(block: Block) -> list[np.ndarray]:
            size = self._runner.padded_rows(len(block.pixels))
            pixels = _padded(block.pixels, size)
            encoded = self._runner.run(self._document, self.context_params, pixels)
            return list(encoded[: len(block.pixels)])

        yield from self._run(items, run, 0, None)

    def _run(
        self, items: Items, run: Callable[[Block], list[np.ndarray]], length: int, bar: Any
    ) -> Iterator[np.ndarray]:
        """What `run` gives of each item; images are processed while the device is at work."""
        places = list(items.images)
        images: Any = (items.images[place] for place in places)
        found = pixel_blocks(
            images,
            self.side.image_config,
            rows=self._runner.rows_of(self.side.config.vision.patches + 1 + length),
            label=lambda n: items.label(places[n]),
        )
        for rows in one_ahead(run, found):
            if bar is not None:
                bar.update(len(rows))
            yield from rows

    def labels(self, rows: int) -> list[str]:
        """What explanations call an image's rows: those of its class token, of its patches."""
        prefix, columns = self.side.config.prefix_length, self._columns
        names = [f"[image {n + 1}]" for n in range(prefix)]
        for row, column in itertools.product(range(columns), repeat=2):
            names.append(f"[patch {row + 1},{column + 1}]")
        return names[:rows]

    def picture(self, items: Items, first: int) -> Picture:
        """The image of the one query, as the model sees it.

        Args:
          first: the query's first row that is of the image.
        """
        (image,) = items.images.values()
        assert not isinstance(image, ClassTokens)
        seen = fitted_image(image, self.side.image_config, items.label(0))
        side = 0 if self.side.config.mapping is None else self._columns
        prefix = self.side.config.prefix_length
        return Picture(np.asarray(seen), first, first + prefix, (side, side))

    @property
    def _columns(self) -> int:
        vision = self.side.config.vision
        return vision.image_size // vision.patch_size

    def fingerprint(self) -> str:
        """Hash what encodes documents' images: settings and weights."""
        if self._fingerprint is None:
            known: list[Any] = [self.side.context_config, self.side.image_config]
            settings = list(map(dataclasses.asdict, known))
            self._fingerprint = fingerprint(settings, self.context_params)
        return self._fingerprint

    def on_host(self) -> ImageSide:
        """Architecture, settings and parameters, to be written."""
        own = self.context_params is not self.params
        return dataclasses.replace(
            self.side,
            params=jax.tree.map(np.asarray, self.params),
            context_params=jax.tree.map(np.asarray, self.context_params) if own else None,
        )

    def wanted_in_queries(self, items: Items) -> Items:
        """The items without their images, after a warning, where the model leaves these out."""
        if not items.images or self.side.in_queries:
            return items
        warn(
            "images of queries are left out: query_concat_output_from_vision_encoder is false in "
            "the checkpoint's config.json"
        )
        return Items(items.texts, {}, items.numbers, items.kind)


def _padded(pixels: np.ndarray, size: int) -> np.ndarray:
    """Images of zeros behind the last."""
    if len(pixels) == size:
        return pixels
    return np.pad(pixels, [(0, size - len(pixels)), (0, 0), (0, 0), (0, 0)])


def in_order(parts: Iterable[tuple[Sequence[int], Iterable[np.ndarray]]]) -> list[np.ndarray]:
    """The rows of parts, each of them at its place."""
    found: dict[int, np.ndarray] = {}
    for places, rows in parts:
        found.update(zip(places, rows, strict=True))
    return [found[place] for place in range(len(found))]
