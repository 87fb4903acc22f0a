"""Pixel values: bit for bit those of transformers' Pillow-based CLIP processor; modes and damage by
hand-worked values."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colbert_jax import images
from colbert_jax.images import (
    ImageConfig,
    ImageError,
    check_images,
    pixel_blocks,
    pixel_values,
    read_image,
)

# The arithmetic of CLIP leaves the stored values as they are: an image of one size, uint8 in float.
PLAIN = ImageConfig(size=None, crop=(2, 3), scale=1.0, mean=(0, 0, 0), std=(1, 1, 1))
# Packages that ship photographs, and where.
PHOTOGRAPHS = {"skimage": "data", "sklearn": "datasets/images"}
# Drawings and scans of text are among them; that makes no difference here.
MODES = ("RGB", "L", "CMYK", "P", "LA", "RGBA", "PA", "1", "YCbCr", "HSV")


def oracle(folder: Path | None = None):
    """The Pillow-based processor of the installed transformers, over our background.

    Version 4 shows the colours that are stored in transparent parts, and takes an image that is 3
    pixels high for one with the colours first unless it is told.
    """
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "CLIPImageProcessorPil", None)
    told = {} if kind else {"input_data_format": "channels_last"}
    kind = kind or transformers.CLIPImageProcessor
    processor = kind() if folder is None else kind.from_pretrained(folder)

    def process(image: Image.Image) -> np.ndarray:
        image = read_image(image) if told and image.mode.endswith("A") else image
        return np.asarray(processor(image, return_tensors="np", **told)["pixel_values"][0])

    return process


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photographs() -> list[Path]:
    found: list[Path] = []
    for package, folder in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"the photographs of {package} are not installed")
        place = Path(spec.submodule_search_locations[0], folder)
        found += sorted(f for f in place.iterdir() if f.suffix in (".png", ".jpg"))
    return found


# --- The same values as transformers ---------------------------------------------------------


def test_photographs_equal_transformers(photographs):
    process = oracle()
    assert len(photographs) >= 20
    values = pixel_values(photographs)
    for file, ours in zip(photographs, values, strict=True):
        with Image.open(file) as opened:
            theirs = process(opened)
        np.testing.assert_array_equal(ours, theirs, file.name)


def test_photographs_of_all_modes_and_odd_sizes_equal_transformers(photographs):
    """Each photograph is cut to an odd size and takes the next mode."""
    process = oracle()
    for number, file in enumerate(photographs):
        mode = MODES[number % len(MODES)]
        with Image.open(file) as opened:
            part = opened.convert("RGB").crop((0, 0, 101 + 17 * number, 333 - 5 * number))
        if mode == "PA":
            part = part.quantize(64).convert("PA")
        elif mode in ("LA", "RGBA"):
            part.putalpha(part.convert("L"))
        part = part.convert(mode)
        np.testing.assert_array_equal(pixel_values(part)[0], process(part), f"{file.name} {mode}")


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 500), (500, 1), (3, 900), (224, 224), (223, 225), (2000, 30)]
)
def test_extreme_sizes_equal_transformers(size):
    image = noise(*size)
    np.testing.assert_array_equal(pixel_values(image)[0], oracle()(image))


# What is on the hub, and what else transformers reads.
SETTINGS = {
    "openai": {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    },
    "version 5": {
        "crop_size": {"height": 336, "width": 336},
        "do_convert_rgb": True,
        "image_processor_type": "CLIPImageProcessor",
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 336},
    },
    "rectangle": {"size": {"height": 50, "width": 70}, "crop_size": {"height": 31, "width": 40}},
    "black borders": {"size": 21, "crop_size": {"height": 32, "width": 43}},
    "no resizing": {"do_resize": False, "crop_size": 65},
    "no crop": {"do_center_crop": False, "size": {"height": 33, "width": 20}},
    "no scaling": {"do_rescale": False},
    "no normalising": {"do_normalize": False},
    "other numbers": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3},
    **{f"filter {n}": {"resample": n, "size": 48, "crop_size": 40} for n in (0, 1, 2, 3, 4, 5)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_read_as_transformers_reads_them(name, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS[name]))
    config, process = ImageConfig.read(tmp_path), oracle(tmp_path)
    for image in (noise(60, 91), noise(77, 40)):
        ours = pixel_values(image, config)
        assert ours.shape == (1, 3, *config.shape) and ours.dtype == np.float32
        np.testing.assert_array_equal(ours[0], process(image))


def test_defaults_by_hand():
    values = pixel_values(Image.new("RGB", (5, 9), "white"))
    expected = [(1 - m) / s for m, s in zip(images._MEAN, images._STD, strict=True)]
    assert values.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(values[0, :, 100, 100], expected, atol=1e-6)
    assert ImageConfig.square(336).shape == (336, 336)


# --- Settings --------------------------------------------------------------------------------


def test_folder_without_the_file_has_clips_settings(tmp_path):
    assert ImageConfig.read(tmp_path) == ImageConfig()
    assert ImageConfig.read(tmp_path, image_size=336) == ImageConfig.square(336)
    nested = {"image_processor": {"size": 32, "crop_size": 32}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert ImageConfig.read(tmp_path) == ImageConfig.square(32)
    (tmp_path / "processor_config.json").write_text("{}")
    assert ImageConfig.read(tmp_path) == ImageConfig()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_processor_type": "ViTImageProcessor"}, "only CLIP's"),
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": "yes"}, "do_resize must be bool"),
        ({"size": {"shortest_edge": 224, "longest_edge": 500}}, "longest_edge"),
        ({"size": {"max_height": 224, "max_width": 500}}, "size must be"),
        ({"size": "224"}, "size must be"),
        ({"size": 0}, "positive"),
        ({"crop_size": {"height": 224}}, "crop_size must be"),
        ({"crop_size": [224, 224]}, "crop_size must be"),
        ({"resample": 9}, "resample must be 0 to 5"),
        ({"image_mean": [0.5]}, "mean must be 3 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "std must not be 0"),
        ({"do_center_crop": False}, "one shape"),
        ({"size": 336, "crop_size": 336}, "the vision tower takes 224 by 224"),
    ],
)
def test_settings_that_are_refused_name_file_and_field(fields, message, tmp_path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError) as refused:
        ImageConfig.read(tmp_path, image_size=224)
    assert str(refused.value).startswith(f"{file}: ") and message in str(refused.value)


@pytest.mark.parametrize(
    "fields", [{"size": True}, {"crop": (1, 2, 3)}, {"background": (0, 0, 256)}, {"scale": "1"}]
)
def test_wrong_arguments_are_refused(fields):
    with pytest.raises(ValueError):
        ImageConfig(**fields)


# --- Kinds of images -------------------------------------------------------------------------


def stored(image, background=images.WHITE) -> np.ndarray:
    """uint8[H, W, 3]"""
    return np.asarray(read_image(image, background))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, kind, tmp_path):
    """The orientations by their definition: where the stored first row and column are shown."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(turned)), kind, exif=exif)
    file = tmp_path / "image"
    file.write_bytes(data)
    with Image.open(file) as opened:
        for image in (file, str(file), data, opened):
            pixels = stored(image).astype(int)
            assert pixels.shape == (16, 32, 3)
            assert abs(pixels - upright).max() < 40  # JPEG


