"""Images to the pixel values of a CLIP vision tower, by Pillow and NumPy.

The arithmetic is that of transformers' Pillow-based CLIP image processor, bit for bit: resize the
shortest side, cut out the centre, scale, normalise.

An image is a path, the bytes of a file, a PIL image, or an array (all that NumPy converts). The
pixel values are the same whichever way it comes:

* Turned upright by its EXIF orientation. Of several frames or pages, the first.
* Transparency over `ImageConfig.background`: alpha, a transparent colour or palette entry.
* Grey, palettes, CMYK and other modes as Pillow converts them to RGB, colour profiles ignored.
* 16 bits of grey become their high byte, as Pillow reads 16-bit colour. Mode I holds 16 bits, too.
* Arrays are [H, W], [H, W, C] or, where the last axis is longer than 4, [C, H, W]; C = 1 is grey,
  2 grey and alpha, 3 RGB, 4 RGBA. uint16 holds 16 bits, other integers 0 to 255, floating point 0
  to 1, bool black and white. PIL images of mode F hold 0 to 1.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from colbert_jax.config import require, require_types
from colbert_jax.files import check_types, present, read_object, write_json
from colbert_jax.runtime import num_threads

if TYPE_CHECKING:
    import PIL.Image

ImageInput: TypeAlias = "str | os.PathLike | bytes | PIL.Image.Image | np.ndarray"
Size: TypeAlias = tuple[int, int]

WHITE = (255, 255, 255)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_FILES = ("preprocessor_config.json", "processor_config.json")  # the second holds it nested
_SAME = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
_FILTERS = range(6)  # Pillow's numbers of its resampling filters
_PROGRAMS = ("EPS", "WMF")  # formats for which Pillow starts another program
_RESIZED_WHOLE = 1 << 24  # pixels; at 224, sides of 334 to 1
_NAMED = 10  # images that an error names
# A PIL image reads its file when it is first used, and two threads must not do that at once.
_loading = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be used; the message says which one, and why."""


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes pixel values. The defaults are CLIP's.

    size: the shortest side after resizing, in pixels, or (height, width). If None, not resized.
    crop: (height, width) of the part in the centre, with black borders where the image is smaller.
      If None, not cut; then `size` must be (height, width), because a batch has one shape.
    resample: Pillow's number of the filter, 0 to 5; 3 is bicubic.
    scale: what a pixel, 0 to 255, is multiplied by.
    mean, std: of the scaled values, by colour; they become (x - mean) / std.
    background: the colour behind transparent parts. White, as in transformers since version 5; None
      shows the colours that are stored there, as version 4 and FLMR's own scripts do.
    """

    size: Size | int | None = 224
    crop: Size | None = (224, 224)
    resample: int = 3
    scale: float = 1 / 255
    mean: tuple[float, float, float] = _MEAN
    std: tuple[float, float, float] = _STD
    background: tuple[int, int, int] | None = WHITE

    def __post_init__(self) -> None:
        require_types(self)
        if type(self.size) is not int:
            self._hold("size", 2, int, optional=True)
        self._hold("crop", 2, int, optional=True)
        self._hold("mean", 3, (int, float))
        self._hold("std", 3, (int, float))
        self._hold("background", 3, int, optional=True)
        sides = [*(self.crop or ()), *(self.size if isinstance(self.size, tuple) else ())]
        sides += [self.size] if isinstance(self.size, int) else []
        require(all(n > 0 for n in sides), "size and crop must be positive")
        require(
            self.crop is not None or isinstance(self.size, tuple),
            "set crop, or size to (height, width): all images of a batch must have one shape",
        )
        require(self.resample in _FILTERS, f"resample must be 0 to 5, got {self.resample}")
        require(all(s != 0 for s in self.std), "std must not be 0")
        colours = self.background or WHITE
        require(all(0 <= c <= 255 for c in colours), "background must be three values of 0 to 255")

    def _hold(self, name: str, length: int, kind: Any, optional: bool = False) -> None:
        """Make a field a tuple (JSON gives lists), or raise ValueError."""
        value = getattr(self, name)
        if value is None and optional:
            return
        right = isinstance(value, (list, tuple)) and len(value) == length
        right = right and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
        require(right, f"{name} must be {length} numbers, got {value!r:.80}")
        object.__setattr__(self, name, tuple(value))

    @property
    def shape(self) -> Size:
        """(height, width) of the pixel values."""
        if self.crop is not None:
            return self.crop
        assert isinstance(self.size, tuple)
        return self.size

    @classmethod
    def square(cls, image_size: int) -> ImageConfig:
        """CLIP's settings for a vision tower of this image size."""
        return cls(size=image_size, crop=(image_size, image_size))

    @classmethod
    def read(cls, folder: str | os.PathLike, image_size: int | None = None) -> ImageConfig:
        """Read a checkpoint's `preprocessor_config.json`, or `processor_config.json`.

        Args:
          image_size: of the vision tower. A folder without either file means CLIP's settings for
            it.

        Raises:
          ValueError: naming file and field: not CLIP's processing, or not this `image_size`.
        """
        for name in _FILES:
            file = Path(folder) / name
            if not present(file):
                continue
            fields = read_object(file)
            if name == _FILES[1]:
                nested = fields.get("image_processor")
                if not isinstance(nested, dict):
                    continue
                fields = nested
            config = _from_fields(file, fields)
            if image_size is not None and config.shape != (image_size, image_size):
                height, width = config.shape
                raise ValueError(
                    f"{file}: makes images of {width} by {height} pixels, and the vision tower "
                    f"takes {image_size} by {image_size}"
                )
            return config
        return cls() if image_size is None else cls.square(image_size)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `preprocessor_config.json`, which `read` and transformers read.

        `background` has no place there.
        """
        crop, size = self.crop, self.size
        fields: dict[str, Any] = {
            "image_processor_type": _SAME[0],
            "do_convert_rgb": True,
            "do_resize": size is not None,
            "do_center_crop": crop is not None,
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
            "resample": self.resample,
        }
        if isinstance(size, tuple):
            fields["size"] = {"height": size[0], "width": size[1]}
        elif size is not None:
            fields["size"] = {"shortest_edge": size}
        if crop is not None:
            fields["crop_size"] = {"height": crop[0], "width": crop[1]}
        write_json(Path(folder) / _FILES[0], fields)


def _from_fields(file: Path, fields: dict[str, Any]) -> ImageConfig:
    """Settings in the words of transformers: those of 5, of 4, and of the feature extractors."""
    flags = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
    check_types(file, fields, dict.fromkeys(flags, bool) | {"rescale_factor": (int, float)})
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if kind not in (None, *_SAME):
        raise ValueError(f"{file}: image_processor_type {kind!r:.80}: only CLIP's is implemented")
    if fields.get("do_pad"):
        raise ValueError(f"{file}: do_pad is not implemented")

    def given(name: str, default: Any) -> Any:
        return default if fields.get(name) is None else fields[name]

    def wrong(name: str, wanted: str) -> ValueError:
        return ValueError(f"{file}: {name} must be {wanted}, got {fields[name]!r:.80}")

    def sides(name: str, value: Any) -> Any:
        if isinstance(value, dict) and {k for k, v in value.items() if v is not None} == {
            "height",
            "width",
        }:
            return value["height"], value["width"]
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        raise wrong(name, 'a number or {"height": ..., "width": ...}')

    size = given("size", 224)
    if isinstance(size, dict) and size.get("shortest_edge") is not None:
        if size.get("longest_edge") is not None:
            raise wrong("size", "without longest_edge, which CLIP does not have")
        size = size["shortest_edge"]
    elif not isinstance(size, int):
        size = sides("size", size)
    mean, std = given("image_mean", _MEAN), given("image_std", _STD)
    normalised = given("do_normalize", True)
    try:
        return ImageConfig(
            size=size if given("do_resize", True) else None,
            crop=sides("crop_size", given("crop_size", 224))
            if given("do_center_crop", True)
            else None,
            resample=given("resample", 3),
            scale=given("rescale_factor", 1 / 255) if given("do_rescale", True) else 1.0,
            mean=_by_colour(mean) if normalised else (0.0, 0.0, 0.0),
            std=_by_colour(std) if normalised else (1.0, 1.0, 1.0),
        )
    except ValueError as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file}: {error}") from None


def _by_colour(value: Any) -> Any:
    return (value,) * 3 if isinstance(value, (int, float)) else value


# --- One image ------------------------------------------------------------------------------


def read_image(
    image: ImageInput, background: tuple[int, int, int] | None = WHITE, position: int | None = None
) -> PIL.Image.Image:
    """Decode an image into RGB, upright, as the top of this file says.

    Args:
      background: see `ImageConfig`.
      position: the image's number among others, for errors.

    Raises:
      ImageError: it cannot be read, or has more pixels than Pillow's limit,
        `PIL.Image.MAX_IMAGE_PIXELS`.
      ImportError: Pillow is not installed.
    """
    label = None if position is None else numbered(position)
    return _named(image, label, lambda: _decode(image, background))


def numbered(position: int) -> str:
    """What errors call an image among others, where nothing else is said."""
    return f"image {position}"


def _named(image: ImageInput, label: str | None, work: Any) -> Any:
    """work(); whatever a decoder raises becomes an ImageError that names the image."""
    Image = _pillow()
    try:
        return work()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = _TOO_LARGE.format(Image.MAX_IMAGE_PIXELS)
    except ImageError as error:
        reason = str(error)
    except Image.UnidentifiedImageError:
        reason = f"not an image that Pillow can read{_beginning(image)}"
    except Exception as error:
        reason = f"cannot be decoded: {str(error) or type(error).__name__}"
    name = _name(image)
    place = name if label is None else f"{label} ({name})"
    raise ImageError(f"{place}: {reason}") from None


_TOO_LARGE = (
    "more than {:,} pixels, which may be a decompression bomb; make it smaller, or raise "
    "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
)


@functools.cache
def _pillow() -> Any:
    """The module PIL.Image with all its formats."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "colbert-jax[images]"') from error
    Image.preinit()  # common formats come first
    Image.init()
    return Image


