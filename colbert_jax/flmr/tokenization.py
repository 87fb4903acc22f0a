"""FLMR's two tokenizers: texts to padded token ids, as NumPy arrays.

The same ids as Stanford ColBERT's, with upstream's arguments and padding. A single string is one
text, for documents too (upstream reads it letter by letter), and `doc_maxlen` is honoured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from colbert_jax.checkpoints import flmr, hub
from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import TextConfig
from colbert_jax.files import present, present_folder, read_object
from colbert_jax.flmr.configuration import FLMRTextConfig
from colbert_jax.text import ModelTokenizer, TextTokenizer, as_texts

_ARRAYS = (None, "np", "jax", "pt")
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class _Tokenizer:
    kind: ClassVar[str]
    subfolder: ClassVar[str]

    def __init__(self, model: ModelTokenizer, settings: dict[str, Any], max_positions: int = 512):
        self.model, self.settings, self.max_positions = model, settings, max_positions
        self._texts: dict[TextConfig, TextTokenizer] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        text_config: FLMRTextConfig | None = None,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        **settings: Any,
    ) -> Self:
        """Read a tokenizer from a folder or a hub id.

        Args:
          text_config: as upstream asks for since 2024; None: config.json beside `subfolder`, else
            the defaults.
          subfolder: "query_tokenizer" or "context_tokenizer"; "": the folder itself, or the
            tokenizer's own subfolder where that is there.
          **settings: `query_maxlen`, `attend_to_mask_tokens` or `doc_maxlen`, over the file's.
        """
        root = hub.resolve(name_or_path, revision=revision, token=token)
        folder = root / (subfolder or cls.subfolder)
        if not present_folder(folder):
            if subfolder:
                raise FileNotFoundError(f"{root}: there is no folder {subfolder}")
            folder = root
        if text_config is None:
            fields = read_object(root / "config.json") if present(root / "config.json") else {}
            text_config = FLMRTextConfig(**(fields.get("text_config") or {}))
        base = text_config.text_encoder_base_model
        if base not in flmr.BASES:
            raise ValueError(
                f"text_encoder_base_model {base!r} is not supported; supported: "
                f"{', '.join(flmr.BASES)}"
            )
        file = folder / "tokenizer_config.json"
        found = read_object(file) if present(file) else {}
        known = {name: found.get(name, default) for name, default in cls._defaults().items()}
        unknown = sorted(settings.keys() - known.keys())
        if unknown:
            raise TypeError(f"{cls.__name__} has no setting {', '.join(unknown)}")
        return cls(read_tokenizer(folder), known | settings, text_config.max_position_embeddings)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Plain token ids of a text, without a marker."""
        return self.model.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        ids = np.asarray(ids).tolist()
        return self.model.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.model.tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self.model.tokenizer.get_vocab_size()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that upstream's slow tokenizer reads."""
        flmr.write_flmr_tokenizer(
            Path(folder),
            self.model,
            f"FLMR{self.kind}EncoderTokenizer",
            self.max_positions,
            self.settings,
        )

    def _text(self, config: TextConfig) -> TextTokenizer:
        if config not in self._texts:
            self._texts[config] = TextTokenizer(self.model, config)
        return self._texts[config]

    def _check(self, padding: Any, truncation: Any, return_tensors: str | None) -> None:
        if padding not in ("max_length", "longest", True):
            raise ValueError(f"padding must be 'max_length' or 'longest', got {padding!r}")
        if not truncation:
            raise ValueError("truncation cannot be switched off: the encoder's length is limited")
        if return_tensors not in _ARRAYS:
            raise ValueError(f"return_tensors must be one of {_ARRAYS}, got {return_tensors!r}")


class FLMRQueryEncoderTokenizer(_Tokenizer):
    """Queries: `[CLS] [Q] tokens [SEP]` and [MASK]s up to `query_maxlen`."""

    kind = "Query"
    subfolder = flmr.QUERY_TOKENIZER

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {"query_maxlen": 32, "attend_to_mask_tokens": False}

    def __call__(
        self,
        text: str | Sequence[str],
        padding: str = "max_length",
        truncation: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = "np",
    ) -> dict[str, np.ndarray]:
        """
        Args:
          max_length: other than `query_maxlen`, for this call.
          return_tensors: arrays are NumPy's whatever is asked for.

        Returns:
          input_ids and attention_mask, int32[B, L]; the mask is 0 at [MASK]s unless they are
          attended to.
        """
        self._check(padding, truncation, return_tensors)
        length = max_length or self.settings["query_maxlen"]
        config = TextConfig(
            query_maxlen=length,
            attend_to_mask_tokens=self.settings["attend_to_mask_tokens"],
            query_expansion=padding == "max_length",
        )
        ids, attended = self._text(config).queries(as_texts(text, "query"))
        mask = self.model.special.get("mask_token", "[MASK]")
        fill = self.model.tokenizer.token_to_id(mask)
        arrays = _padded(ids, attended, max(map(len, ids), default=0), fill)
        if config.attend_to_mask_tokens:
            arrays["attention_mask"][:] = 1
        return arrays


class FLMRContextEncoderTokenizer(_Tokenizer):
    """Documents: `[CLS] [D] tokens [SEP]`, padded."""

    kind = "Context"
    subfolder = flmr.CONTEXT_TOKENIZER

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {"doc_maxlen": 512}

    def __call__(
        self,
        text: str | Sequence[str],
        padding: str = "max_length",
        truncation: bool | str = "longest_first",
        max_length: int | None = None,
        return_tensors: str | None = "np",
    ) -> dict[str, np.ndarray]:
        """
        Args:
          padding: "max_length" (to `doc_maxlen` or `max_length`) or "longest".
          max_length: at most `doc_maxlen`.

        Returns:
          input_ids, token_type_ids (zeros) and attention_mask, int32[B, L].
        """
        self._check(padding, truncation, return_tensors)
        limit = min(max_length or self.settings["doc_maxlen"], self.settings["doc_maxlen"])
        config = TextConfig(doc_maxlen=limit)
        ids, attended = self._text(config).documents(as_texts(text, "document"))
        width = limit if padding == "max_length" else max(map(len, ids), default=0)
        pad = self.model.tokenizer.token_to_id(self.model.special["pad_token"])
        arrays = _padded(ids, attended, width, pad)
        return {
            "input_ids": arrays["input_ids"],
            "token_type_ids": np.zeros_like(arrays["input_ids"]),
            "attention_mask": arrays["attention_mask"],
        }


def model_tokenizer(*tokenizers: _Tokenizer | None) -> ModelTokenizer | None:
    """The tokenizer behind the first that is given."""
    return next((t.model for t in tokenizers if t is not None), None)


def text_settings(*tokenizers: _Tokenizer | None) -> dict[str, Any]:
    """What tokenizers say of lengths, as fields of `TextConfig`."""
    given = [t.settings for t in tokenizers if t is not None]
    return {name: value for settings in given for name, value in settings.items()}


def _padded(
    ids: list[np.ndarray], attended: np.ndarray, width: int, fill: int | None
) -> dict[str, np.ndarray]:
    block = np.full((len(ids), width), fill, np.int32)
    for row, tokens in zip(block, ids, strict=True):
        row[: len(tokens)] = tokens
    mask = (np.arange(width) < attended[:, None]).astype(np.int32)
    return {"input_ids": block, "attention_mask": mask}
