"""CLIP's vision transformer against transformers' CLIPVisionModel on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from colbert_jax.checkpoints.common import get_path
from colbert_jax.models.vision import (
    Vision,
    VisionConfig,
    image_size_of,
    vision_config,
    vision_names,
)

# The three published kinds, small: B/32; L/14; bigG/14 with exact GELU and an uneven head width.
TINY = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_channels=3,
    image_size=32,
    patch_size=8,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    initializer_range=0.02,
)
KINDS = {
    "B/32": TINY,
    "L/14": TINY | dict(hidden_size=32, num_attention_heads=4, image_size=28, patch_size=7),
    "bigG/14": TINY | dict(hidden_size=26, num_attention_heads=2, image_size=30, hidden_act="gelu"),
    "one layer, grey": TINY | dict(num_hidden_layers=1, num_channels=1, layer_norm_eps=1e-3),
}
B32 = TINY | dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
)


def torch_vision(fields, std=0.2):
    """transformers' model with every parameter random, and all its hidden states."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**fields)
    config._attn_implementation = "eager"
    model = transformers.CLIPVisionModel(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.replace("layrnorm", "norm") and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, std)

    def states(pixels):
        with torch.inference_mode():
            out = model(torch.from_numpy(pixels), output_hidden_states=True)
        assert (out.hidden_states[-1] == out.last_hidden_state).all()
        return [state.numpy() for state in out.hidden_states]

    tensors = {k.removeprefix("vision_model."): v.numpy() for k, v in model.state_dict().items()}
    return tensors, states


def abstract(config, dtype=jnp.float32):
    return nnx.split(nnx.eval_shape(lambda: Vision(config, dtype=dtype, rngs=nnx.Rngs(0))))


def load(config, tensors):
    graphdef, state = abstract(config)
    names = vision_names(config)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        array = tensors[names[path]]
        array = array.T if path[-1] == "kernel" else array
        assert array.shape == variable.shape, path
        leaves.append((path, variable.replace(jnp.asarray(array))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def check(fields, pixels, std=0.2, atol=1e-5):
    tensors, expected = torch_vision(fields, std)
    config = vision_config(fields)
    model = load(config, tensors)
    ours = jax.jit(lambda pixels: model(pixels))(pixels)
    theirs = expected(pixels)
    assert len(ours) == len(theirs) == config.num_hidden_layers + 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.float32 and a.shape[1] == config.patches + 1
        np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()), rtol=0)


def images(fields, n=3, seed=0):
    size = fields["image_size"]
    shape = (n, fields["num_channels"], size, size)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_torch(kind):
    check(KINDS[kind], images(KINDS[kind]))


@pytest.mark.slow
def test_parity_with_torch_at_full_size():
    check(B32, images(B32, 2), std=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_parameters(kind):
    config = vision_config(KINDS[kind])
    paths = {path for path, _ in nnx.to_flat_state(abstract(config)[1])}
    names = vision_names(config, "x.")
    assert set(names) == paths and len(set(names.values())) == len(names)


def test_what_a_last_patch_lacks_is_cut_off():
    config = vision_config(KINDS["bigG/14"])  # 30 pixels, patches of 8
    model = Vision(config, rngs=nnx.Rngs(0))
    pixels = images(KINDS["bigG/14"])
    changed = pixels.copy()
    changed[:, :, 24:], changed[..., 24:] = 9, 9
    run = jax.jit(lambda pixels: model(pixels)[-1])
    assert config.patches == 9
    np.testing.assert_array_equal(run(pixels), run(changed))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers(platform):
    config = vision_config(KINDS["L/14"])
    graphdef, state = abstract(config, jnp.bfloat16)
    pixels = jax.ShapeDtypeStruct((2, 3, 28, 28), jnp.float32)
    traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(state, pixels)
    assert "bf16" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_bfloat16_is_close():
    fields = KINDS["L/14"]
    config = vision_config(fields)
    tensors = {}
    for path, leaf in nnx.to_flat_state(abstract(config)[1]):
        rng = np.random.default_rng(len(tensors))
        array = rng.normal(float(path[-1] == "scale"), 0.1, leaf.shape).astype(np.float32)
        tensors[vision_names(config)[path]] = array.T if path[-1] == "kernel" else array
    exact = load(config, tensors)
    graphdef, _ = abstract(config, jnp.bfloat16)
    near = nnx.merge(graphdef, nnx.state(exact))
    pixels = images(fields)
    a, b = (jax.jit(lambda x, m=m: m(x)[-1])(pixels) for m in (exact, near))
    assert b.dtype == jnp.float32 and 0 < np.abs(a - b).max() < 0.1


def test_wrong_configurations_and_images():
    for change, message in (
        (dict(num_attention_heads=5), "hidden_size 24 is not a multiple of num_attention_heads 5"),
        (dict(patch_size=64), "patch_size 64 is larger than image_size 32"),
        (dict(hidden_act="none"), "hidden_act 'none' is not supported"),
        (dict(image_size=0), "image_size must be >= 1"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers must be <= 1000"),
        (dict(num_channels="3"), "num_channels must be int, got '3'"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionConfig(**TINY | change)
    model = Vision(vision_config(TINY), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"images are \[3, 16, 16\], the vision encoder takes \[3"):
        model(jnp.zeros((1, 3, 16, 16)))


def test_image_size_of_positions():
    assert image_size_of(50, 32) == 224 and image_size_of(577, 14) == 336
    assert image_size_of(51, 32) is None and image_size_of(1, 32) is None


def test_get_path_of_a_state():
    """The tables' paths lead through a nested state as they do through a flat one."""
    config = vision_config(TINY)
    state = nnx.to_pure_dict(nnx.state(Vision(config, rngs=nnx.Rngs(0)), nnx.Param))
    for path in vision_names(config):
        assert get_path(state, path).size