def _name(image: ImageInput) -> str:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"{len(image):,} bytes"
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        name = name if isinstance(name, str) else os.fsdecode(name)
        return name if len(name) <= 200 else f"{name[:100]}...{name[-97:]}"
    if isinstance(image, _pillow().Image):
        return f"PIL image {getattr(image, 'filename', '') or ''}".strip()
    shape = getattr(image, "shape", None)
    return type(image).__name__ if shape is None else f"array of shape {tuple(shape)}"


def _beginning(image: ImageInput) -> str:
    if isinstance(image, (str, os.PathLike)):
        with open(Path(image).expanduser(), "rb") as stream:
            image = stream.read(40)
    return f"; it starts with {bytes(image[:40])!r}" if isinstance(image, bytes) else ""


@contextmanager
def _opened(image: ImageInput) -> Iterator[PIL.Image.Image]:
    """A PIL image whose header is read and whose size is within Pillow's limit."""
    Image = _pillow()
    if isinstance(image, Image.Image):
        _check_pixels(image.width, image.height)
        yield image
        return
    formats = [name for name in Image.ID if name not in _PROGRAMS]
    with _stream(image) as stream, Image.open(stream, formats=formats) as opened:
        _check_pixels(opened.width, opened.height)
        yield opened


def _stream(image: Any) -> Any:
    if isinstance(image, (bytes, bytearray, memoryview)):
        if not len(image):
            raise ImageError("empty")
        return io.BytesIO(image)
    if isinstance(image, str) and "://" in image:
        raise ImageError("an address; fetch the image, and pass its path or bytes")
    path = Path(os.fsdecode(image)).expanduser()
    try:
        there = present(path)
    except ValueError as error:
        raise ImageError(str(error).removeprefix(f"{path}: ")) from None
    if not there:
        raise ImageError("no such file")
    if not path.stat().st_size:
        raise ImageError("an empty file")
    return path.open("rb")


