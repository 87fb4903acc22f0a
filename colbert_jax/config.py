"""Every setting of the library, as frozen dataclasses: one class per concern.

Architectures of encoders are in `models.config` and `models.colbert`.

Field names are Stanford ColBERT's where it has the setting, so that an `artifact.metadata` reads
straight into them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NBITS = (1, 2, 4, 8)
BUCKETS = ("optimal", "quantile")
MODES = ("fast", "accurate", "exact")
LOSSES = ("distillation", "cross-entropy", "contrastive", "margin-mse")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_types(settings: Any) -> None:
    """Raise ValueError for a field of a settings dataclass that is not of its annotated type."""
    for f in dataclasses.fields(settings):
        value, wanted = getattr(settings, f.name), str(f.type)
        if value is None and "None" in wanted:
            continue
        base = wanted.split(" | ")[0]
        kinds: Any = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(base)
        if kinds is None:
            continue
        if not isinstance(value, kinds) or (base != "bool" and isinstance(value, bool)):
            raise ValueError(f"{f.name} must be {wanted}, got {value!r}")


@dataclass(frozen=True)
class TextConfig:
    """How queries and documents become token ids, and which tokens become embeddings.

    The defaults are Stanford ColBERT's.

    query_maxlen, doc_maxlen: longest input in tokens; longer texts are cut.
    query_token_id, doc_token_id: the marker put at position 1; None: no marker.
    query_expansion: fill queries up to `query_minlen` tokens (None: `query_maxlen`) with
      `expansion_token` (None: [MASK], else the end-of-sequence token), whose vectors count.
    attend_to_mask_tokens: whether the other tokens attend to that filling.
    mask_punctuation: drop ASCII punctuation from a document's output.
    skiplist_words: drop exactly these tokens instead; () drops none.
    skiplist_in_queries: drop them from queries too.
    keep_only_token_ids: of documents, keep nothing but these tokens.
    query_prompt, doc_prompt: text put before every text; strip, lowercase: done to the whole.
    mask_instruction_token: a query's tokens up to and including this one give no embedding (FLMR).
    """

    query_maxlen: int = 32
    doc_maxlen: int = 220
    query_token_id: str | None = "[unused0]"
    doc_token_id: str | None = "[unused1]"
    query_expansion: bool = True
    attend_to_mask_tokens: bool = False
    mask_punctuation: bool = True
    query_minlen: int | None = None
    expansion_token: str | None = None
    skiplist_words: tuple[str, ...] | None = None
    skiplist_in_queries: bool = False
    keep_only_token_ids: tuple[int, ...] | None = None
    query_prompt: str = ""
    doc_prompt: str = ""
    strip: bool = False
    lowercase: bool = False
    mask_instruction_token: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("skiplist_words", str), ("keep_only_token_ids", int)):
            value = getattr(self, name)
            if value is None:
                continue
            items = isinstance(value, (list, tuple)) and all(isinstance(v, kind) for v in value)
            require(items, f"{name} must be a list of {kind.__name__}, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists
        require_types(self)
        for name, marker in (
            ("query_maxlen", self.query_token_id),
            ("doc_maxlen", self.doc_token_id),
        ):
            least = 3 if marker is None else 4  # [CLS] (marker) one token [SEP]
            value = getattr(self, name)
            require(value >= least, f"{name} must be at least {least}, got {value}")
        floor = self.query_minlen
        require(
            floor is None or 1 <= floor <= self.query_maxlen,
            f"query_minlen must be between 1 and query_maxlen {self.query_maxlen}, got {floor}",
        )

    @property
    def fixed_query_length(self) -> int | None:
        """Tokens of every query, where expansion makes all alike; else None."""
        alike = self.query_expansion and self.query_minlen in (None, self.query_maxlen)
        return self.query_maxlen if alike else None

    @classmethod
    def untrained(cls, **changes: Any) -> TextConfig:
        """Defaults for an encoder that was not trained for late interaction.

        Markers, [MASK] expansion and dropped punctuation are things a model learns to use; without
        that training each of them is noise, so none is on.
        """
        settings: dict[str, Any] = dict(
            query_maxlen=128,
            doc_maxlen=512,
            query_token_id=None,
            doc_token_id=None,
            query_expansion=False,
            mask_punctuation=False,
        )
        return cls(**(settings | changes))


@dataclass(frozen=True)
class IndexConfig:
    """How an index is compressed.

    num_centroids: None: Stanford's rule (see `compression.kmeans.num_centroids_for`).
    buckets: how residual values are rounded, "optimal" or Stanford's "quantile"
      (`compression.codec.train_codec`). Readers of either index see no difference.
    """

    nbits: int = 2
    kmeans_niters: int = 4
    num_centroids: int | None = None
    max_points_per_centroid: int = 256
    seed: int = 123
    buckets: str = "optimal"

    def __post_init__(self) -> None:
        require_types(self)
        require(self.nbits in NBITS, f"nbits must be one of {NBITS}, got {self.nbits}")
        require(self.buckets in BUCKETS, f"buckets must be one of {BUCKETS}, got {self.buckets!r}")
        require(self.kmeans_niters >= 1, f"kmeans_niters must be >= 1, got {self.kmeans_niters}")
        require(
            self.num_centroids is None or self.num_centroids >= 1,
            f"num_centroids must be >= 1, got {self.num_centroids}",
        )
        require(
            self.max_points_per_centroid >= 1,
            f"max_points_per_centroid must be >= 1, got {self.max_points_per_centroid}",
        )


@dataclass(frozen=True)
class SearchConfig:
    """PLAID's three settings. None means the default for the k of the call (`resolve`)."""

    ncells: int | None = None
    centroid_score_threshold: float | None = None
    ndocs: int | None = None

    def __post_init__(self) -> None:
        require_types(self)
        require(self.ncells is None or self.ncells >= 1, f"ncells must be >= 1: {self.ncells}")
        require(self.ndocs is None or self.ndocs >= 1, f"ndocs must be >= 1: {self.ndocs}")
        threshold = self.centroid_score_threshold
        require(
            threshold is None or not math.isnan(threshold),
            "centroid_score_threshold must not be NaN",
        )

    def resolve(self, k: int, mode: str = "accurate") -> SearchConfig:
        """The settings for one call: what is None takes the default for this k, each time anew.

        "fast" are Stanford's defaults. "accurate" looks at more centroids and documents, so that
        nine or ten of the ten best documents by exact scoring are found (`benchmarks/search.py`).
        """
        require(mode in MODES[:2], f"mode must be one of {MODES}, got {mode!r}")
        table = _FAST if mode == "fast" else _ACCURATE
        ncells, threshold, ndocs = next(row[1:] for row in table if k <= row[0])
        given = self.centroid_score_threshold
        return SearchConfig(
            ncells=self.ncells or ncells,
            centroid_score_threshold=threshold if given is None else given,
            ndocs=self.ndocs or max(ndocs, 4 * k if k > 100 else 0),
        )


