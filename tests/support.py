"""Checkpoints of the published layouts, made on the spot with random weights."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

_SENTENCE = """the a of and to in is was for on with as by at from it an be this that what who which
how are some cat cats dog dogs skinny just run runs running river bank money water heat flow wing
air speed high low paper study result method model table search query passage document index
token paris france berlin germany capital city country mountain tall deep ocean fish bird red blue
green book write read city old new small large number time year
day night light dark sun moon star"""
WORDS = _SENTENCE.split()

TINY = dict(
    model_type="bert",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_act="gelu",
    max_position_embeddings=96,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    initializer_range=0.2,
    pad_token_id=0,
)

# Of a backbone alone.
SIZES = dict(
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=48,
)

METADATA = dict(
    query_token_id="[unused0]",
    doc_token_id="[unused1]",
    query_token="[Q]",
    doc_token="[D]",
    query_maxlen=16,
    doc_maxlen=48,
    dim=16,
    similarity="cosine",
    mask_punctuation=True,
    attend_to_mask_tokens=False,
    interaction="colbert",
    nbits=2,
    kmeans_niters=4,
    lr=1e-05,
    checkpoint="somewhere/else",
    meta={"version": "colbert-v0.4"},
)

LONG = "takes minutes: set COLBERT_JAX_LONG=1"


def vocabulary() -> list[str]:
    """A WordPiece vocabulary in which any lower-case text can be spelt."""
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list(string.ascii_lowercase + string.digits)
    pieces = [f"##{c}" for c in letters] + ["##ing", "##s", "##ed"]
    seen = dict.fromkeys(special + list(string.punctuation) + letters + pieces + WORDS)
    return list(seen)


def bert_tensors(config: dict, seed: int = 0, prefix: str = "") -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, pooler included."""
    rng = np.random.default_rng(seed)
    h, i = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], h),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], h),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], h),
        "embeddings.LayerNorm.weight": (h,),
        "embeddings.LayerNorm.bias": (h,),
        "pooler.dense.weight": (h, h),
        "pooler.dense.bias": (h,),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{n}."
        for name, size in {
            "attention.self.query": (h, h),
            "attention.self.key": (h, h),
            "attention.self.value": (h, h),
            "attention.output.dense": (h, h),
            "intermediate.dense": (i, h),
            "output.dense": (h, i),
        }.items():
            shapes[f"{layer}{name}.weight"] = size
            shapes[f"{layer}{name}.bias"] = size[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (h,)
    scale = config["initializer_range"]
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(0, scale, shape).astype(np.float32)
        tensors[prefix + name] = values + 1 if name.endswith("LayerNorm.weight") else values
    return tensors


def write_plain(folder: Path, config: dict | None = None, seed: int = 0, prefix: str = "") -> Path:
    """A plain BERT folder; without a `vocab_size` in `config` it gets the small vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    config = TINY | dict(vocab_size=len(words)) | (config or {})
    words += [f"[extra{n}]" for n in range(config["vocab_size"] - len(words))]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    save_file(bert_tensors(config, seed, prefix), folder / "model.safetensors")
    return folder


def write_stanford(
    folder: Path, config: dict | None = None, seed: int = 0, **metadata: object
) -> Path:
    """A Stanford ColBERT folder: `HF_ColBERT` weights and `artifact.metadata`."""
    write_plain(folder, config, seed)
    settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["HF_ColBERT"]}
    (folder / "config.json").write_text(json.dumps(settings))
    fields = METADATA | metadata
    shape = (fields["dim"], settings["hidden_size"])
    projection = np.random.default_rng(seed + 1).normal(0, 0.2, shape).astype(np.float32)
    tensors = bert_tensors(settings, seed, "bert.") | {"linear.weight": projection}
    save_file(tensors, folder / "model.safetensors")
    (folder / "artifact.metadata").write_text(json.dumps(fields))
    return folder


def write_flmr(
    folder: Path, config: dict | None = None, seed: int = 0, *, separate: bool = False, **fields
) -> Path:
    """An FLMR folder: sparse config.json, `query_*` (and `context_*`) names, two tokenizers."""
    write_plain(folder, config, seed)
    text = json.loads((folder / "config.json").read_text())
    del text["model_type"]
    settings = dict(
        architectures=["FLMRModelForRetrieval"],
        model_type="flmr",
        dim=16,
        mask_punctuation=True,
        mask_instruction_token=None,
        use_vision_encoder=False,
        query_concat_output_from_vision_encoder=False,
        separate_query_and_context_text_encoder=separate,
        text_config=text | {"model_type": "flmr_text_model"},
        vision_config={"model_type": "flmr_vision_model", "dropout": 0.0},
        vision_model_version=None,
    )
    (folder / "config.json").write_text(json.dumps(settings | fields))
    tensors = {}
    for n, side in enumerate(("query", "context") if separate else ("query",)):
        tensors |= bert_tensors(text, seed + n, f"{side}_text_encoder.bert_model.")
        shape = (settings["dim"], text["hidden_size"])
        projection = np.random.default_rng(seed + n + 1).normal(0, 0.2, shape)
        tensors[f"{side}_text_encoder_linear.weight"] = projection.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    for side, own in (
        ("query", {"query_maxlen": 16, "attend_to_mask_tokens": False}),
        ("context", {"doc_maxlen": 48}),
    ):
        place = folder / f"{side}_tokenizer"
        place.mkdir()
        shutil.copy(folder / "vocab.txt", place)
        kind = f"FLMR{side.title()}EncoderTokenizer"
        own |= {"tokenizer_class": kind, "do_lower_case": True}
        (place / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").unlink()
    return folder


VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_channels=3,
    image_size=32,
    patch_size=8,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
MAPPING = {"num_attention_heads": 2, "intermediate_size": 48}  # beside the text encoder's width


def image_tensors(
    vision: dict, width: int, dim: int, prefix_length: int, *, mapping: int = 1, side: str = "query"
) -> dict[str, np.ndarray]:
    """Random weights of the image side under FLMR's names.

    Args:
      vision: fields of the vision configuration.
      width: of the text encoder.
      mapping: layers of the mapping network; 0 for none.
    """
    rng = np.random.default_rng(11)
    h, i = vision["hidden_size"], vision["intermediate_size"]
    size = vision["patch_size"]
    clip = f"{side}_vision_encoder.vision_model.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{clip}embeddings.class_embedding": (h,),
        f"{clip}embeddings.patch_embedding.weight": (h, vision["num_channels"], size, size),
        f"{clip}embeddings.position_embedding.weight": (
            (vision["image_size"] // size) ** 2 + 1,
            h,
        ),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, features: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (features,)

    norm(f"{clip}pre_layrnorm", h)
    norm(f"{clip}post_layernorm", h)
    for n in range(vision["num_hidden_layers"]):
        layer = f"{clip}encoder.layers.{n}."
        for part in "qkv":
            linear(f"{layer}self_attn.{part}_proj", h, h)
        linear(f"{layer}self_attn.out_proj", h, h)
        norm(f"{layer}layer_norm1", h)
        norm(f"{layer}layer_norm2", h)
        linear(f"{layer}mlp.fc1", i, h)
        linear(f"{layer}mlp.fc2", h, i)
    linear(f"{side}_vision_projection.model.0", dim * prefix_length // 2, h)
    linear(f"{side}_vision_projection.model.2", dim * prefix_length, dim * prefix_length // 2)
    if mapping:
        linear("transformer_mapping_input_linear", width, h)
        linear("transformer_mapping_output_linear", dim, width)
    for n in range(mapping):
        layer = f"transformer_mapping_network.layer.{n}."
        for block in ("attention", "crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{layer}{block}.{part}", width, width)
            norm(f"{layer}{block}.output.LayerNorm", width)
        linear(f"{layer}intermediate.dense", MAPPING["intermediate_size"], width)
        linear(f"{layer}output.dense", width, MAPPING["intermediate_size"])
        norm(f"{layer}output.LayerNorm", width)
    return {
        name: (
            rng.normal(0, 0.2, shape) + ("norm" in name.lower() and name.endswith("weight"))
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_preflmr(
    folder: Path,
    *,
    mapping: int = 1,
    separate: bool = True,
    config: dict | None = None,
    vision: dict | None = None,
    **fields,
) -> Path:
    """A PreFLMR folder, or with `mapping=0` one of FLMR's kind: `write_flmr` and the image side."""
    vision = VISION | (vision or {})
    settings: dict = dict(
        use_vision_encoder=True,
        query_concat_output_from_vision_encoder=True,
        mapping_network_prefix_length=4,
        vision_config={"model_type": "flmr_vision_model"} | vision,
        use_transformer_mapping_network=bool(mapping),
    )
    if mapping:
        settings |= dict(
            mask_instruction_token=":",
            transformer_mapping_config_base="mapping",
            transformer_mapping_num_hidden_layers=mapping,
        )
    write_flmr(folder, config, separate=separate, **settings | fields)
    width = TINY["hidden_size"]
    if mapping:
        (folder / "mapping").mkdir()
        base = TINY | MAPPING | {"vocab_size": 99}
        (folder / "mapping" / "config.json").write_text(json.dumps(base))
    tensors = load_file(folder / "model.safetensors")
    tensors |= image_tensors(vision, width, 16, 4, mapping=mapping)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_cross_encoder(folder: Path, config: dict | None = None, seed: int = 0) -> Path:
    """A cross-encoder in the layout of ms-marco-MiniLM: BERT's sequence classifier, one class."""
    write_plain(folder, config, seed)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(seed + 1)
    tensors = bert_tensors(settings, seed, "bert.")
    tensors["classifier.weight"] = rng.normal(0, 0.2, (1, settings["hidden_size"]))
    tensors["classifier.bias"] = rng.normal(0, 0.2, 1)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def passages(n: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Random sentences over the small vocabulary."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, longest, n)
    return [" ".join(rng.choice(WORDS, size)) + "." for size in sizes]


def unit_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 rows of unit length."""
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