def _check_pixels(width: int, height: int) -> None:
    most = _pillow().MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ImageError(_TOO_LARGE.format(most))
    if not width or not height:
        raise ImageError(f"has no pixels: {width} by {height}")


def _encoded(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview))


def _decode(image: Any, background: tuple[int, int, int] | None) -> PIL.Image.Image:
    from PIL import ImageOps

    if not _encoded(image) and not isinstance(image, _pillow().Image):
        return _flat(_from_array(image), background)
    with _opened(image) as opened:
        with _loading if opened is image else nullcontext():
            opened.load()
        try:
            upright = ImageOps.exif_transpose(opened)
        except Exception:  # damaged EXIF says nothing about a good picture
            upright = opened
        return _flat(upright, background)


def _flat(image: PIL.Image.Image, background: tuple[int, int, int] | None) -> PIL.Image.Image:
    """Any mode to RGB, transparent parts over the background."""
    Image = _pillow()
    transparency = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "I":
            if values.min() < 0 or values.max() >= 1 << 16:
                raise ImageError(
                    f"mode I with values from {values.min()} to {values.max()}; scale them to 16 "
                    "bits, 0 to 65535"
                )
            values = values.astype(np.uint16)
        image = _from_array(values)
        if isinstance(transparency, int):
            alpha = Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8))
            image = Image.merge("LA", (image, alpha))
        transparency = None
    if image.mode == "La":  # alpha multiplied in; Pillow converts it to LA only
        image = image.convert("LA")
    keyed = transparency is not None and image.mode in ("1", "L", "P", "RGB")
    if keyed or image.mode in ("LA", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        if background is not None:
            behind = Image.new("RGBA", image.size, (*background, 255))
            image = Image.alpha_composite(behind, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(image: Any) -> PIL.Image.Image:
    """[H, W], [H, W, C] or [C, H, W] to mode L, LA, RGB or RGBA."""
    if not hasattr(image, "shape") or isinstance(image, (list, tuple)):
        raise ImageError(
            f"not an image but {type(image).__name__}: pass a path, bytes, a PIL image or an array"
        )
    pixels = np.asarray(image)
    channels = pixels.ndim == 3
    if channels and pixels.shape[-1] > 4:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim not in (2, 3) or (channels and not 1 <= pixels.shape[-1] <= 4):
        raise ImageError("an image is [H, W], [H, W, C] or [C, H, W] with 1 to 4 colours C")
    if not pixels.size:
        raise ImageError("has no pixels")
    pixels = _bytes(pixels)
    if channels and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return _pillow().fromarray(np.ascontiguousarray(pixels))


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Any numbers to uint8."""
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if kind == "u" and pixels.dtype.itemsize == 2:
        return (pixels >> 8).astype(np.uint8)
    if kind not in "iuf" and pixels.dtype.name != "bfloat16":
        raise ImageError(f"an array of {pixels.dtype}, not of numbers")
    floating = kind not in "iu"
    lowest, highest = pixels.min(), pixels.max()
    most = 1 if floating else 255
    if not (lowest >= 0 and highest <= most):  # not a number fails too
        advice = "scale them, or convert to uint8" if floating else "scale them"
        raise ImageError(
            f"{pixels.dtype} values from {lowest} to {highest}, expected 0 to {most}; {advice}"
        )
    if floating:
        return np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    return pixels.astype(np.uint8)


# --- Pixel values ---------------------------------------------------------------------------


def _fit(image: PIL.Image.Image, config: ImageConfig) -> PIL.Image.Image:
    """Resize and cut out the centre."""
    width, height = image.size
    if isinstance(config.size, tuple):
        height, width = config.size
    elif config.size is not None:
        short, long = min(width, height), max(width, height)
        long = int(config.size * long / short)
        width, height = (config.size, long) if width <= height else (long, config.size)
    crop_height, crop_width = config.crop or (height, width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    box = (left, top, left + crop_width, top + crop_height)
    resample: Any = config.resample
    if width * height <= _RESIZED_WHOLE:
        return image.resize((width, height), resample).crop(box)
    # A thin image grows long. Cut between resizing its width and its height it stays small, and
    # differs by one level here and there where Pillow would resize the height first.
    most = _pillow().MAX_IMAGE_PIXELS
    if most is not None and max(width * image.height, crop_width * height) > most:
        raise ImageError(
            f"{image.width} by {image.height} pixels, which is too long to be resized to {width} "
            f"by {height}; cut it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    image = image.resize((width, image.height), resample)
    image = image.crop((left, 0, box[2], image.height))
    image = image.resize((crop_width, height), resample)
    return image.crop((0, top, crop_width, box[3]))


@functools.lru_cache(8)
def _table(config: ImageConfig) -> np.ndarray:
    """float32[3, 256]: what each value of a colour becomes, in the order of transformers' steps."""
    scaled = (np.arange(256) * np.float64(config.scale)).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None] for v in (config.mean, config.std))
    return (scaled - mean) / std