def test_damaged_exif_is_left_out():
    data = encoded(Image.new("RGB", (4, 2), "red"), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    assert (stored(data) == [255, 0, 0]).all()


def test_transparency_is_over_the_background():
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    half = Image.new("LA", (3, 2), (0, 51))
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    entry = encoded(palette, transparency=1)
    entries = encoded(palette, transparency=bytes([255, 0]))
    colour = encoded(Image.new("RGB", (3, 2), (9, 9, 9)), transparency=(9, 9, 9))
    grey = encoded(Image.new("L", (3, 2), 7), transparency=7)
    wide = encoded(Image.fromarray(np.full((2, 3), 0x1234, np.uint16)), transparency=0x1234)
    gif = encoded(palette, "GIF", transparency=1)
    for image in (clear, entry, entries, colour, grey, wide, gif):
        assert (stored(image) == 255).all()
    assert (stored(half) == 204).all()
    assert (stored(half.convert("La")) == 204).all()
    assert (stored(clear.convert("RGBa"), (10, 20, 30)) == [10, 20, 30]).all()
    # None: the colours that are stored there, as in transformers 4
    assert (stored(clear, None) == [255, 0, 0]).all()
    assert (stored(entries, None) == [0, 0, 255]).all()
    assert (stored(half, None) == 0).all()


def test_grey_cmyk_and_16_bits():
    assert (stored(Image.new("L", (3, 2), 77)) == 77).all()
    assert (stored(Image.new("1", (3, 2), 1)) == 255).all()
    ink = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    assert (stored(ink) == [255, 0, 0]).all()
    jpeg = stored(encoded(ink, "JPEG", quality=100)).astype(int)
    assert abs(jpeg - [255, 0, 0]).max() < 8
    deep = np.array([[0, 255, 256], [0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    high = np.array([[0, 0, 1], [0x7F, 0x80, 0xFF]])
    for image in (
        deep,
        Image.fromarray(deep),
        encoded(Image.fromarray(deep)),
        encoded(Image.fromarray(deep), "TIFF"),
        Image.fromarray(deep.astype(np.int32)),  # mode I
    ):
        np.testing.assert_array_equal(stored(image)[..., 0], high)
    shades = np.array([[0, 0.2, 0.5], [0.6, 0.8, 1]], np.float32)
    np.testing.assert_array_equal(
        stored(Image.fromarray(shades))[..., 1], [[0, 51, 128], [153, 204, 255]]
    )
    with pytest.raises(ImageError, match="mode I with values from 0 to 70000; scale them"):
        read_image(Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(ImageError, match=r"float32 values from 0\.0 to 254\.0, expected 0 to 1"):
        read_image(Image.fromarray(np.array([[0, 254]], np.float32)))


def test_first_of_several_frames(tmp_path):
    file = tmp_path / "two.tif"
    frames = [Image.new("RGB", (3, 2), c) for c in ("red", "blue")]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    assert (stored(file) == [255, 0, 0]).all()


def test_arrays():
    rgb = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    grey = rgb[..., 0]
    chw = np.moveaxis(rgb, -1, 0)
    for image in (rgb, chw, rgb.astype(np.int64), rgb / 255, (chw / 255).astype(np.float32)):
        np.testing.assert_array_equal(stored(image), rgb)
    for image in (grey, grey[..., None], grey[None], (grey / 255).astype(np.float16)):
        np.testing.assert_array_equal(stored(image), np.repeat(grey[..., None], 3, -1))
    bits = grey > 30
    np.testing.assert_array_equal(stored(bits)[..., 0], np.where(bits, 255, 0))
    alpha = np.full((5, 6, 1), 255, np.uint8)
    np.testing.assert_array_equal(stored(np.concatenate([rgb, alpha], -1)), rgb)
    clear = np.concatenate([rgb, 0 * alpha], -1)
    assert (stored(clear) == 255).all() and (stored(np.moveaxis(clear, -1, 0)) == 255).all()
    assert (stored(np.stack([grey, 0 * grey], -1)) == 255).all()
    import jax.numpy as jnp

    np.testing.assert_array_equal(stored(jnp.asarray(rgb)), rgb)
    bright = jnp.ones((5, 6, 3), jnp.bfloat16)
    assert (stored(bright) == 255).all()


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((2, 5, 5, 3), np.uint8), "an image is [H, W]"),
        (np.zeros((9, 9, 9), np.uint8), "with 1 to 4 colours"),
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.full((5, 5), 1.5), "values from 1.5 to 1.5, expected 0 to 1"),
        (np.full((5, 5), np.nan), "expected 0 to 1"),
        (np.full((5, 5), 300), "int64 values from 300 to 300, expected 0 to 255"),
        (np.full((5, 5), -1), "expected 0 to 255"),
        (np.full((5, 5), "a"), "not of numbers"),
        ([[1, 2], [3, 4]], "not an image but list"),
        (None, "not an image but NoneType"),
        (17, "not an image but int"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ImageError) as refused:
        read_image(image, position=3)
    assert str(refused.value).startswith("image 3 (") and message in str(refused.value)


# --- Damage ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path) -> dict[str, str]:
    """Files that cannot be used, and what is said of them."""
    jpeg = encoded(noise(64, 64), "JPEG")
    page = b"<!DOCTYPE html>\n"
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "header.jpg").write_bytes(jpeg[:30])
    (tmp_path / "cut.png").write_bytes(encoded(noise(64, 64))[:5000])
    (tmp_path / "text.jpg").write_bytes(page)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return {
        str(tmp_path / "cut.jpg"): "truncated",
        str(tmp_path / "header.jpg"): "",
        str(tmp_path / "cut.png"): "truncated",
        str(tmp_path / "text.jpg"): f"not an image that Pillow can read; it starts with {page!r}",
        str(tmp_path / "empty.png"): "an empty file",
        str(tmp_path / "missing.png"): "no such file",
        str(tmp_path / "folder.png"): "a folder in place of a file",
        str(tmp_path / "link.png"): "a link to nowhere.png, which is not there",
        str(tmp_path / "program.jpg"): "not an image",  # Ghostscript is not started
        "https://example.org/a.jpg": "an address; fetch the image",
        "x" * 5000: "File name too long",
    }


def test_damaged_files_are_named(damaged, tmp_path):
    for name, message in damaged.items():
        with pytest.raises(ImageError) as refused:
            pixel_values(name)
        assert message in str(refused.value) and len(str(refused.value)) < 600
        assert f"image 0 ({name[:90]}" in str(refused.value)
    for data, message in ((b"", "empty"), (b"GIF89a", ""), (b"no", "it starts with b'no'")):
        with pytest.raises(ImageError, match=f"^{len(data)} bytes: ") as refused:
            read_image(data)
        assert message in str(refused.value)
    with Image.open(io.BytesIO(encoded(noise(9, 9)))) as closed:
        pass
    with pytest.raises(ImageError, match=r"^PIL image: cannot be decoded: ."):
        read_image(closed)


@pytest.mark.parametrize("length", range(0, 700, 23))
def test_no_truncation_escapes(length):
    """Every beginning of a file gives pixels or an ImageError, never another error."""
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"):
        data = encoded(noise(16, 16), kind)
        if length < len(data):
            with pytest.raises(ImageError):
                read_image(data[:length])
                raise ImageError("what is left out may be padding")


def test_decompression_bombs_are_refused(monkeypatch):
    data = encoded(Image.new("1", (50, 50)))
    for most in (2000, 1000):  # Pillow itself warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        for call in (read_image, pixel_values, lambda image: check_images([image])):
            with pytest.raises(ImageError, match=rf"more than {most:,} pixels.*bomb"):
                call(data)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="bomb"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
        read_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(data).size == (50, 50)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (3, 900), (900, 3), (40, 60)])
