import dataclasses
import json

import pytest

from colbert_jax.models.activations import ACTIVATIONS
from colbert_jax.models.backbones import MODEL_TYPES, config_from_huggingface, to_huggingface
from colbert_jax.models.bert import BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig
from colbert_jax.models.modernbert import ModernBertConfig
from colbert_jax.models.mpnet import MPNetConfig

SIZES = dict(
    vocab_size=10,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
)
BERT = SIZES | dict(model_type="bert")
DISTILBERT = dict(
    model_type="distilbert", vocab_size=10, dim=8, n_layers=1, n_heads=2, hidden_dim=16
)
MODERNBERT = SIZES | dict(model_type="modernbert", pad_token_id=0, num_hidden_layers=7)
FULL, SLIDING = "full_attention", "sliding_attention"


def smallest(model_type):
    if model_type == "distilbert":
        return DISTILBERT
    return MODERNBERT if model_type == "modernbert" else SIZES | dict(model_type=model_type)


@pytest.mark.parametrize(
    ("model_type", "kind", "positions", "longest"),
    [
        ("bert", BertConfig, 512, 512),
        ("roberta", RobertaConfig, 514, 512),
        ("xlm-roberta", RobertaConfig, 514, 512),
        ("distilbert", DistilBertConfig, 512, 512),
        ("electra", ElectraConfig, 512, 512),
        ("mpnet", MPNetConfig, 514, 512),
        ("modernbert", ModernBertConfig, 8192, 8192),
    ],
)
def test_reads_every_architecture(model_type, kind, positions, longest):
    config = config_from_huggingface(smallest(model_type) | dict(max_position_embeddings=positions))
    assert type(config) is kind and config.model_type == model_type
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (8, 4, 16)
    assert config.max_length == longest
    assert hash(config) == hash(dataclasses.replace(config))


# Its configuration is in its repository, and differs from Qwen3's in the name.
ELSEWHERE = ("bidirectional_pplx_qwen3",)


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in ELSEWHERE])
def test_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    settings = {k: getattr(theirs, k) for k in smallest(model_type)} | {"model_type": model_type}
    settings.pop("pad_token_id", None)
    assert config_from_huggingface(settings) == config_from_huggingface(theirs.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5' is not supported; supported: 'bert', 'roberta'"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"num_attention_heads": 3}, "hidden_size 8 is not a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be >= 1"),
        ({"intermediate_size": 0}, "intermediate_size must be >= 1"),
        ({"type_vocab_size": 0}, "type_vocab_size must be >= 1"),
        ({"hidden_size": "8"}, "hidden_size must be int"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps must be float"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: gelu, "),
        ({"pad_token_id": 10}, "pad_token_id 10 is outside the vocabulary of 10"),
        ({"vocab_size": None, "hidden_size": None}, "missing fields: hidden_size, vocab_size"),
        ({"max_position_embeddings": 0}, "leaves no position"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(BERT | change)


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "hidden_dim", "vocab_size"])
def test_missing_fields_are_named_as_the_file_names_them(name):
    with pytest.raises(ValueError, match=f"missing fields: {name}$"):
        config_from_huggingface({k: v for k, v in DISTILBERT.items() if k != name})


def test_architectures_that_ignore_a_field():
    # transformers does not look at these there, and published files hold them.
    config_from_huggingface(MODERNBERT | {"position_embedding_type": "sans_pos"})
    config = config_from_huggingface(DISTILBERT | {"layer_norm_eps": 0.5})
    assert config.layer_norm_eps == 1e-12
    assert "layer_norm_eps" not in to_huggingface(config)


def test_mpnet_and_roberta():
    with pytest.raises(ValueError, match="relative_attention_num_buckets must be >= 32"):
        MPNetConfig(**SIZES, relative_attention_num_buckets=16)
    assert MPNetConfig(**SIZES, pad_token_id=4).max_length == 510
    assert RobertaConfig(**SIZES, pad_token_id=4).max_length == 507
    with pytest.raises(ValueError, match="model_type 'bert' is not one of roberta, xlm-roberta"):
        RobertaConfig(**SIZES, model_type="bert")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_against_torch(name):
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-9, 9, 1001)
    ours = ACTIVATIONS[name](x.numpy())
    assert abs(ours - activations.ACT2FN[name](x).numpy()).max() < 2e-6


class TestModernBert:
    def test_pattern(self):
        every_third = (FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL)
        assert config_from_huggingface(MODERNBERT).layer_types == every_third
        every = config_from_huggingface(MODERNBERT | {"global_attn_every_n_layers": 2})
        assert every.layer_types == (FULL, SLIDING) * 3 + (FULL,)
        # transformers 5's word goes first.
        given = {"global_attn_every_n_layers": 2, "layer_types": list(every_third)}
        assert config_from_huggingface(MODERNBERT | given).layer_types == every_third

    def test_thetas(self):
        def thetas(**change):
            config = config_from_huggingface(MODERNBERT | change)
            return config.rope_theta(FULL), config.rope_theta(SLIDING)

        five = {FULL: {"rope_type": "default", "rope_theta": 7.0}, SLIDING: None}
        assert thetas() == (160_000, 10_000)
        assert thetas(global_rope_theta=5.0, local_rope_theta=3.0) == (5, 3)
        assert thetas(global_rope_theta=5.0, local_rope_theta=None) == (5, 5)
        assert thetas(rope_parameters=five) == (7, 10_000)
        assert thetas(rope_parameters=five, global_rope_theta=5.0, local_rope_theta=3.0) == (7, 3)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"layer_types": [FULL]}, "layer_types has 1 entries for 7 layers"),
            ({"layer_types": ["chunked_attention"] * 7}, "chunked_attention: expected"),
            ({"layer_types": FULL}, "layer_types must be a list"),
            ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be an int >= 1"),
            ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters must hold"),
            ({"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 4.0}}}, "yarn"),
            ({"rope_scaling": {"type": "linear"}}, "rope_scaling .* is not supported"),
            ({"local_rope_theta": 0}, "local_rope_theta must be > 0"),
            ({"local_attention": 0}, "local_attention must be >= 1"),
            ({"norm_bias": 1}, "norm_bias must be bool"),
            ({"num_attention_heads": 8}, "head_dim must be even"),
            ({"hidden_activation": "mish"}, "'mish' is not supported"),
        ],
    )
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=message):
            config_from_huggingface(MODERNBERT | change)

    def test_export_speaks_both_dialects(self):
        change = {"global_attn_every_n_layers": 4, "global_rope_theta": 9, "norm_bias": True}
        config = config_from_huggingface(MODERNBERT | change)
        fields = json.loads(json.dumps(to_huggingface(config)))
        assert fields["global_attn_every_n_layers"] == 4
        assert fields["layer_types"] == [FULL, *[SLIDING] * 3] * 1 + [FULL, SLIDING, SLIDING]
        assert fields["global_rope_theta"] == fields["rope_parameters"][FULL]["rope_theta"] == 9
        assert (fields["norm_eps"], fields["hidden_activation"]) == (1e-5, "gelu")
        for dialect in (
            ("layer_types", "rope_parameters"),
            ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"),
        ):
            one = {k: v for k, v in fields.items() if k not in dialect}
            assert config_from_huggingface(one) == config

    def test_irregular_pattern_is_not_given_to_transformers_4(self):
        config = ModernBertConfig(
            **SIZES | dict(num_hidden_layers=2), pad_token_id=0, layer_types=(SLIDING, FULL)
        )
        fields = to_huggingface(config)
        assert "global_attn_every_n_layers" not in fields
        assert config_from_huggingface(fields) == config
