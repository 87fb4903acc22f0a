"""Every backbone against torch's model of the same weights, and what they have in common."""

import dataclasses
import functools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file
from support import SIZES

from colbert_jax.models.backbones import (
    MODEL_TYPES,
    architecture,
    config_from_huggingface,
    is_unused,
    make_backbone,
    tensor_names,
    to_huggingface,
    transformers_names,
)
from colbert_jax.models.colbert import EncoderConfig, param_shapes
from colbert_jax.models.modernbert import rotary_tables
from colbert_jax.models.mpnet import relative_buckets

DISTILBERT = dict(
    model_type="distilbert",
    vocab_size=53,
    dim=24,
    n_layers=2,
    n_heads=3,
    hidden_dim=40,
    max_position_embeddings=48,
)
MODERNBERT = SIZES | dict(
    model_type="modernbert",
    num_hidden_layers=4,
    num_attention_heads=2,
    pad_token_id=0,
    local_attention=8,
)
HALVES = SIZES | dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
LFM2 = HALVES | dict(
    model_type="lfm2",
    hidden_size=16,
    num_hidden_layers=3,
    layer_types=["conv", "full_attention", "conv"],
    block_multiple_of=8,
)
QWEN3 = HALVES | dict(model_type="qwen3", head_dim=8)
PPLX = QWEN3 | dict(model_type="bidirectional_pplx_qwen3", use_bidirectional_attention=True)
LFM25 = LFM2 | dict(auto_map={"AutoModel": "modeling_lfm2_bidirectional.Lfm2BidirectionalModel"})
NEW = SIZES | dict(model_type="new", num_attention_heads=2)
# What nomic-bert's own repositories say, in GPT-2's names.
NOMIC_OWN = dict(
    model_type="nomic_bert",
    vocab_size=SIZES["vocab_size"],
    n_embd=SIZES["hidden_size"],
    n_layer=SIZES["num_hidden_layers"],
    n_head=2,
    n_inner=SIZES["intermediate_size"],
    n_positions=SIZES["max_position_embeddings"],
    activation_function="swiglu",
    layer_norm_epsilon=1e-12,
    rotary_emb_base=1000,
    rotary_emb_fraction=1.0,
    rotary_scaling_factor=None,
    max_trained_positions=20,
    prenorm=False,
    mlp_fc1_bias=False,
    type_vocab_size=2,
    pad_token_id=0,
)
# The sizes that the published config.json files hold.
PUBLISHED = {
    "LFM2-ColBERT-350M": dict(
        model_type="lfm2",
        vocab_size=64402,
        hidden_size=1024,
        intermediate_size=6656,
        block_ff_dim=6656,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    ),
    "pplx-embed-v1-late-0.6b": dict(
        model_type="bidirectional_pplx_qwen3",
        use_bidirectional_attention=True,
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1_000_000,
    ),
}
# transformers 5's words for a pattern and thetas of one's own.
ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 20_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
FIVE = dict(
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters=ROPE,
)
FOUR = dict(global_attn_every_n_layers=2, global_rope_theta=5_000.0, local_rope_theta=200.0)
BIASES = dict(norm_bias=True, attention_bias=True, mlp_bias=True)

