"""FLMR's configurations, with upstream's fields and defaults.

`config.json` stores only what differs from them, so they are part of the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from colbert_jax.checkpoints import hub
from colbert_jax.checkpoints.flmr import TEXT_DEFAULTS, VISION_DEFAULTS
from colbert_jax.files import read_object, write_json


class _Config:
    """Fields as attributes; unknown ones are kept, as transformers does."""

    model_type: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]

    def __init__(self, **fields: Any):
        fields.pop("model_type", None)
        for name, value in {**self.defaults, **fields}.items():
            setattr(self, name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return {"model_type": self.model_type} | {
            name: value.to_dict() if isinstance(value, _Config) else value
            for name, value in vars(self).items()
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        return {"model_type": self.model_type} | {
            name: value.to_diff_dict() if isinstance(value, _Config) else value
            for name, value in vars(self).items()
            if isinstance(value, _Config) or self.defaults.get(name, ...) != value
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.to_diff_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_diff_dict()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


class FLMRTextConfig(_Config):
    """The text encoder: BERT."""

    model_type = "flmr_text_model"
    defaults: ClassVar[Mapping[str, Any]] = TEXT_DEFAULTS | {
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "projection_dim": 0,
    }


class FLMRVisionConfig(_Config):
    """The vision encoder: CLIP's."""

    model_type = "flmr_vision_model"
    defaults: ClassVar[Mapping[str, Any]] = VISION_DEFAULTS | {
        "projection_dim": 512,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
    }


class FLMRConfig(_Config):
    """The whole model. `text_config` and `vision_config` may be dicts, objects or None."""

    model_type = "flmr"
    defaults: ClassVar[Mapping[str, Any]] = dict(
        vision_config=None,
        text_config=None,
        mask_punctuation=True,
        mapping_network_prefix_length=32,
        dim=128,
        use_vision_encoder=True,
        initializer_range=0.02,
        separate_query_and_context_text_encoder=False,
        separate_query_and_context_vision_encoder=False,
        query_concat_output_from_vision_encoder=True,
        query_concat_output_from_text_encoder=True,
        context_concat_output_from_vision_encoder=False,
        context_concat_output_from_text_encoder=True,
        use_transformer_mapping_network=False,
        transformer_mapping_config_base=None,
        transformer_mapping_num_hidden_layers=None,
        load_cpu_extension=False,
        mask_instruction_token=None,
        transformer_mapping_cross_attention_length=32,
        vision_model_version="openai/clip-vit-base-patch32",
        query_mask_input_ids_skip_list=(),
    )

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self.text_config: FLMRTextConfig = _nested(FLMRTextConfig, fields.get("text_config"))
        self.vision_config: FLMRVisionConfig = _nested(
            FLMRVisionConfig, fields.get("vision_config")
        )

    @classmethod
    def from_text_vision_configs(
        cls, text_config: FLMRTextConfig, vision_config: FLMRVisionConfig, **fields: Any
    ) -> FLMRConfig:
        return cls(text_config=text_config, vision_config=vision_config, **fields)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **fields: Any,
    ) -> FLMRConfig:
        """Read `config.json` of a folder or a hub id; `fields` overrule it."""
        folder = hub.resolve(name_or_path, revision=revision, token=token)
        return cls(**(read_object(folder / "config.json") | fields))


def _nested(cls: type[_Config], value: Any) -> Any:
    if isinstance(value, cls):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"expected {cls.__name__}, a dict or None, got {type(value).__name__}")
    return cls(**dict(value or {}))