def test_long_images_are_cut_before_they_are_large(size, monkeypatch):
    """By at most one level other than resized whole, because Pillow chooses the order."""
    image = noise(*size)
    whole = np.asarray(images._fit(image, ImageConfig())).astype(int)
    monkeypatch.setattr(images, "_RESIZED_WHOLE", 0)
    cut = np.asarray(images._fit(image, ImageConfig()))
    assert abs(whole - cut).max() <= 1


def test_very_long_images():
    """What is resized may not exceed Pillow's limit either."""
    wide, high = (Image.new("L", size, 255) for size in ((30000, 1), (1, 30000)))
    white = Image.new("L", (9, 9), 255)
    np.testing.assert_array_equal(pixel_values(wide), pixel_values(white))
    with pytest.raises(ImageError, match=r"1 by 30000 pixels, .* resized to 224 by 6720000; cut"):
        pixel_values(high)
    assert read_image(high).size == (1, 30000)


def test_without_pillow(monkeypatch):
    images._pillow.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL", None)
    for call in (pixel_values, pixel_blocks, read_image, check_images):
        with pytest.raises(ImportError, match=r"colbert-jax\[images\]"):
            call(["a.png"])


# --- Many ------------------------------------------------------------------------------------


def shade(number: int) -> Image.Image:
    return Image.new("L", (3, 2), number % 256)


