"""FLMR folders: `LinWeizheDragon/ColBERT-v2`, FLMR and the PreFLMR family.

Queries and documents share a BERT or have one each, and so with images; tokenizers are in
`query_tokenizer/` and `context_tokenizer/`. The image encoder is read where it is asked for;
where nobody said, a warning says that it is there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from colbert_jax.checkpoints.common import (
    Checkpoint,
    ImageSide,
    backbone_paths,
    backbone_tensors,
    fill_params,
    fixed_expansion,
    fold_head,
    head_paths,
    masks_punctuation,
    read_backbone,
    read_params,
    read_pooler,
    refuse_text,
    refuse_unknown,
    save_tensors,
    tensors_of,
)
from colbert_jax.checkpoints.tokenizer import read_tokenizer, write_tokenizer
from colbert_jax.checkpoints.warn import expect_any
from colbert_jax.config import ColBERTConfig, TextConfig
from colbert_jax.files import check_types, present, present_folder, read_object, write_json
from colbert_jax.images import ImageConfig
from colbert_jax.models.backbones import config_from_huggingface, to_huggingface
from colbert_jax.models.bert import BertConfig
from colbert_jax.models.colbert import EncoderConfig
from colbert_jax.models.config import BackboneConfig
from colbert_jax.models.flmr import ImageEncoderConfig, image_names, image_shapes
from colbert_jax.models.vision import image_size_of, vision_config
from colbert_jax.runtime import warn
from colbert_jax.tensors.weights import SAFETENSORS, Tensors, find_tensors
from colbert_jax.text import ModelTokenizer

MODEL_TYPE = "flmr"
QUERY, CONTEXT = "query", "context"
QUERY_TOKENIZER, CONTEXT_TOKENIZER = "query_tokenizer", "context_tokenizer"

# config.json holds only the settings that differ from these.
TEXT_DEFAULTS: dict[str, Any] = dict(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    max_position_embeddings=512,
    type_vocab_size=2,
    initializer_range=0.02,
    layer_norm_eps=1e-12,
    pad_token_id=0,
    position_embedding_type="absolute",
    text_encoder_base_model="bert-base-uncased",
    query_maxlen=32,
)
VISION_DEFAULTS: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    initializer_range=0.02,
)
_PREFIX_LENGTH = _CROSS_LENGTH = 32
# Mapping networks that are known without their configuration: BERT-base, as TEXT_DEFAULTS are.
_MAPPING_BASES = ("bert-base-uncased", "google-bert/bert-base-uncased")
_MAPPING_FOLDER = "transformer_mapping"
_LENGTHS = {"query_maxlen": TEXT_DEFAULTS["query_maxlen"], "doc_maxlen": 512}
_TYPES = {
    "mask_instruction_token": str,
    "mask_punctuation": bool,
    "dim": int,
    "separate_query_and_context_text_encoder": bool,
    "query_mask_input_ids_skip_list": [int],
    "use_vision_encoder": bool,
    "separate_query_and_context_vision_encoder": bool,
    "mapping_network_prefix_length": int,
    "use_transformer_mapping_network": bool,
    "transformer_mapping_config_base": str,
    "transformer_mapping_num_hidden_layers": int,
    "transformer_mapping_cross_attention_length": int,
    "query_concat_output_from_vision_encoder": bool,
    "query_concat_output_from_text_encoder": bool,
}
_TOKENIZER_TYPES = {"query_maxlen": int, "doc_maxlen": int, "attend_to_mask_tokens": bool}
BASES = ("bert-base-uncased",)
_VISION = ("vision_encoder.", "vision_projection.", ".transformer_mapping_")
_TEXT_FIELDS = (
    "query_maxlen",
    "doc_maxlen",
    "query_token_id",
    "doc_token_id",
    "attend_to_mask_tokens",
    "mask_punctuation",
    "mask_instruction_token",
    "skiplist_words",
    "strip",
    "query_minlen",
)


def detect(folder: Path) -> bool:
    """Whether the two tokenizer folders are there, or config.json has FLMR's model type."""
    file = folder / "config.json"
    if not present(file):
        return False
    if all([present_folder(folder / name) for name in (QUERY_TOKENIZER, CONTEXT_TOKENIZER)]):
        return True
    return read_object(file).get("model_type") == MODEL_TYPE