# The largest k, and for it ncells, centroid_score_threshold, ndocs.
_FAST = ((10, 1, 0.5, 256), (100, 2, 0.45, 1024), (math.inf, 4, 0.4, 4096))
_ACCURATE = ((10, 4, 0.4, 1024), (100, 4, 0.4, 4096), (math.inf, 8, 0.3, 8192))


@dataclass(frozen=True)
class ColBERTConfig:
    """All settings of a loaded model.

    `index` and `search` are what the checkpoint itself asks for: defaults of an index built with
    it. `metadata` keeps every other field of the checkpoint's own file (training settings,
    provenance) for the code that trains and exports.
    """

    similarity: str = "cosine"
    text: TextConfig = TextConfig()
    index: IndexConfig = IndexConfig()
    search: SearchConfig = SearchConfig()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        require_types(self)
        require(
            self.similarity in ("cosine", "l2"),
            f"similarity must be 'cosine' or 'l2', got {self.similarity!r}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. The defaults are those that ColBERTv2 was trained with
    (Santhanam et al., 2022, appendix F); names are Stanford ColBERT's where it has the setting.

    What is learned from:
      loss: "distillation" (KL divergence from a teacher's scores), "cross-entropy" (the first of
        `nway` documents against the others; ColBERTv1's pairwise loss with two), "contrastive" (the
        first against all documents of the batch) or "margin-mse" (`training.losses`).
      nway: documents a query; None: as many as the examples have.
      use_ib_negatives: add Stanford's cross-entropy against the other queries' documents.
      distillation_alpha, student_temperature, teacher_temperature, normalize_teacher,
        normalize_student: of "distillation"; the last two scale scores to 0..1 per query first.
      temperature: of "contrastive" and of the coupled teacher's scores, the model's and its own.
      coupled_weight: this share of the loss is the KL divergence from the scores that another,
        fixed late-interaction model gives all pairs of the batch (Lin et al., 2021: a tightly
        coupled teacher), or several together; the loss above is the rest.
      coupled_tokens: so much is added to that divergence of how differently the model and the
        teacher match each query token (`losses.token_matches`).
    Optimisation:
      bsize: queries a step, over all devices; accumsteps: micro-batches these are cut into, which
        also bound the in-batch negatives.
      lr, head_lr: peak learning rates of the model and of its projection (None: lr).
      warmup, maxsteps: the rates rise linearly for `warmup` steps and fall to 0 at `maxsteps`;
        warmup None: they stay constant.
      warmup_bert: steps at the start that train the projection only.
      freeze_layers: so many of the first layers and the embeddings stay as they are; 0: all is
        trained, the embeddings too.
      weight_decay, max_grad_norm: of AdamW; the gradient's norm is cut to the second.
      dropout: in the backbone.
      shuffle, seed: order of the examples, dropout.
    Memory and speed (they change results by rounding only):
      dtype: of the dense layers' computation; None: bfloat16 on accelerators, float32 on a CPU.
        Parameters are float32 always.
      remat: compute layers again in the backward pass instead of keeping their insides.
      chunk: each device encodes so many texts at a time, and again in the backward pass
        (GradCache), for batches whose activations do not fit; None: all at once.
      fsdp: spread parameters and the optimiser's moments over the devices.
      length_groups: documents of a batch are padded in so many groups of about equal length.
    What is kept:
      save_every: steps between two checkpoints, of which the last `keep` stay.
      eval_every: steps between two evaluations on the dev collection; None: as `save_every`.
      log_every: steps between two lines of metrics.
    """

    loss: str = "distillation"
    nway: int | None = 64
    use_ib_negatives: bool = True
    distillation_alpha: float = 1.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    normalize_teacher: bool = False
    normalize_student: bool = False
    temperature: float = 1.0
    coupled_weight: float = 0.0
    coupled_tokens: float = 0.0
    bsize: int = 32
    accumsteps: int = 1
    lr: float = 1e-5
    head_lr: float | None = None
    warmup: int | None = 20_000
    maxsteps: int = 400_000
    warmup_bert: int = 0
    freeze_layers: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 2.0
    dropout: float = 0.1
    shuffle: bool = True
    seed: int = 12345
    dtype: str | None = None
    remat: bool = False
    chunk: int | None = None
    fsdp: bool = False
    length_groups: int = 4
    save_every: int = 2_000
    keep: int = 2
    eval_every: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        require_types(self)
        require(self.loss in LOSSES, f"loss must be one of {LOSSES}, got {self.loss!r}")
        at_least_one = ("nway", "bsize", "accumsteps", "maxsteps", "chunk", "length_groups")
        for name in (*at_least_one, "save_every", "keep", "eval_every", "log_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be >= 1, got {value}")
        positive = ("lr", "head_lr", "max_grad_norm", "distillation_alpha", "temperature")
        for name in (*positive, "student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            require(
                value is None or (value > 0 and math.isfinite(value)),
                f"{name} must be positive, got {value}",
            )
        for name in ("warmup", "warmup_bert", "freeze_layers", "weight_decay"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must be >= 0, got {value}")
        require(
            0 <= self.coupled_weight <= 1,
            f"coupled_weight must be in [0, 1], got {self.coupled_weight}",
        )
        require(
            self.coupled_tokens >= 0 and math.isfinite(self.coupled_tokens),
            f"coupled_tokens must be >= 0 and finite, got {self.coupled_tokens}",
        )
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        require(
            self.dtype in (None, "float32", "bfloat16"),
            f"dtype must be None, 'float32' or 'bfloat16', got {self.dtype!r}",
        )
        require(
            self.bsize % self.accumsteps == 0,
            f"bsize {self.bsize} is not a multiple of accumsteps {self.accumsteps}",
        )
        require(
            self.warmup is None or self.warmup <= self.maxsteps,
            f"warmup {self.warmup} is longer than maxsteps {self.maxsteps}",
        )
        compared = self.loss in ("distillation", "cross-entropy", "margin-mse")
        require(
            not compared or self.nway is None or self.nway >= 2,
            f"loss {self.loss!r} compares documents of a query: nway must be >= 2, got {self.nway}",
        )
        require(
            self.loss != "contrastive" or not self.use_ib_negatives,
            "the contrastive loss has all documents of the batch as negatives already: "
            "use_ib_negatives must be False",
        )