def test_blocks_are_in_order_and_ahead():
    taken = []

    def source():
        for number in range(100):
            taken.append(number)
            yield shade(number)

    blocks = pixel_blocks(source(), PLAIN, rows=16, threads=3)
    first = next(blocks)
    assert 16 < len(taken) < 40  # the next are being computed, not all
    rest = list(blocks)
    assert [b.start for b in (first, *rest)] == list(range(0, 100, 16))
    assert [len(b.pixels) for b in rest] == [16] * 5 + [4]
    pixels = np.concatenate([first.pixels, *(b.pixels for b in rest)])
    np.testing.assert_array_equal(pixels[:, 1, 1, 2], np.arange(100))


def test_blocks_that_nobody_wants_any_more_are_not_computed():
    blocks = pixel_blocks(iter([shade(0)] * 9), PLAIN, rows=2)
    next(blocks)
    blocks.close()
    assert list(pixel_blocks([], PLAIN)) == []
    assert pixel_values([], PLAIN).shape == (0, 3, 2, 3)


def test_one_missing_image_of_a_thousand():
    many = [shade(n) for n in range(1000)]
    many[700] = "missing.png"
    with pytest.raises(ImageError, match=r"^image 700 \(missing\.png\): no such file$"):
        for _ in pixel_blocks(many, PLAIN):
            pass
    rows = 0
    for block in pixel_blocks(many, PLAIN, on_error="keep"):
        for row, pixels in enumerate(block.pixels):
            number = block.start + row
            assert (pixels == (0 if number == 700 else number % 256)).all()
            assert (number in block.failed) == (number == 700)
            rows += 1
    assert rows == 1000
    with pytest.raises(ImageError, match=r"^1 image of 1000 cannot be used:\n  image 700 \(miss"):
        check_images(many)