def fitted_image(
    image: ImageInput, config: ImageConfig, label: str | None = None
) -> PIL.Image.Image:
    """The part of an image that a model sees: upright, resized, cut; RGB.

    Args:
      label: what errors call the image.

    Raises:
      ImageError, ImportError: as `read_image`.
    """
    return _named(image, label, lambda: _fit(_decode(image, config.background), config))


def _pixels(image: ImageInput, config: ImageConfig, label: str) -> np.ndarray:
    """float32[3, H, W] of one image; raises ImageError."""
    fitted = fitted_image(image, config, label)
    channels = np.moveaxis(np.asarray(fitted), -1, 0)
    pairs = zip(_table(config), channels, strict=True)
    return np.stack([table[channel] for table, channel in pairs])


def pixel_values(
    images: ImageInput | Sequence[ImageInput], config: ImageConfig | None = None
) -> np.ndarray:
    """The pixel values of a few images, computed on host threads.

    Args:
      images: one image or many, see the top of this file.
      config: If None, CLIP's.

    Returns:
      float32[n, 3, H, W], of `config.shape`; n = 1 for one image.

    Raises:
      ImageError: naming all images that cannot be used.
      ImportError: Pillow is not installed.
    """
    config = config or ImageConfig()
    items: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        return np.zeros((0, 3, *config.shape), np.float32)
    (block,) = pixel_blocks(items, config, rows=len(items), on_error="keep")
    _raise(list(block.failed.values()), len(items))
    return block.pixels