def read(
    folder: Path, *, dim: int | None = None, images: bool | None = None, **_: Any
) -> Checkpoint:
    """Read a folder; arguments and errors as for `checkpoints.read_checkpoint`."""
    file = folder / "config.json"
    fields = read_object(file)
    check_types(file, fields, _TYPES)
    backbone = text_backbone(fields, file)
    separate = bool(fields.get("separate_query_and_context_text_encoder", False))
    if fields.get("query_mask_input_ids_skip_list"):
        raise ValueError(f"{file}: query_mask_input_ids_skip_list is not supported; leave it out")
    tensors = find_tensors(folder).renamed(_canonical)
    sides = {side: f"{side}_text_encoder_linear.weight" for side in (CONTEXT, QUERY)}
    found = [side for side, name in sides.items() if name in tensors]
    if not found:
        raise ValueError(f"{tensors.file}: tensor {sides[QUERY]!r} is missing")
    if separate and len(found) < 2:
        raise ValueError(
            f"{tensors.file}: {file.name} asks for two text encoders, the weights hold only the "
            f"{found[0]} side"
        )
    encoder = EncoderConfig.projecting(backbone, tensors.shape(sides[found[0]])[0])
    for asked, where in ((fields.get("dim"), f"{file.name} has dim"), (dim, "dim was given as")):
        if asked is not None and asked != encoder.dim:
            raise ValueError(f"{folder}: {where} {asked}, but the weights project to {encoder.dim}")
    image_config = _find_images(tensors, fields, file, encoder, wanted=images)
    names = {side: _side_names(encoder, side) for side in found}
    known = {name for side in names.values() for name in side.values()}
    if image_config is not None:
        for side in (QUERY, CONTEXT):
            known |= set(image_names(image_config, side).values())
    refuse_unknown(tensors, backbone, known, _VISION if image_config is None else ())
    params = {
        side: fill_params(encoder, [(tensors, names[side])])
        for side in (found if separate else found[:1])
    }
    tokenizer = read_tokenizers(folder)
    return Checkpoint(
        folder,
        encoder,
        ColBERTConfig(text=read_text(folder, fields, tokenizer)),
        tokenizer,
        params[found[0]],
        query_params=params[QUERY] if separate else None,
        pooler=read_pooler(tensors, f"{found[0]}_text_encoder.bert_model."),
        weights=tensors.file,
        images=None if image_config is None else _read_images(tensors, fields, file, image_config),
    )


def _find_images(
    tensors: Tensors,
    fields: dict[str, Any],
    file: Path,
    encoder: EncoderConfig,
    *,
    wanted: bool | None,
) -> ImageEncoderConfig | None:
    """The architecture of the image encoder; None, after a warning, if there is one unread. Without
    a warning where `wanted` is False.

    Checkpoints from before `use_vision_encoder` always have one; so their tensors decide.
    """
    asked = fields.get("use_vision_encoder")
    stored = [name for name in tensors.names() if any(part in f".{name}" for part in _VISION)]
    if not stored:
        if asked:
            raise ValueError(
                f"{tensors.file}: {file.name} has use_vision_encoder true, but the weights hold no "
                "vision encoder; set it to false for a model of texts"
            )
        return None
    if wanted and asked is not False:
        return read_image_config(fields, file, encoder)
    if wanted is False:
        return None
    why = "colbert_jax.flmr.FLMRModelForRetrieval and ColBERT.from_pretrained read it whole"
    if asked is False:
        why = "use_vision_encoder is false"
    warn(
        f"{file}: a model of texts and images: only its text part is read, without {len(stored)} "
        f"tensors of the vision encoder; {why}"
    )
    return None