def test_all_that_cannot_be_used_are_named_before_the_work(damaged):
    good = encoded(noise(5, 5))
    places = {name: 2 * n + 1 for n, name in enumerate(damaged)}
    mixed = [item for name in damaged for item in (good, name)]
    with pytest.raises(ImageError) as refused:
        check_images(mixed, decode=True)
    text = str(refused.value)
    assert text.startswith(f"{len(damaged)} images of {len(mixed)} cannot be used:")
    assert all(f"image {place} ({name[:90]}" in text for name, place in list(places.items())[:10])
    assert text.endswith(f"and {len(damaged) - 10} more")
    with pytest.raises(ImageError) as refused:  # headers alone do not tell where a file ends
        check_images(mixed)
    assert "cut.jpg" not in str(refused.value) and "missing.png" in str(refused.value)
    with pytest.raises(ImageError) as refused:
        pixel_values(mixed)
    assert str(refused.value) == text
    check_images([good, noise(3, 3), np.zeros((4, 4))], decode=True)


def test_one_lazy_pil_image_many_times():
    """PIL reads a file when it is first used; several threads at once would tear it."""
    for seed in range(5):
        image = noise(120, 130, seed=seed)
        with Image.open(io.BytesIO(encoded(image, "PNG"))) as lazy:
            values = pixel_values([lazy] * 16)
        assert (values == pixel_values(image)).all()


@pytest.mark.parametrize("options", [{"rows": 0}, {"threads": 0}, {"on_error": "skip"}])
def test_wrong_options_are_refused_at_once(options):
    with pytest.raises(ValueError):
        pixel_blocks([], PLAIN, **options)
