"""All settings of the library, as frozen dataclasses: one class per concern.

Architectures of encoders are in `models.config` and `models.colbert`.

Settings that Stanford ColBERT has too go by its names, which are those of `artifact.metadata`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NBITS = (1, 2, 4, 8)
BUCKETS = ("optimal", "quantile")
MODES = ("fast", "accurate", "exact")
CANDIDATES = ("plaid", "learned")
INTERACTIONS = ("maxsim", "meanmaxsim", "flipr")
LOSSES = ("distillation", "cross-entropy", "contrastive", "margin-mse")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_types(settings: Any) -> None:
    """Raise ValueError for a field of a settings dataclass that is not of its annotated type."""
    for f in dataclasses.fields(settings):
        value, expected = getattr(settings, f.name), str(f.type)
        if value is None and "None" in expected:
            continue
        if isinstance(value, str) and repr(value) in expected:  # of a Literal
            continue
        base = expected.split(" | ")[0]
        kinds: Any = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(base)
        if kinds is None:
            continue
        if not isinstance(value, kinds) or (base != "bool" and isinstance(value, bool)):
            expected = re.sub(r"Literal\[(.*?)\]", r"\1", expected)
            raise ValueError(f"{f.name} must be {expected}, got {value!r}")


def check_pooling(factor: float, protected: int) -> None:
    """Raise ValueError unless these can be `pool_factor` and `pool_protected` of `TextConfig`."""
    require(1 <= factor < math.inf, f"pool_factor must be at least 1 and finite, got {factor}")
    require(protected >= 0, f"pool_protected must be >= 0, got {protected}")


@dataclass(frozen=True)
class TextConfig:
    """How queries and documents become token ids, and which tokens become embeddings.

    The defaults are Stanford ColBERT's.

    query_maxlen, doc_maxlen: longest input in tokens; longer texts are cut.
    query_token_id, doc_token_id: the marker at position 1. If None, no marker.
    query_expansion: whether to fill queries up to `query_minlen` tokens with `expansion_token`;
      the embeddings of the filling count in MaxSim.
    attend_to_mask_tokens: whether the other tokens attend to the filling.
    mask_punctuation: whether to drop the token embeddings of a document's ASCII punctuation.
    query_minlen: see `query_expansion`. If None, `query_maxlen`.
    expansion_token: see `query_expansion`. If None, [MASK], or the end-of-sequence token where the
      tokenizer has no [MASK].
    skiplist_words: tokens of documents to drop in place of punctuation; () drops none. If None,
      `mask_punctuation` decides.
    skiplist_in_queries: whether to drop them from queries too.
    keep_only_token_ids: keep only these tokens of documents. If None, all.
    query_prompt, doc_prompt: text to put before every query or document.
    strip: whether to remove white space around prompt and text.
    lowercase: whether to lowercase prompt and text.
    pool_factor: of a document's n token embeddings n // `pool_factor` are left, means of similar
      ones (`compression.pooling`). At 1, all.
    pool_protected: so many first ones of a document stay as they are.
    pool_normalize: whether pooled ones are divided by their length.
    mask_instruction_token: tokens of a query up to and including this one give no embedding (FLMR).
      If None, all do.
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
    pool_factor: float = 1.0
    pool_protected: int = 1
    pool_normalize: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("skiplist_words", str), ("keep_only_token_ids", int)):
            value = getattr(self, name)
            if value is None:
                continue
            items = isinstance(value, (list, tuple)) and all(isinstance(v, kind) for v in value)
            require(items, f"{name} must be a list of {kind.__name__}, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists
        require_types(self)
        check_pooling(self.pool_factor, self.pool_protected)
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
        """The length of all queries in tokens if expansion makes them equally long, else None."""
        fixed = self.query_expansion and self.query_minlen in (None, self.query_maxlen)
        return self.query_maxlen if fixed else None

    @classmethod
    def untrained(cls, **changes: Any) -> TextConfig:
        """Return settings for an encoder that was not trained for late interaction.

        Markers, [MASK] expansion and dropped punctuation are off: a model learns to use them in
        training, and without it they are noise.

        Args:
          **changes: fields with other values than these defaults.
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

    nbits: bits of a residual's dimension: 1, 2, 4 or 8.
    kmeans_niters: iterations of k-means.
    num_centroids: If None, by Stanford's rule (`compression.kmeans.num_centroids_for`).
    max_points_per_centroid: k-means trains on a random subset of this many points for each
      centroid, where there are more.
    seed: for the sample of documents that k-means trains on, and for its random choices.
    buckets: how residual values are rounded, "optimal" or Stanford's "quantile"
      (`compression.codec.train_codec`). The index's format is the same.
    learned_dim: keep a vector of so many 8-bit dimensions for each document, which predicts its
      scores, and search by it first (`compression.learned`). If None, none is kept.
    """

    nbits: int = 2
    kmeans_niters: int = 4
    num_centroids: int | None = None
    max_points_per_centroid: int = 256
    seed: int = 123
    buckets: str = "optimal"
    learned_dim: int | None = None

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
        # Up to this width a product of two vectors of 8 bits is exact in float32.
        require(
            self.learned_dim is None or 1 <= self.learned_dim <= 1024,
            f"learned_dim must be from 1 to 1024, got {self.learned_dim}",
        )


@dataclass(frozen=True)
class SearchConfig:
    """How candidates are found. What is None takes its default for the call's k (`resolve`).

    ncells: inverted lists to probe for each query token.
    centroid_score_threshold: document tokens whose centroid scores below this for every query token
      do not count in the first cut. At -1 all count, since no cosine is below.
    ndocs: documents after the first cut; a quarter of them are scored exactly. With learned
      candidates all of them.
    candidates: "plaid", by its stages, or "learned", by the learned vectors of an index that has
      them (`IndexConfig.learned_dim`); then `ncells` and `centroid_score_threshold` mean nothing.
      If None, as the index chooses.
    """

    ncells: int | None = None
    centroid_score_threshold: float | None = None
    ndocs: int | None = None
    candidates: str | None = None

    def __post_init__(self) -> None:
        require_types(self)
        require(self.ncells is None or self.ncells >= 1, f"ncells must be >= 1: {self.ncells}")
        require(self.ndocs is None or self.ndocs >= 1, f"ndocs must be >= 1: {self.ndocs}")
        threshold = self.centroid_score_threshold
        require(
            threshold is None or not math.isnan(threshold),
            "centroid_score_threshold must not be NaN",
        )
        require(
            self.candidates in (None, *CANDIDATES),
            f"candidates must be one of {CANDIDATES}, got {self.candidates!r}",
        )

    def resolve(self, k: int, mode: str = "accurate") -> SearchConfig:
        """Return the settings for a call: those that are None take the default for k and mode.

        Args:
          k: results to return.
          mode: "fast" for Stanford's defaults; "accurate" for more centroids and documents, so that
            nine or ten of the ten best documents by exact scoring are found
            (`benchmarks/search.py`).
        """
        require(mode in MODES[:2], f"mode must be one of {MODES}, got {mode!r}")
        learned = self.candidates == "learned"
        tables = (_FAST, _ACCURATE, _LEARNED_FAST, _LEARNED_ACCURATE)
        table = tables[2 * learned + (mode == "accurate")]
        ncells, threshold, ndocs = next(row[1:] for row in table if k <= row[0])
        given = self.centroid_score_threshold
        return SearchConfig(
            ncells=self.ncells or ncells,
            centroid_score_threshold=threshold if given is None else given,
            ndocs=self.ndocs or max(ndocs, (2 if learned else 4) * k if k > 100 else 0),
            candidates=self.candidates,
        )


# The largest k, and up to it ncells, centroid_score_threshold, ndocs.
_FAST = ((10, 1, 0.5, 256), (100, 2, 0.45, 1024), (math.inf, 4, 0.4, 4096))
_ACCURATE = ((10, 3, 0.35, 1280), (100, 6, 0.3, 5120), (math.inf, 8, 0.3, 8192))
# Of learned candidates only ndocs counts.
_LEARNED_FAST = ((10, 1, 0.0, 96), (100, 1, 0.0, 384), (math.inf, 1, 0.0, 2048))
_LEARNED_ACCURATE = ((10, 1, 0.0, 512), (100, 1, 0.0, 1536), (math.inf, 1, 0.0, 4096))


def written(settings: IndexConfig | SearchConfig) -> dict[str, Any]:
    """Settings as files have them: earlier versions read those that ask for nothing learned."""
    values = dataclasses.asdict(settings)
    later = ("learned_dim", "candidates")
    return {name: v for name, v in values.items() if name not in later or v is not None}


@dataclass(frozen=True)
class ColBERTConfig:
    """All settings of a loaded model.

    similarity: "cosine" or "l2", Stanford's setting. Both rank alike, since embeddings have unit
      length.
    interaction: "maxsim", the sum over query tokens; "meanmaxsim", their mean, which ranks alike;
      "flipr", the sum of the better half (Baleen, Khattab et al., 2021). `rank` scores so; indexes
      score by the sum.
    text: how texts become token ids.
    index, search: the checkpoint's settings, defaults for an index that is built with it.
    metadata: all other fields of the checkpoint's settings file (training settings, provenance),
      kept for training and export.
    """

    similarity: str = "cosine"
    text: TextConfig = TextConfig()
    index: IndexConfig = IndexConfig()
    search: SearchConfig = SearchConfig()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    interaction: str = "maxsim"

    def __post_init__(self) -> None:
        require_types(self)
        require(
            self.similarity in ("cosine", "l2"),
            f"similarity must be 'cosine' or 'l2', got {self.similarity!r}",
        )
        require(
            self.interaction in INTERACTIONS,
            f"interaction must be one of {INTERACTIONS}, got {self.interaction!r}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. The defaults are those of ColBERTv2's training (Santhanam et al.,
    2022, appendix F), and of another loss where only that one can have them; settings that Stanford
    ColBERT has too go by its names.

    Loss:
      loss: "distillation" (KL divergence from a teacher's scores), "cross-entropy" (the first of
        `nway` documents against the others; with two, ColBERTv1's pairwise loss), "contrastive"
        (the first document against all documents of the batch) or "margin-mse"; see
        `training.losses`.
      nway: documents for each query. If None, as many as the examples have.
      use_ib_negatives: whether to add Stanford's cross-entropy against other queries' documents. If
        None, with every loss but "contrastive", which has these negatives already.
      distillation_alpha: for "distillation", what the divergence is multiplied with.
      student_temperature: for "distillation", what the model's scores are divided by.
      teacher_temperature: for "distillation", what the teacher's scores are divided by.
      normalize_teacher: for "distillation", whether to scale the teacher's scores of each query to
        0..1 first.
      normalize_student: the same for the model's scores.
      temperature: what scores are divided by, for "contrastive" and for the coupled teacher.
      coupled_weight: share of the loss that is the KL divergence from the scores of a coupled
        teacher for all pairs of the batch (Lin et al., 2021, tightly coupled teachers): another
        late-interaction model that is not trained, or several together. `loss` is the rest.
      coupled_tokens: weight, in that divergence, of the difference between how model and teacher
        match each query token (`losses.token_matches`).
    Optimisation:
      bsize: queries in a step, over all devices. "auto": the largest power of two up to 256 whose
        step fits into memory with the longest texts, and of which the examples have eight; a run
        keeps it.
      accumsteps: micro-batches that a step is cut into; in-batch negatives come from the same
        micro-batch.
      lr: peak learning rate.
      head_lr: that of the head, the projection. If None, `lr`.
      warmup: learning rates rise linearly for so many steps, or for that share of `maxsteps` where
        it is less than 1, then fall linearly to 0 at `maxsteps`. The default is ColBERTv2's 20,000
        of 400,000 steps. If None, they stay constant.
      maxsteps: steps in all. If None, as many as `epochs` take.
      epochs: times that the run takes every example, where `maxsteps` does not say how many steps.
      warmup_bert: steps at the start in which only the head is trained.
      freeze_layers: number of first layers that are not trained, nor the embeddings then. If 0, all
        parameters are trained.
      weight_decay: that of AdamW; 0 is none.
      max_grad_norm: the gradient is scaled down to at most this norm.
      dropout: rate in the backbone.
      shuffle: whether to shuffle the examples.
      seed: for the order of the examples and for dropout.
    Memory and speed (these change results by rounding only):
      dtype: what the dense layers compute in. If None, bfloat16 on accelerators and float32 on a
        CPU. Parameters are always float32.
      remat: whether to compute layers again in the backward pass, to save memory.
      chunk: texts that each device encodes at a time, once more in the backward pass (GradCache),
        for batches whose activations do not fit into memory. If None, all at once.
      fsdp: whether to spread parameters and optimiser state over the devices.
      length_groups: groups of about equal length in which the documents of a batch are padded.
    Checkpoints and evaluation:
      save_every: steps between two checkpoints.
      save_minutes: a checkpoint is made, too, where the last one is so many minutes old. If None,
        it may be of any age.
      keep: checkpoints to keep, the last ones.
      eval_every: steps between two evaluations on the dev collections. If None, `save_every`.
      eval_first: whether to evaluate before the first step, too.
      best_measure: of the dev collections, any of ir-measures: the model with the highest is kept.
      log_every: steps between two lines of metrics.
    """

    loss: str = "distillation"
    nway: int | None = None
    use_ib_negatives: bool | None = None
    distillation_alpha: float = 1.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    normalize_teacher: bool = False
    normalize_student: bool = False
    temperature: float = 1.0
    coupled_weight: float = 0.0
    coupled_tokens: float = 0.0
    bsize: int | Literal["auto"] = 32
    accumsteps: int = 1
    lr: float = 1e-5
    head_lr: float | None = None
    warmup: float | None = 0.05
    maxsteps: int | None = 400_000
    epochs: float = 1.0
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
    save_minutes: float | None = 10.0
    keep: int = 2
    eval_every: int | None = None
    eval_first: bool = False
    best_measure: str = "nDCG@10"
    log_every: int = 10

    def __post_init__(self) -> None:
        require_types(self)
        require(self.loss in LOSSES, f"loss must be one of {LOSSES}, got {self.loss!r}")
        at_least_one = ("nway", "bsize", "accumsteps", "maxsteps", "chunk", "length_groups")
        for name in (*at_least_one, "save_every", "keep", "eval_every", "log_every"):
            value = getattr(self, name)
            require(value in (None, "auto") or value >= 1, f"{name} must be >= 1, got {value}")
        positive = (
            "epochs",
            "lr",
            "head_lr",
            "save_minutes",
            "max_grad_norm",
            "distillation_alpha",
            "temperature",
        )
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
            self.bsize == "auto" or self.bsize % self.accumsteps == 0,
            f"bsize {self.bsize} is not a multiple of accumsteps {self.accumsteps}",
        )
        if self.warmup is not None and self.warmup >= 1:
            require(
                self.warmup == int(self.warmup),
                "warmup must be a whole number of steps, or a share of maxsteps below 1, got "
                f"{self.warmup}",
            )
            object.__setattr__(self, "warmup", int(self.warmup))  # 2e4 in a file is 20000
            require(
                self.maxsteps is None or self.warmup <= self.maxsteps,
                f"warmup {self.warmup} is longer than maxsteps {self.maxsteps}: lower it too, or "
                "give a share of the steps, such as 0.05",
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

    @property
    def in_batch(self) -> bool:
        """`use_ib_negatives`, or what the loss makes of None."""
        return (
            self.loss != "contrastive" if self.use_ib_negatives is None else self.use_ib_negatives
        )

    @property
    def warmup_steps(self) -> int | None:
        """`warmup` in steps."""
        if not self.warmup or self.warmup >= 1:
            return None if self.warmup is None else round(self.warmup)
        return round(self.warmup * self.steps)

    @property
    def steps(self) -> int:
        """`maxsteps`, which must be known."""
        require(self.maxsteps is not None, "maxsteps is not known before the examples are")
        assert self.maxsteps is not None
        return self.maxsteps

    @property
    def batch_size(self) -> int:
        """`bsize`, which must be a number."""
        require(self.bsize != "auto", "bsize is 'auto': give a number")
        assert self.bsize != "auto"
        return self.bsize