def _read_images(
    tensors: Tensors, fields: dict[str, Any], file: Path, config: ImageEncoderConfig
) -> ImageSide:
    """Read the image encoder of queries, and of documents where they have one of their own."""
    first = {side: f"{side}_vision_projection.model.0.weight" for side in (QUERY, CONTEXT)}
    sides = [side for side, name in first.items() if name in tensors]
    separate = bool(fields.get("separate_query_and_context_vision_encoder", False))
    if not sides or (separate and len(sides) < 2):
        missing = next(name for side, name in first.items() if side not in sides)
        raise ValueError(f"{tensors.file}: tensor {missing!r} is missing")
    _check_positions(tensors, config, sides[0])
    params: list[dict] = []
    for side in sides if separate else sides[:1]:
        # The mapping network is stored once and serves queries, whichever side's tower they share.
        one = config if not params else dataclasses.replace(config, mapping=None)
        params.append(read_params(image_shapes(one), [(tensors, image_names(one, side))]))
    size = config.vision.image_size
    pixels = ImageConfig.read(file.parent, size)
    return ImageSide(
        config,
        params[0],
        params[1] if separate else None,
        pixels=None if pixels == ImageConfig.square(size) else pixels,
        in_queries=_or(fields.get("query_concat_output_from_vision_encoder"), True),
        text_in_queries=_or(fields.get("query_concat_output_from_text_encoder"), True),
    )


def _check_positions(tensors: Tensors, config: ImageEncoderConfig, side: str) -> None:
    """Raise ValueError if there are other positions than images of that size have patches."""
    names, vision = image_names(config, side), config.vision
    kernel = ("vision", "patches", "kernel")
    tensors.check_shape(names[kernel], image_shapes(config)[kernel][::-1])
    name = names["vision", "position", "embedding"]
    positions = tensors.shape(name)[0]
    if positions != vision.patches + 1:
        fits = image_size_of(positions, vision.patch_size)
        advice = f"; image_size {fits} would fit" if fits else ""
        raise ValueError(
            f"{tensors.file}: tensor {name!r} has {positions} positions, but vision_config has "
            f"image_size {vision.image_size} and patch_size {vision.patch_size}, which are "
            f"{vision.patches} patches and a class token{advice}"
        )