class Block(NamedTuple):
    """Consecutive images.

    start: the position of the first.
    pixels: float32[n, 3, H, W]; zero where an image failed.
    failed: the error of each image that cannot be used, by position.
    """

    start: int
    pixels: np.ndarray
    failed: dict[int, ImageError]


def pixel_blocks(
    images: Iterable[ImageInput],
    config: ImageConfig | None = None,
    *,
    rows: int = 64,
    threads: int | None = None,
    on_error: str = "raise",
    label: Callable[[int], str] = numbered,
) -> Iterator[Block]:
    """The pixel values of many images, in order, a block at a time.

    The next block is computed on host threads while the caller uses the last; about two are in
    memory. Pass paths rather than PIL images, which keep what they have decoded.

    Args:
      images: read as they are needed, so a generator will do.
      config: If None, CLIP's.
      rows: images of a block; the last has what is left.
      threads: If None, as many as there are cores.
      on_error: "raise" stops at an image that cannot be used. "keep" goes on; the image's row is
        zero and its error in `Block.failed`, so that one bad image costs no other.
      label: what errors call the image at a position.

    Raises:
      ImageError: at the first block with an image that cannot be used, naming it.
      ImportError: Pillow is not installed.
    """
    require(rows >= 1, f"rows must be at least 1, got {rows}")
    require(threads is None or threads >= 1, f"threads must be at least 1, got {threads}")
    require(on_error in ("raise", "keep"), f"on_error must be raise or keep, got {on_error!r}")
    _pillow()
    return _blocks(
        images, config or ImageConfig(), rows, threads or num_threads(), on_error == "raise", label
    )