CASES = {
    "bert": SIZES | dict(model_type="bert"),
    "bert gelu_new": SIZES | dict(model_type="bert", hidden_act="gelu_new", type_vocab_size=1),
    "roberta": SIZES | dict(model_type="roberta", type_vocab_size=1),
    "roberta pad 4": SIZES | dict(model_type="roberta", pad_token_id=4),
    "xlm-roberta": SIZES | dict(model_type="xlm-roberta", type_vocab_size=1, layer_norm_eps=1e-5),
    "distilbert": DISTILBERT,
    "distilbert relu": DISTILBERT | dict(activation="relu", sinusoidal_pos_embds=True),
    "electra": SIZES | dict(model_type="electra", embedding_size=10),
    "electra square": SIZES | dict(model_type="electra", embedding_size=24),
    "mpnet": SIZES | dict(model_type="mpnet"),
    "mpnet long": SIZES
    | dict(model_type="mpnet", max_position_embeddings=202, relative_attention_num_buckets=40),
    "jina": SIZES | dict(model_type="jina_embeddings_v3", num_attention_heads=2),
    "jina theta": SIZES
    | dict(
        model_type="jina_embeddings_v3",
        num_attention_heads=2,
        pad_token_id=4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "lfm2": LFM2,
    "lfm2 plain": LFM2
    | dict(
        layer_types=["conv", "full_attention", "conv"],
        conv_bias=True,
        conv_L_cache=4,
        block_auto_adjust_ff_dim=False,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    ),
    "eurobert": HALVES | dict(model_type="eurobert", num_key_value_heads=4, hidden_size=32),
    "eurobert grouped": HALVES
    | dict(model_type="eurobert", hidden_size=32, attention_bias=True, mlp_bias=True),
    "gte": SIZES | dict(model_type="gte", num_attention_heads=2),
    "gte without types": SIZES | dict(model_type="gte", num_attention_heads=2, type_vocab_size=0),
    "nomic": SIZES | dict(model_type="nomic_bert", num_attention_heads=2),
    "xmod": SIZES
    | dict(
        model_type="xmod",
        type_vocab_size=1,
        languages=["en_XX", "de_DE"],
        default_language="de_DE",
    ),
    "qwen3": QWEN3,
    "qwen3 biases": QWEN3 | dict(attention_bias=True, num_key_value_heads=4, rms_norm_eps=1e-3),
    "modernbert": MODERNBERT,
    "modernbert biases": MODERNBERT | BIASES | dict(local_attention=5),
    "modernbert 4": MODERNBERT | FOUR,
    "modernbert 5": MODERNBERT | FIVE | dict(norm_bias=True, hidden_activation="gelu_new"),
}
# transformers does not have these: test_parity_in_both_directions.
ELSEWHERE = ("bidirectional_pplx_qwen3",)
ONE_EACH = [
    next(name for name, case in CASES.items() if case["model_type"] == model_type)
    for model_type in MODEL_TYPES
    if model_type not in ELSEWHERE
]
# Of the tasks below, as many as transformers has for these, where they are few.
HEADS = {"jina_embeddings_v3": 4, "lfm2": 0, "qwen3": 2, "eurobert": 3, "gte": 3, "nomic_bert": 3}
# Under a prefix of their own there.
RENAMED_HEADS = {("qwen3", "QuestionAnswering")}
# One case a module, for what does not depend on the settings.
MODULES = [name for name in ONE_EACH if name != "xlm-roberta"]


def shallow(name):
    """The architecture of a case with as few layers as have all its parts: compiles faster."""
    if CASES[name]["model_type"] == "lfm2":
        return config_from_huggingface(CASES[name]).with_layers(2)
    if CASES[name]["model_type"] == "modernbert":
        return config_from_huggingface(CASES[name] | dict(num_hidden_layers=2))
    return dataclasses.replace(config_from_huggingface(CASES[name]), num_hidden_layers=1)


def batch(config, length):
    """Ids with padding inside and at the end, and masks: all, leading, with holes, none."""
    rng = np.random.default_rng(length)
    ids = rng.integers(5, config.vocab_size, (5, length), dtype=np.int32)
    attended = np.ones((5, length), bool)
    ids[1, length // 2 :], attended[1, length // 2 :] = config.pad_token_id, False
    ids[2, 3], ids[2, -2] = config.pad_token_id, config.pad_token_id
    attended[3] = rng.random(length) < 0.6
    attended[3, -length // 3 :] = False  # like [MASK] expansion: tokens that nobody attends to
    attended[4] = False
    return ids, attended


def abstract(config, dtype=jnp.float32):
    return nnx.eval_shape(lambda: make_backbone(config, dtype=dtype, rngs=nnx.Rngs(0)))


def random_model(config, dtype=jnp.float32):
    """With every parameter random, biases and normalisation included."""
    graphdef, state = nnx.split(abstract(config, dtype))
    rng, leaves = np.random.default_rng(7), []
    for path, variable in nnx.to_flat_state(state):
        array = rng.normal(float(path[-1] == "scale"), 0.1, variable.shape)
        leaves.append((path, variable.replace(jnp.asarray(array, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def run(model, ids, attended):
    return jax.jit(lambda ids, attended: model(ids, attended))(ids, attended)


def torch_model(case, seed=0):
    """transformers' model with every parameter random; its last hidden state as a function."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    transformers = pytest.importorskip("transformers")
    fields = {k: v for k, v in case.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(case["model_type"], **fields)
    # They differ where a token has nothing to attend to in its window; sdpa is the default.
    attention = "sdpa" if case["model_type"] == "modernbert" else "eager"
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.2)

    def last_hidden_state(ids, attended):
        with torch.inference_mode():
            ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(attended).long()
            return model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()

    return model, last_hidden_state


def load(config, tensors, prefix=""):
    """Our module with those tensors (numpy, torch's layout)."""
    graphdef, state = nnx.split(abstract(config))
    names = tensor_names(config, prefix)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        array = tensors[names[path]]
        array = array.T if path[-1] == "kernel" else array
        assert array.shape == variable.shape, path
        leaves.append((path, variable.replace(jnp.asarray(array))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


@pytest.mark.parametrize("name", CASES)
def test_parity_with_torch(name):
    case = CASES[name]
    theirs, expected = torch_model(case)
    config = config_from_huggingface(case)
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    model = load(config, tensors)
    assert config_from_huggingface(theirs.config.to_dict()) == config
    ids, attended = batch(config, min(config.max_length, 150))
    ours, theirs = run(model, ids, attended), expected(ids, attended)
    assert np.isfinite(theirs).all() and ours.dtype == jnp.float32
    print(f"{name}: largest difference {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def with_time(*names):
    skip = pytest.mark.skipif(not os.environ.get("COLBERT_JAX_LONG"), reason=support.LONG)
    return [pytest.param(name, marks=skip) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gte",
        "modernbert",
        *with_time("xlm-roberta", "jina", "lfm2", "qwen3", "eurobert", "nomic", "xmod"),
    ],
)
def test_parity_beyond_4096_tokens(name):
    """Embeddings of one text of 4,300 tokens, which is attended in blocks."""
    case = CASES[name] | {"max_position_embeddings": 4400}
    theirs, expected = torch_model(case)
    config = config_from_huggingface(case)
    model = load(config, {k: v.numpy() for k, v in theirs.state_dict().items()})
    ids = np.random.default_rng(0).integers(5, config.vocab_size, (1, 4300), dtype=np.int32)
    attended = np.ones(ids.shape, bool)
    ours, theirs = (
        hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
        for hidden in (np.asarray(run(model, ids, attended)), expected(ids, attended))
    )
    print(f"{name}: largest difference {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["jina", "lfm2", "qwen3", "eurobert", "gte", "nomic", "xmod"])
def test_transformers_loads_what_is_written(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs, _ = torch_model(CASES[name])
    config = config_from_huggingface(CASES[name])
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    tensors = {n: np.ascontiguousarray(state[n]) for n in tensor_names(config).values()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(config)))
    again, said = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["unexpected_keys"] and all("pooler" in key for key in said["missing_keys"])
    assert config_from_huggingface(again.config.to_dict()) == config
    for tensor, array in tensors.items():
        np.testing.assert_array_equal(again.state_dict()[tensor].numpy(), array)


@pytest.mark.parametrize("name", CASES)
def test_names_are_the_parameters(name):
    config = config_from_huggingface(CASES[name])
    state = nnx.state(abstract(config))
    names = tensor_names(config, "x.")
    assert set(names) == {path for path, _ in nnx.to_flat_state(state)}
    assert len(set(names.values())) == len(names)
    assert all(tensor.startswith("x.") for tensor in names.values())


def test_names_take_milliseconds():
    config = config_from_huggingface(CASES["bert"] | dict(num_hidden_layers=12))
    start = time.thread_time()
    tensor_names(config)
    assert time.thread_time() - start < 0.05


@pytest.mark.parametrize("name", [*ONE_EACH, "modernbert biases"])
def test_tensors_of_models_with_heads(name):
    """Behind the prefix lies the backbone; everything else is a head, and ignored."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    transformers = pytest.importorskip("transformers")
    case = CASES[name]
    fields = {k: v for k, v in case.items() if k != "model_type"}
    config = config_from_huggingface(case)
    names = set(tensor_names(config, architecture(config).prefix).values())
    theirs = transformers.AutoConfig.for_model(case["model_type"], **fields)
    heads = 0
    for task in (
        "PreTraining",
        "MaskedLM",
        "SequenceClassification",
        "TokenClassification",
        "QuestionAnswering",
        "MultipleChoice",
    ):
        if (case["model_type"], task) in RENAMED_HEADS:
            continue
        try:
            with torch.device("meta"):
                model = getattr(transformers, f"AutoModelFor{task}").from_config(theirs)
        except ValueError:  # this architecture has no such head
            continue
        tensors = set(model.state_dict())
        assert names <= tensors, task
        rest = tensors - names
        assert rest and all(is_unused(config, tensor) for tensor in rest), rest
        heads += 1
    assert heads >= HEADS.get(case["model_type"], 5)
    assert not any(is_unused(config, tensor) for tensor in tensor_names(config).values())


@pytest.mark.parametrize("name", CASES)
def test_export_loads_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    config = config_from_huggingface(CASES[name])
    fields = to_huggingface(config)
    assert config_from_huggingface(fields) == config
    theirs = transformers.AutoConfig.for_model(**fields)
    assert config_from_huggingface(theirs.to_dict()) == config


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", MODULES)
def test_lowers(name, platform):
    config = shallow(name)
    graphdef, state = nnx.split(abstract(config, jnp.bfloat16))
    arguments = [jax.ShapeDtypeStruct((2, 16), d) for d in (jnp.int32, jnp.bool)]
    traced = jax.jit(lambda state, *rest: nnx.merge(graphdef, state)(*rest)).trace(
        state, *arguments
    )
    assert "bf16" in traced.lower(lowering_platforms=(platform,)).as_text()


@functools.cache
def padded(name):
    """A batch with 8 tokens of padding, and its hidden states."""
    config = shallow(name)
    ids = np.random.default_rng(0).integers(5, 53, (2, 11), dtype=np.int32)
    ids = np.pad(ids, ((0, 0), (0, 8)), constant_values=config.pad_token_id)
    attended = np.broadcast_to(np.arange(19) < 11, (2, 19))
    return config, ids, attended, run(random_model(config), ids, attended)


@pytest.mark.parametrize("name", MODULES)
def test_padding_changes_nothing(name):
    config, ids, attended, long = padded(name)
    short = run(random_model(config), ids[:, :11], attended[:, :11])
    np.testing.assert_allclose(long[:, :11], short, atol=2e-6)


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16(name):
    """Finite, float32 outside, and near the float32 result."""
    config, ids, attended, high = padded(name)
    low = run(random_model(config, jnp.bfloat16), ids, attended)
    assert low.dtype == jnp.float32 and np.isfinite(low).all()
    assert 0 < np.abs(low - high).max() < 0.1


@pytest.mark.parametrize("name", ["mpnet", "modernbert"])
def test_sharded_and_differentiable(name, eight_devices):
    """Both with a bias of positions, which every device and every sequence shares."""
    config = shallow(name)
    ids, attended = (np.tile(a, (2, 1))[:8] for a in batch(config, 12))
    graphdef, state = nnx.split(random_model(config))
    mesh, rows = Mesh(np.array(eight_devices), ("data",)), PartitionSpec("data")

    def hidden(state, ids, attended):
        return nnx.merge(graphdef, state)(ids, attended)

    sharded = jax.jit(
        jax.shard_map(hidden, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)
    )
    here = jax.jit(hidden)(state, ids, attended)
    np.testing.assert_allclose(sharded(state, ids, attended), here, atol=2e-6)

    weights = jnp.asarray(np.random.default_rng(1).normal(size=here.shape), jnp.float32)
    gradient = jax.jit(jax.grad(lambda s: (hidden(s, ids, attended) * weights).sum()))(state)
    for path, variable in nnx.to_flat_state(gradient):
        value = np.asarray(variable[...])
        # A bias of keys moves all scores of a query alike, so its gradient is only rounding.
        if path[-2:] != ("key", "bias"):
            assert np.isfinite(value).all() and value.any(), path


def test_initial_parameters():
    config = dataclasses.replace(shallow("modernbert biases"), initializer_range=0.1)
    state = jax.jit(lambda: nnx.state(make_backbone(config, rngs=nnx.Rngs(0))))()
    for path, variable in nnx.to_flat_state(state):
        expected = {"scale": (1.0, 0.0), "bias": (0.0, 0.0)}.get(path[-1], (0.0, 0.1))
        assert variable.dtype == jnp.float32
        np.testing.assert_allclose((variable[...].mean(), variable[...].std()), expected, atol=0.02)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "modernbert"])
def test_too_long(name):
    config = config_from_huggingface(CASES[name])
    graphdef, state = nnx.split(abstract(config))

    def hidden(length):
        arguments = [jax.ShapeDtypeStruct((1, length), d) for d in (jnp.int32, jnp.bool)]
        return jax.eval_shape(lambda s, *a: nnx.merge(graphdef, s)(*a), state, *arguments)

    assert hidden(config.max_length).shape == (1, config.max_length, config.hidden_size)
    with pytest.raises(ValueError, match=f"the model has {config.max_length} positions"):
        hidden(config.max_length + 1)


def test_relative_buckets():
    pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    import torch
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    i = torch.arange(600)
    expected = MPNetEncoder.relative_position_bucket(i[None, :] - i[:, None])
    np.testing.assert_array_equal(relative_buckets(600, 32), expected.numpy())


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
def test_rotary_tables(theta):
    """Against torch's float32 arithmetic, up to the last position of ModernBERT."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    frequencies = 1.0 / theta ** (torch.arange(0, 64, 2, dtype=torch.float) / 64)
    angles = torch.arange(8192)[:, None].float() * frequencies
    cosine, sine = rotary_tables(8192, 64, theta)
    np.testing.assert_allclose(cosine, angles.cos().numpy(), atol=1e-6)
    np.testing.assert_allclose(sine, angles.sin().numpy(), atol=1e-6)


def full_masks(torch, attended):
    mask = torch.zeros(len(attended), 1, *[attended.shape[1]] * 2)
    mask = mask.masked_fill(~torch.from_numpy(attended)[:, None, None], torch.finfo().min)
    return {"full_attention": mask, "conv": torch.from_numpy(attended).long()}


@pytest.mark.parametrize("case", [PPLX, LFM25], ids=["pplx", "lfm2.5"])
def test_parity_in_both_directions(case, monkeypatch):
    """pplx-embed's Qwen3 and LFM2.5, whose code is in their repositories: the oracle is
    transformers' causal model with full masks and centred convolutions."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    causal = {**(QWEN3 if "qwen3" in case["model_type"] else LFM2)}
    theirs, expected_causal = torch_model(causal)
    config = config_from_huggingface(case)
    assert not config.causal
    model = load(config, {k: v.numpy() for k, v in theirs.state_dict().items()})
    ids, attended = batch(config, 40)
    before = expected_causal(ids, attended)

    def centred(x, weight, bias=None, activation=None, **_):
        half = weight.shape[-1] // 2
        return torch.conv1d(x, weight[:, None], bias, padding=half, groups=len(weight))

    from transformers.models.lfm2 import modeling_lfm2

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", centred)
    with torch.inference_mode():
        masks, inputs = full_masks(torch, attended), torch.from_numpy(ids).long()
        after = theirs(input_ids=inputs, attention_mask=masks).last_hidden_state.numpy()
    assert np.abs(before - after).max() > 0.1  # the oracle is another model now
    np.testing.assert_allclose(run(model, ids, attended), after, atol=1e-5)
    assert config_from_huggingface(to_huggingface(config)) == config


def test_full_sizes():
    """Parameters by name, without weights: 353M and 596M with the word embeddings."""
    counts = {}
    for name, fields in PUBLISHED.items():
        config = config_from_huggingface(fields)
        assert config_from_huggingface(to_huggingface(config)) == config
        shapes = param_shapes(EncoderConfig.projecting(config, 128))
        counts[name] = sum(int(np.prod(shape)) for shape in shapes.values())
    assert round(counts["pplx-embed-v1-late-0.6b"] / 1e6) == 596
    assert round(counts["LFM2-ColBERT-350M"] / 1e6) == 353
    lfm2 = config_from_huggingface(PUBLISHED["LFM2-ColBERT-350M"])
    assert lfm2.inner == 4608 and lfm2.causal
    assert dataclasses.replace(lfm2, bidirectional=True).causal is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (PPLX | {"use_bidirectional_attention": False}, "does not go with model_type"),
        (QWEN3 | {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        (QWEN3 | {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        (QWEN3 | {"head_dim": 7}, "head_dim must be even"),
        (QWEN3 | {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: .*yarn"),
        (LFM2 | {"layer_types": ["conv"]}, "layer_types has 1 entries for 3 layers"),
        (LFM2 | {"layer_types": ["conv", "mamba", "conv"]}, "layer_types mamba"),
        (LFM25 | {"conv_L_cache": 4}, "conv_L_cache must be odd"),
        (NEW | {"rope_scaling": {"type": "linear"}}, "rope_scaling .* supported: ntk, by a factor"),
        (NEW | {"rope_scaling": {"type": "ntk", "mixed_b": 0.5}}, "rope_scaling .* is not supp"),
        (NEW | {"rope_scaling": {"type": "ntk", "factor": "8"}}, "factor must be a number"),
        (NEW | {"rope_scaling": {"type": "ntk", "factor": 0.5}}, "factor must be at least 1"),
        (NEW | {"position_embedding_type": "absolute"}, "position_embedding_type 'absolute' is"),
        (NOMIC_OWN | {"activation_function": "gelu"}, "activation_function 'gelu' is not one of"),
        (NOMIC_OWN | {"qkv_proj_bias": True}, "qkv_proj_bias True is not supported"),
        (NOMIC_OWN | {"moe_every_n_layers": 2}, "moe_every_n_layers 2 is not supported"),
        (NOMIC_OWN | {"rotary_scaling_factor": 2, "n_positions": "9"}, "are no integers"),
        (NOMIC_OWN | {"n_embd": "9"}, "hidden_size must be int|missing fields"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(fields)


@pytest.mark.parametrize(
    ("name", "tensor", "usual"),
    [
        ("gte", "new.encoder.layer.1.attention.qkv_proj.bias", "self_attn.{}_proj.bias"),
        ("gte", "encoder.layer.1.mlp.up_gate_proj.weight", "mlp.{}_proj.weight"),
        ("gte", "new.encoder.layer.0.attn_ln.weight", "post_attention_layernorm.weight"),
        ("nomic", "encoder.layers.1.attn.Wqkv.weight", "self_attn.{}_proj.weight"),
        ("nomic", "encoder.layers.1.mlp.fc11.weight", "mlp.up_proj.weight"),
        ("nomic", "encoder.layers.1.norm2.bias", "post_mlp_layernorm.bias"),
        ("nomic", "emb_ln.weight", "embeddings.LayerNorm.weight"),
    ],
)
def test_names_of_their_own_repositories(name, tensor, usual):
    """As transformers' conversion of the published files has them."""
    config = config_from_huggingface(CASES[name])
    found = transformers_names(config, tensor)
    prefix = architecture(config).prefix if tensor.startswith("new.") else ""
    assert set(found) <= set(tensor_names(config, prefix).values())
    parts = ["q", "k", "v"] if len(found) == 3 else ["up", "gate"]
    assert all(n.endswith(usual.format(p)) for n, p in zip(found, parts, strict=False))
    assert len(found) == (1 if "{}" not in usual else len(parts))


def test_gte_under_its_own_name():
    fields = CASES["gte"] | {"model_type": "new", "rope_theta": 160_000.0, "pad_token_id": 1}
    assert config_from_huggingface(fields) == config_from_huggingface(CASES["gte"])
    absent = ("max_position_embeddings", "rope_theta", "pad_token_id")  # its own defaults
    plain = {k: v for k, v in fields.items() if k not in absent}
    config = config_from_huggingface(plain)
    assert (config.rope_theta, config.max_length, config.pad_token_id) == (10_000, 2048, 0)


def test_scaled_frequencies_of_gte():
    """`rope_scaling` of its own repositories: the oracle has frequencies by the published formula,
    (theta k)^(-2i/d) k^(-2/d) for a factor k."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    case = CASES["gte"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    theirs, expected = torch_model(case)
    fields = CASES["gte"] | {"model_type": "new", "rope_theta": 500.0}
    fields |= {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": None}}
    config = config_from_huggingface(fields)
    assert config_from_huggingface(to_huggingface(config)) == config
    width = config.head_dim
    exponents = torch.arange(0, width, 2) / width
    theirs.rotary_emb.inv_freq.copy_((500.0 * 8) ** -exponents / 8 ** (2 / width))
    model = load(config, {k: v.numpy() for k, v in theirs.state_dict().items()})
    ids, attended = batch(config, 40)
    np.testing.assert_allclose(run(model, ids, attended), expected(ids, attended), atol=1e-5)


def test_nomic_under_its_own_names():
    expected = config_from_huggingface(CASES["nomic"])
    assert config_from_huggingface(NOMIC_OWN) == dataclasses.replace(
        expected, pad_token_id=0, type_vocab_size=2
    )
    scaled = config_from_huggingface(NOMIC_OWN | {"rotary_scaling_factor": 2, "n_inner": None})
    assert scaled.max_length == 20  # beyond, frequencies depend on the length
    assert scaled.intermediate_size == 4 * scaled.hidden_size


@pytest.mark.parametrize("name", ["jina", "lfm2"])
def test_gradients_are_torchs(name):
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    theirs, _ = torch_model(CASES[name])
    config = config_from_huggingface(CASES[name])
    model = load(config, {k: v.numpy() for k, v in theirs.state_dict().items()})
    ids, attended = (a[:3] for a in batch(config, 12))
    weights = np.random.default_rng(1).normal(size=(3, 12, config.hidden_size)).astype("f4")
    inputs = torch.from_numpy(ids).long(), torch.from_numpy(attended).long()
    hidden = theirs(inputs[0], attention_mask=inputs[1]).last_hidden_state
    (hidden * torch.from_numpy(weights)).sum().backward()
    graphdef, state = nnx.split(model)

    def total(state):
        return (nnx.merge(graphdef, state)(ids, attended) * weights).sum()

    ours = dict(nnx.to_flat_state(jax.jit(jax.grad(total))(state)))
    known = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for path, tensor in tensor_names(config).items():
        expected, got = known[tensor].numpy(), np.asarray(ours[path][...])
        got = got.T if path[-1] == "kernel" else got
        if path[-2:] == ("word", "embedding"):  # torch gives padding none
            expected, got = (np.delete(g, config.pad_token_id, axis=0) for g in (expected, got))
        # A bias of keys has none; what is left is rounding.
        np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))