def read_image_config(
    fields: dict[str, Any], file: Path, encoder: EncoderConfig
) -> ImageEncoderConfig:
    """Return the image encoder's architecture: `vision_config` over the original's defaults.

    Args:
      fields: of config.json.
      file: config.json, for errors and beside which a mapping network's configuration may lie.
      encoder: of texts.

    Raises ValueError, naming file and field.
    """
    vision = fields.get("vision_config") or {}
    if not isinstance(vision, dict):
        raise ValueError(f"{file}: vision_config must be an object")
    vision = VISION_DEFAULTS | {key: value for key, value in vision.items() if value is not None}
    try:
        seen = vision_config(vision)
    except ValueError as error:
        raise ValueError(f"{file}: vision_config: {error}") from None
    mapping = None
    if fields.get("use_transformer_mapping_network"):
        mapping = _mapping(fields, file, encoder.backbone.hidden_size)
    try:
        return ImageEncoderConfig(
            vision=seen,
            dim=encoder.dim,
            prefix_length=_or(fields.get("mapping_network_prefix_length"), _PREFIX_LENGTH),
            mapping=mapping,
            cross_length=_or(
                fields.get("transformer_mapping_cross_attention_length"), _CROSS_LENGTH
            ),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _mapping(fields: dict[str, Any], file: Path, width: int) -> BertConfig:
    """The mapping network's layers, from the name of the model whose layers they are like."""
    base = fields.get("transformer_mapping_config_base")
    layers = fields.get("transformer_mapping_num_hidden_layers")
    if base is None or layers is None:
        missing = "config_base" if base is None else "num_hidden_layers"
        raise ValueError(
            f"{file}: use_transformer_mapping_network needs transformer_mapping_{missing}"
        )
    if base in _MAPPING_BASES:
        backbone = config_from_huggingface(TEXT_DEFAULTS | {"model_type": "bert"})
    else:
        places = [file.parent / base / "config.json", Path(base) / "config.json"]
        found = next((place for place in places if present(place)), None)
        if found is None:
            raise ValueError(
                f"{file}: transformer_mapping_config_base {base!r} is neither "
                f"{_MAPPING_BASES[0]} nor a folder with a config.json"
            )
        backbone = read_backbone(found)
    if not isinstance(backbone, BertConfig) or backbone.hidden_size != width:
        raise ValueError(
            f"{file}: transformer_mapping_config_base {base!r} must be a BERT as wide as the text "
            f"encoder, {width}; it is {backbone.model_type}, {backbone.hidden_size} wide"
        )
    try:
        return backbone.with_layers(layers)
    except ValueError as error:
        raise ValueError(
            f"{file}: transformer_mapping_num_hidden_layers {layers}: {error}"
        ) from None


def text_backbone(fields: dict[str, Any], file: Path) -> BackboneConfig:
    """Return the text encoder's architecture: `text_config` over the original's defaults."""
    text = fields.get("text_config") or {}
    if not isinstance(text, dict):
        raise ValueError(f"{file}: text_config must be an object")
    text = TEXT_DEFAULTS | {key: value for key, value in text.items() if value is not None}
    base = text["text_encoder_base_model"]
    if base not in BASES:
        raise ValueError(
            f"{file}: text_encoder_base_model {base!r} is not supported; supported: "
            f"{', '.join(BASES)}"
        )
    try:
        return config_from_huggingface(text | {"model_type": "bert"})
    except ValueError as error:
        raise ValueError(f"{file}: text_config: {error}") from None


def read_text(folder: Path, fields: dict[str, Any], tokenizer: ModelTokenizer) -> TextConfig:
    """Read text settings: lengths from the tokenizers' configurations, others from config.json."""
    found = []
    for name, length in ((QUERY_TOKENIZER, "query_maxlen"), (CONTEXT_TOKENIZER, "doc_maxlen")):
        file = folder / name / "tokenizer_config.json"
        settings = read_object(file) if present(file) else {}
        check_types(file, settings, _TOKENIZER_TYPES)
        expect_any(file, settings, [length], f"{length} is {_LENGTHS[length]}, FLMR's default")
        found.append(settings)
    query, context = found
    try:
        return TextConfig(
            query_maxlen=query.get("query_maxlen", _LENGTHS["query_maxlen"]),
            doc_maxlen=context.get("doc_maxlen", _LENGTHS["doc_maxlen"]),
            attend_to_mask_tokens=query.get("attend_to_mask_tokens", False),
            mask_punctuation=fields.get("mask_punctuation", True),
            mask_instruction_token=instruction_token(fields, tokenizer),
        )
    except ValueError as error:
        raise ValueError(
            f"{folder}: config.json and tokenizer_config.json of the tokenizers: {error}"
        ) from None


def instruction_token(fields: Mapping[str, Any], tokenizer: ModelTokenizer) -> str | None:
    """Return the token that ends an instruction: the first of its encoding, as in the original."""
    text = fields.get("mask_instruction_token")
    tokens = tokenizer.tokenizer.encode(text, add_special_tokens=False).tokens if text else []
    return tokens[0] if tokens else None


def read_tokenizers(folder: Path) -> ModelTokenizer:
    """Read the tokenizer of both sides. Raises ValueError if they differ."""
    places = [folder / name for name in (QUERY_TOKENIZER, CONTEXT_TOKENIZER)]
    places = [place for place in places if present_folder(place)] or [folder]
    models = [read_tokenizer(place) for place in places]
    if len({model.tokenizer.to_str() for model in models}) > 1:
        raise ValueError(f"{folder}: {QUERY_TOKENIZER} and {CONTEXT_TOKENIZER} are different")
    return models[0]


def _canonical(name: str) -> str | None:
    """Rename the original's alias, and Stanford's names, to the names that the original writes."""
    if name.endswith("position_ids"):
        return None
    name = name.replace("_text_encoder.text_model.", "_text_encoder.bert_model.")
    for theirs, ours in (
        ("bert.", f"{CONTEXT}_text_encoder.bert_model."),
        ("linear.", f"{CONTEXT}_text_encoder_linear."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _side_names(encoder: EncoderConfig, side: str) -> dict[tuple, str]:
    names = backbone_paths(encoder.backbone, f"{side}_text_encoder.bert_model.")
    (path,) = head_paths(encoder, 0)
    return names | {path: f"{side}_text_encoder_linear.weight"}


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that FLMR's `from_pretrained` loads.

    Raises ValueError for a checkpoint that the layout cannot store: another backbone than BERT, no
    query expansion, other markers, prompts, a head with a bias or an activation.
    """
    backbone, text = checkpoint.encoder.backbone, checkpoint.config.text
    if not isinstance(backbone, BertConfig):
        raise ValueError(
            f"the flmr layout has BERT encoders, this checkpoint has {backbone.model_type}"
        )
    refuse_text(text, _TEXT_FIELDS, "flmr")
    fixed_expansion(text, "flmr")
    markers = (text.query_token_id, text.doc_token_id)
    ids = tuple(map(checkpoint.tokenizer.tokenizer.token_to_id, ("[unused0]", "[unused1]")))
    if markers != ("[unused0]", "[unused1]") or ids != (1, 2):
        raise ValueError(
            f"the flmr layout has the markers [unused0] and [unused1] with ids 1 and 2, this "
            f"checkpoint has {markers} and the ids {ids}"
        )
    separate = checkpoint.query_params is not None
    tensors: dict[str, np.ndarray] = {}
    sides = {QUERY: checkpoint.query_params or checkpoint.params}
    if separate:
        sides[CONTEXT] = checkpoint.params
    for side, params in sides.items():
        prefix = f"{side}_text_encoder.bert_model."
        tensors |= backbone_tensors(checkpoint, params, prefix, pooler=True)
        projection = fold_head(checkpoint.encoder, params, "flmr")
        tensors[f"{side}_text_encoder_linear.weight"] = projection
    images = checkpoint.images
    if images is not None:
        tensors |= tensors_of(images.params, image_names(images.config, QUERY))
        if images.context_params is not None:
            names = image_names(images.context_config, CONTEXT)
            tensors |= tensors_of(images.context_params, names)
        if images.pixels is not None:
            images.pixels.save(folder)
        mapping = images.config.mapping
        if mapping is not None and _mapping_base(mapping) == _MAPPING_FOLDER:
            (folder / _MAPPING_FOLDER).mkdir(exist_ok=True)
            write_json(folder / _MAPPING_FOLDER / "config.json", to_huggingface(mapping))
    save_tensors(folder / SAFETENSORS, tensors)
    write_json(folder / "config.json", config_fields(checkpoint, separate))
    for side, name, settings in (
        (
            "Query",
            QUERY_TOKENIZER,
            {
                "query_maxlen": text.query_maxlen,
                "attend_to_mask_tokens": text.attend_to_mask_tokens,
            },
        ),
        ("Context", CONTEXT_TOKENIZER, {"doc_maxlen": text.doc_maxlen}),
    ):
        write_flmr_tokenizer(
            folder / name,
            checkpoint.tokenizer,
            f"FLMR{side}EncoderTokenizer",
            backbone.max_length,
            settings,
        )


def kept(config: ColBERTConfig) -> ColBERTConfig:
    """Return the settings as they will be read: the layout has those of texts."""
    return ColBERTConfig(text=config.text)


def config_fields(checkpoint: Checkpoint, separate: bool) -> dict[str, Any]:
    """Return the fields of config.json; `text_config` holds what differs from the defaults.

    Args:
      separate: whether queries and documents have an encoder each.
    """
    backbone, text = checkpoint.encoder.backbone, checkpoint.config.text
    differing = {
        name: value
        for name, value in dataclasses.asdict(backbone).items()
        if TEXT_DEFAULTS.get(name, value) != value
    }
    differing |= {"model_type": "flmr_text_model", "torch_dtype": "float32"}
    if text.query_maxlen != TEXT_DEFAULTS["query_maxlen"]:
        differing["query_maxlen"] = text.query_maxlen
    return {
        "architectures": ["FLMRModelForRetrieval"],
        "model_type": MODEL_TYPE,
        "dim": checkpoint.encoder.dim,
        "mask_punctuation": masks_punctuation(checkpoint, "flmr"),
        "mask_instruction_token": text.mask_instruction_token,
        "separate_query_and_context_text_encoder": separate,
        "query_concat_output_from_text_encoder": (
            checkpoint.images is None or checkpoint.images.text_in_queries
        ),
        "context_concat_output_from_text_encoder": True,
        "context_concat_output_from_vision_encoder": False,
        "load_cpu_extension": False,
        "text_config": differing,
        "torch_dtype": "float32",
    } | image_fields(checkpoint.images)


def image_fields(images: ImageSide | None) -> dict[str, Any]:
    """Return the fields of config.json that say what the image encoder is."""
    vision: dict[str, Any] = {"model_type": "flmr_vision_model"}
    has_images = images is not None
    fields = {
        "use_vision_encoder": has_images,
        "query_concat_output_from_vision_encoder": images is not None and images.in_queries,
        "separate_query_and_context_vision_encoder": False,
        "use_transformer_mapping_network": False,
        "vision_config": vision,
    }
    if images is None:
        return fields
    config = images.config
    vision |= {
        name: value
        for name, value in dataclasses.asdict(config.vision).items()
        if VISION_DEFAULTS[name] != value
    }
    fields["separate_query_and_context_vision_encoder"] = images.context_params is not None
    fields["mapping_network_prefix_length"] = config.prefix_length
    if config.mapping is not None:
        fields |= {
            "use_transformer_mapping_network": True,
            "transformer_mapping_config_base": _mapping_base(config.mapping),
            "transformer_mapping_num_hidden_layers": config.mapping.num_hidden_layers,
            "transformer_mapping_cross_attention_length": config.cross_length,
        }
    return fields


def _mapping_base(mapping: BertConfig) -> str:
    """The name of the known model with such layers, or of the folder that describes them."""
    known = config_from_huggingface(TEXT_DEFAULTS | {"model_type": "bert"})
    same = known.with_layers(mapping.num_hidden_layers) == mapping
    return _MAPPING_BASES[0] if same else _MAPPING_FOLDER


def write_flmr_tokenizer(
    folder: Path, model: ModelTokenizer, tokenizer_class: str, max_length: int, settings: dict
) -> None:
    """Write the files of a slow BERT tokenizer: the original's classes read `vocab.txt`."""
    inputs = ("input_ids", "token_type_ids", "attention_mask")
    normalizer = _normalizer(model)
    has_vocabulary = write_tokenizer(
        folder,
        model,
        max_length=max_length,
        inputs=inputs,
        **settings,
        do_lower_case=normalizer.get("lowercase", True),
        strip_accents=normalizer.get("strip_accents"),
        tokenize_chinese_chars=normalizer.get("handle_chinese_chars", True),
        tokenizer_class=tokenizer_class,
    )
    if not has_vocabulary:
        raise ValueError("the flmr layout needs a WordPiece vocabulary")


def _normalizer(model: ModelTokenizer) -> dict[str, Any]:
    return json.loads(model.tokenizer.to_str()).get("normalizer") or {}