def _blocks(
    images: Iterable[ImageInput],
    config: ImageConfig,
    rows: int,
    threads: int,
    stop: bool,
    label: Callable[[int], str],
) -> Iterator[Block]:
    start = 0
    with closing(_ahead(images, config, rows + threads, threads, label)) as outcomes:
        while part := list(itertools.islice(outcomes, rows)):
            pixels = np.zeros((len(part), 3, *config.shape), np.float32)
            failed = {}
            for row, outcome in enumerate(part):
                if not isinstance(outcome, ImageError):
                    pixels[row] = outcome
                elif stop:
                    raise outcome
                else:
                    failed[start + row] = outcome
            part.clear()  # it holds the rows again
            yield Block(start, pixels, failed)
            start += len(pixels)


def _ahead(
    images: Iterable[ImageInput],
    config: ImageConfig,
    ahead: int,
    threads: int,
    label: Callable[[int], str],
) -> Generator[np.ndarray | ImageError, None, None]:
    """The pixel values of each image, or its error, while those after it are being computed."""

    def compute(position: int, image: ImageInput) -> np.ndarray | ImageError:
        try:
            return _pixels(image, config, label(position))
        except ImageError as error:
            return error

    host = ThreadPoolExecutor(threads, thread_name_prefix="colbert_jax images")
    waiting: deque[Future] = deque()
    try:
        for position, image in enumerate(images):
            waiting.append(host.submit(compute, position, image))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        host.shutdown(cancel_futures=True)


def check_images(
    images: Iterable[ImageInput],
    *,
    decode: bool = False,
    config: ImageConfig | None = None,
    threads: int | None = None,
    label: Callable[[int], str] = numbered,
) -> None:
    """Raise ImageError, naming them, if there are images that cannot be used.

    Args:
      images: see the top of this file.
      decode: whether to decode every image, which takes about as long as `pixel_blocks`. If False,
        only headers are read: that finds files that are missing, empty, too large, or no images;
        not truncated ones.
      config: whether to decode, resize and cut every image too, by these settings: nothing that
        `pixel_blocks` can find is left then. If None, not.
      threads: If None, as many as there are cores.
      label: what errors call the image at a position.
    """
    _pillow()
    failed: list[ImageError] = []
    count = 0

    def look(image: ImageInput) -> None:
        if config is not None:
            _fit(_decode(image, config.background), config)
        elif decode or not _encoded(image):
            _decode(image, WHITE)
        else:
            with _opened(image):
                pass

    def check(place: tuple[int, ImageInput]) -> ImageError | None:
        position, image = place
        try:
            _named(image, label(position), lambda: look(image))
        except ImageError as error:
            return error
        return None

    with ThreadPoolExecutor(threads or num_threads()) as host:
        places = enumerate(images)
        while window := list(itertools.islice(places, 1024)):
            count += len(window)
            failed += [error for error in host.map(check, window) if error is not None]
    _raise(failed, count)


def _raise(failed: Sequence[ImageError], count: int) -> None:
    """One error for all: the first few by name."""
    if not failed:
        return
    if count == 1:
        raise failed[0]
    lines = [str(error) for error in failed[:_NAMED]]
    if len(failed) > _NAMED:
        lines.append(f"and {len(failed) - _NAMED} more")
    what = "1 image" if len(failed) == 1 else f"{len(failed)} images"
    raise ImageError(f"{what} of {count} cannot be used:\n  " + "\n  ".join(lines))
