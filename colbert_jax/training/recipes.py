"""The recipes of the papers: which data, which loss, which settings, in which order.

Each recipe is a dataclass of settings, with the papers' values as defaults, and a function that
runs it. `train/` holds a script for each, `colbert-jax train` runs the same.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colbert_jax.checkpoints import detect_layout, hub
from colbert_jax.colbert import ColBERT
from colbert_jax.config import TextConfig, TrainingConfig
from colbert_jax.data.collections import read_qrels
from colbert_jax.data.examples import (
    ExampleSource,
    concatenate,
    dataset_examples,
    pair_examples,
    stanford_examples,
)
from colbert_jax.data.m2kr import read_m2kr
from colbert_jax.data.streams import unpacked_suffix
from colbert_jax.data.texts import Texts
from colbert_jax.evaluation.dev import DevCollection, hold_out
from colbert_jax.files import present, read_object, replacing
from colbert_jax.flmr.modeling import FLMRModelForRetrieval
from colbert_jax.mining.stages import mine
from colbert_jax.mining.teacher import load_teacher
from colbert_jax.progress import LOGGER
from colbert_jax.settings import to_json
from colbert_jax.training.callbacks import Callback, WandB
from colbert_jax.training.flmr import FLMR_TRAINING, train_flmr
from colbert_jax.training.run import earlier_settings
from colbert_jax.training.trainer import Trained, train

Dev = DevCollection | Mapping[str, DevCollection]
SETTINGS = "settings.json"
_FILES = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet")
TEACHER = "cross-encoder/ms-marco-MiniLM-L6-v2"
# ColBERTv1's, and those of ColBERTv2's first and last distillation.
PAIRWISE = TrainingConfig(
    loss="cross-entropy",
    nway=2,
    use_ib_negatives=False,
    lr=3e-6,
    warmup=None,
    maxsteps=200_000,
)
# Once through the pairs, with the loss of PyLate's example of contrastive training (its
# documentation, "Contrastive Training").
CONTRASTIVE = TrainingConfig(
    loss="contrastive",
    nway=None,
    use_ib_negatives=False,
    temperature=1.0,
    bsize=32,
    lr=2e-5,
    warmup=0,
    maxsteps=None,
    eval_first=True,
)
FIRST = TrainingConfig(nway=32, use_ib_negatives=True, warmup=20_000, maxsteps=150_000)
LAST = TrainingConfig(nway=64, use_ib_negatives=True, warmup=20_000, maxsteps=400_000)


@dataclass(frozen=True)
class TextChanges:
    """Text settings to change (`TextConfig`); what is left out stays the checkpoint's own.

    A plain encoder, which has no such settings, gets Stanford's: markers, [MASK] expansion of
    queries, documents of 180 tokens without punctuation.

    query_maxlen, doc_maxlen: longest input in tokens, of queries or of documents.
    markers: false: no [Q] and [D] before the texts.
    query_expansion: whether to fill short queries with [MASK].
    attend_to_mask_tokens: whether the other tokens attend to this filling.
    mask_punctuation: whether to drop the token embeddings of a document's punctuation.
    """

    query_maxlen: int | None = None
    doc_maxlen: int | None = None
    markers: bool | None = None
    query_expansion: bool | None = None
    attend_to_mask_tokens: bool | None = None
    mask_punctuation: bool | None = None

    def over(self, base: TextConfig | None) -> dict[str, Any]:
        """Arguments of `ColBERT.from_pretrained`; `base`: settings of a plain encoder."""
        changes = {n: v for n, v in dataclasses.asdict(self).items() if v is not None}
        settings = {} if base is None else dataclasses.asdict(base)
        if not changes.pop("markers", True):
            changes |= {"query_token_id": None, "doc_token_id": None}
        return settings | changes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of every recipe.

    checkpoint: folder or hub id of what training starts from.
    folder: where the run is kept; the trained model is in it.
    dim: width of a plain encoder's new projection. If None, 128.
    language: which adapters of an X-MOD model to train, such as "de_DE". If None, its default's.
    coupled_teacher: folder or hub id of a late-interaction model, or of a plain encoder, whose
      scores of all pairs of a batch are learned with `coupled_weight`.
    dev: small published collections to evaluate on while training, and to choose the best model
      by: what `colbert-jax evaluate` takes, folders of BEIR and others.
    dev_collection, dev_queries, dev_qrels: such a collection in three files; all of them or none.
    ignore_self: leave the passage whose id is the query's out of the evaluation on these three: of
      queries that are passages themselves.
    wandb: project of Weights & Biases that is told the metrics, by the package wandb.
    """

    checkpoint: str | None
    folder: str
    dim: int | None = None
    language: str | None = None
    text: TextChanges = TextChanges()
    coupled_teacher: str | None = None
    dev: tuple[str, ...] = ()
    dev_collection: str | None = None
    dev_queries: str | None = None
    dev_qrels: str | None = None
    ignore_self: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        dev = (self.dev_collection, self.dev_queries, self.dev_qrels)
        if any(dev) and not all(dev):
            raise ValueError(
                "dev_collection, dev_queries and dev_qrels belong together: give all three or none"
            )
        if self.ignore_self and not any(dev):
            raise ValueError("ignore_self is of the evaluation: give dev_collection with it")
        stages = [x for x in vars(self).values() if isinstance(x, TrainingConfig)]
        if (self.coupled_teacher is not None) != any(x.coupled_weight for x in stages):
            raise ValueError(
                "coupled_teacher and coupled_weight belong together: give both or none"
            )


@dataclass(frozen=True, kw_only=True)
class ColBERTv1(Recipe):
    """ColBERT (Khattab and Zaharia, 2020): cross-entropy over pairs of passages.

    triples: with `queries` and `collection`: JSONL or TSV of ids (qid, pid+, pid-). Without these
      two: texts, a TSV (query, positive, negative) or JSONL with the fields `query`, `positive` and
      `negatives`.
    queries, collection: texts of these ids: TSV or JSONL.
    """

    checkpoint: str = "bert-base-uncased"
    triples: str
    queries: str | None = None
    collection: str | None = None
    training: TrainingConfig = PAIRWISE


@dataclass(frozen=True, kw_only=True)
class Contrastive(Recipe):
    """Contrastive training on pairs of a query and its document: a softmax over the scores of all
    documents of the batch (InfoNCE: van den Oord et al., 2018). It starts from a plain encoder or
    a late-interaction checkpoint.

    checkpoint: folder or hub id of what training starts from. If None, the packaged
      all-MiniLM-L6-v2 where it is installed, else bert-base-uncased.
    pairs: JSONL, CSV, TSV or parquet, .gz or .zst or neither; or a Hugging Face data set: hub id or
      folder. A TSV without a header is query, positive, negatives.
    query: field, or column, of the queries. If None, the first that is there of query, question,
      anchor, sentence1.
    positive: that of the documents. If None, the first that is there of positive, answer, document,
      passage, response, sentence2, text.
    negatives: fields, or columns, of further texts or lists of them, to tell the positive from
      beside the other queries' documents.
    subset: of a data set on the hub: the name of its configuration.
    split: of a data set.
    held_out: queries of the pairs that are kept for evaluation, with 1,000 documents of the pairs.
      If None, a tenth of them and at most 200, where ir-measures is installed and no `dev`
      collection is given; 0: none.
    """

    checkpoint: str | None = None
    pairs: str
    query: str | None = None
    positive: str | None = None
    negatives: tuple[str, ...] = ()
    subset: str | None = None
    split: str = "train"
    held_out: int | None = None
    training: TrainingConfig = CONTRASTIVE


@dataclass(frozen=True, kw_only=True)
class Distillation(Recipe):
    """The last step of ColBERTv2 (Santhanam et al., 2022, 3.2): n-way examples with a teacher's
    scores.

    examples: JSONL of `[qid, [pid, score], ...]`, the positive first.
    queries, collection: texts of these ids: TSV or JSONL.
    """

    checkpoint: str = "colbert-ir/colbertv1.9"
    examples: str
    queries: str
    collection: str
    training: TrainingConfig = LAST


@dataclass(frozen=True, kw_only=True)
class DenoisedSupervision(Recipe):
    """All of ColBERTv2's training (Santhanam et al., 2022, 3.2 and appendix F), from queries and
    a collection: a warm start on triples or pairs, then rounds of mining and distillation.

    A round indexes the collection with the model so far, retrieves `k` passages a query, has the
    teacher score them, draws examples from the first `depth`, and distils. All rounds but the last
    train with the settings `first`, the last one with `training`.

    queries, collection: what is mined.
    teacher: what `load_teacher` takes, folder or hub id.
    teacher_maxlen: tokens that it reads. If None, as many as it can.
    positives: judgements (`qid 0 pid gain`). If None, the teacher's best passage is the positive.
    examples: examples that have scores already, of the same queries and collection, to distil from
      beside the mined ones.
    warm_triples, warm_pairs: what the warm start learns from, ids or texts (see `ColBERTv1`). If
      both are None, the checkpoint is warm already.
    rounds: of mining and distillation.
    k: passages to retrieve for a query.
    depth: the first so many of these are drawn from. If None, all.
    nbits: of the index that is searched: 1, 2, 4 or 8.
    """

    checkpoint: str = "bert-base-uncased"
    queries: str
    collection: str
    teacher: str = TEACHER
    teacher_maxlen: int | None = 180
    positives: str | None = None
    examples: str | None = None
    warm_triples: str | None = None
    warm_pairs: str | None = None
    rounds: int = 2
    k: int = 500
    depth: int | None = None
    nbits: int = 2
    warm: TrainingConfig = PAIRWISE
    first: TrainingConfig = FIRST
    training: TrainingConfig = LAST

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.warm_triples is not None and self.warm_pairs is not None:
            raise ValueError("give warm_triples or warm_pairs, not both")


@dataclass(frozen=True, kw_only=True)
class PreFLMR:
    """PreFLMR (Lin et al., 2024) and FLMR on questions about images, in the tables of M2KR: a
    softmax over the scores of all passages of the batch, with negatives drawn from all passages.

    checkpoint: folder or hub id in FLMR's layout.
    folder: where the run is kept; the trained model is in it.
    data, passages: questions and passages: a parquet or JSONL file, a folder, or owner/name/config
      on the Hugging Face hub.
    images: folder that `img_path` begins in. If None, the working folder.
    split: of both tables.
    freeze_vision: whether the vision encoder stays as it is.
    wandb: project of Weights & Biases that is told the metrics, by the package wandb.
    """

    checkpoint: str = "LinWeizheDragon/PreFLMR_ViT-L"
    folder: str
    data: str
    passages: str
    images: str | None = None
    split: str = "train"
    freeze_vision: bool = True
    wandb: str | None = None
    training: TrainingConfig = FLMR_TRAINING


def load_model(recipe: Recipe, checkpoint: str | Path | None = None) -> ColBERT:
    """Load the recipe's starting model, or `checkpoint`, which an earlier stage made."""
    if checkpoint is not None:
        return ColBERT.from_pretrained(checkpoint, images=None, **recipe.text.over(None))
    assert recipe.checkpoint is not None
    path, _ = hub.resolve_checkpoint(recipe.checkpoint)
    plain = detect_layout(path) in ("huggingface", "single-vector")
    text = recipe.text.over(TextConfig(doc_maxlen=180) if plain else None)
    dim = recipe.dim or 128 if plain else recipe.dim
    return ColBERT.from_pretrained(
        recipe.checkpoint, dim=dim, images=None, language=recipe.language, **text
    )


def colbertv1(recipe: ColBERTv1, *, overwrite: bool = False) -> Trained:
    """Train on triples."""
    dev = _dev(recipe)
    if recipe.queries is not None and recipe.collection is not None:
        files = (recipe.triples, recipe.queries, recipe.collection)
        examples = _triples(*files, recipe.training)
    else:
        examples = _pairs(recipe.triples, recipe.training)
    return _one_run(recipe, examples, dev, overwrite)


def contrastive(recipe: Contrastive, *, overwrite: bool = False) -> Trained:
    """Train on pairs, with the other documents of the batch as negatives."""
    if recipe.checkpoint is None:
        start = None if overwrite else _earlier_start(Path(recipe.folder))
        recipe = dataclasses.replace(recipe, checkpoint=start or _start())
    dev = _dev(recipe)
    fields: Any = {
        "query": recipe.query,
        "positive": recipe.positive,
        "negatives": recipe.negatives or None,
        "nway": recipe.training.nway,
    }
    place = Path(recipe.pairs)
    if unpacked_suffix(place) in _FILES and not place.is_dir():
        examples = pair_examples(place, **fields)
    else:
        if recipe.subset is not None:
            fields["name"] = recipe.subset
        examples = dataset_examples(recipe.pairs, split=recipe.split, **fields)
    if _holds_out(recipe):
        examples, dev = hold_out(examples, recipe.held_out)
    if isinstance(dev, DevCollection) and not _has_dev(recipe):
        LOGGER.info(
            "%s: %d pairs to train on; evaluated on %d queries that are kept, among %d documents",
            *(recipe.pairs, len(examples), len(dev.queries), len(dev.passages)),
        )
    return _one_run(recipe, examples, dev, overwrite)


def distill(recipe: Distillation, *, overwrite: bool = False) -> Trained:
    """Train on n-way examples with scores."""
    dev = _dev(recipe)
    config = recipe.training
    scored = config.loss in ("distillation", "margin-mse")
    examples = stanford_examples(
        recipe.examples, recipe.queries, recipe.collection, nway=config.nway, scores=scored
    )
    return _one_run(recipe, examples, dev, overwrite)


def denoised_supervision(recipe: DenoisedSupervision, *, overwrite: bool = False) -> Trained:
    """Warm start, then rounds of index, retrieve, score, distil. What is done already is kept."""
    dev = _dev(recipe)
    queries, passages = Texts.queries(recipe.queries), Texts.passages(recipe.collection)
    positives = None
    if recipe.positives is not None:
        judged = read_qrels(recipe.positives)
        positives = {
            qid: {pid for pid, gain in pids.items() if gain > 0} for qid, pids in judged.items()
        }
    warm = None
    if recipe.warm_triples is not None:
        warm = _triples(recipe.warm_triples, queries, passages, recipe.warm)
    elif recipe.warm_pairs is not None:
        warm = _pairs(recipe.warm_pairs, recipe.warm)
    # Before the warm start, which may take days, so that a wrong name fails at once.
    teacher = load_teacher(recipe.teacher, maxlen=recipe.teacher_maxlen)
    folder = _folder(recipe)
    model = load_model(recipe)
    coupled_teacher = _coupled_teacher(recipe, model)

    def stage(
        model: ColBERT, source: ExampleSource, folder: Path, config: TrainingConfig
    ) -> Trained:
        coupled = coupled_teacher if config.coupled_weight else None
        return train(
            model,
            source,
            folder,
            config,
            teacher=coupled,
            dev=dev,
            callbacks=_callbacks(recipe),
            overwrite=overwrite,
        )

    trained = None
    if warm is not None:
        trained = stage(model, warm, folder / "warm", recipe.warm)
        model = load_model(recipe, trained.model)
    for number in range(1, recipe.rounds + 1):
        place = folder / f"round{number}"
        config = recipe.training if number == recipe.rounds else recipe.first
        mined = mine(
            model,
            passages,
            queries,
            place,
            teacher,
            nway=config.nway or 64,
            k=recipe.k,
            depth=recipe.depth,
            nbits=recipe.nbits,
            positives=positives,
            seed=config.seed,
            overwrite=overwrite,
        )
        sources = [
            stanford_examples(file, queries, passages, nway=config.nway)
            for file in (mined.path, recipe.examples)
            if file is not None
        ]
        source = concatenate(sources)
        trained = stage(model, source, place / "run", config)
        model = load_model(recipe, trained.model)
    assert trained is not None
    return trained


def preflmr(recipe: PreFLMR, *, overwrite: bool = False) -> Trained:
    """Train on questions about images."""
    data = read_m2kr(recipe.data, recipe.passages, split=recipe.split, images=recipe.images)
    return train_flmr(
        FLMRModelForRetrieval.from_pretrained(recipe.checkpoint),
        data,
        _folder(recipe),
        recipe.training,
        callbacks=_callbacks(recipe),
        freeze_vision=recipe.freeze_vision,
        overwrite=overwrite,
    )


RECIPES: Mapping[str, tuple[type[Recipe] | type[PreFLMR], Any]] = {
    "colbertv1": (ColBERTv1, colbertv1),
    "contrastive": (Contrastive, contrastive),
    "distill": (Distillation, distill),
    "denoised-supervision": (DenoisedSupervision, denoised_supervision),
    "preflmr": (PreFLMR, preflmr),
}


def _one_run(
    recipe: ColBERTv1 | Contrastive | Distillation,
    examples: ExampleSource,
    dev: Dev | None,
    overwrite: bool,
) -> Trained:
    model = load_model(recipe)
    return train(
        model,
        examples,
        _folder(recipe),
        recipe.training,
        teacher=_coupled_teacher(recipe, model),
        dev=dev,
        callbacks=_callbacks(recipe),
        overwrite=overwrite,
    )


def _coupled_teacher(recipe: Recipe, model: ColBERT) -> ColBERT | None:
    """The recipe's, to be given the model's token ids."""
    if recipe.coupled_teacher is None:
        return None
    text = dataclasses.asdict(model.config.text)
    return ColBERT.from_pretrained(recipe.coupled_teacher, images=None, **text)


def _pairs(file: str, config: TrainingConfig) -> ExampleSource:
    """Texts: a query, a positive, and negatives where the settings ask for more documents."""
    negatives = "negatives" if (config.nway or 1) > 1 else None
    return pair_examples(file, negatives=negatives, nway=config.nway)


def _triples(
    file: str, queries: str | Texts, collection: str | Texts, config: TrainingConfig
) -> ExampleSource:
    return stanford_examples(file, queries, collection, nway=config.nway, scores=False)


def _dev(recipe: Recipe) -> Dev | None:
    found = {}
    if recipe.dev_collection is not None:
        assert recipe.dev_queries is not None and recipe.dev_qrels is not None
        files = (recipe.dev_collection, recipe.dev_queries, recipe.dev_qrels)
        found["dev"] = DevCollection.read(*files, ignore_self=recipe.ignore_self)
    for place in recipe.dev:
        name = Path(place).name
        if name in found:
            raise ValueError(f"two dev collections have the name {name!r}: rename a folder")
        found[name] = DevCollection.published(place)
    return next(iter(found.values())) if len(found) == 1 else found or None


def _earlier_start(folder: Path) -> str | None:
    """What the run in a folder started from; None where there is none."""
    if not earlier_settings(folder) or not present(folder / SETTINGS):
        return None
    return read_object(folder / SETTINGS).get("checkpoint")


def _start() -> str:
    """What contrastive training starts from by default."""
    place = hub.packaged_model()
    if place is None:
        name = "bert-base-uncased"
        try:
            hub.resolve_checkpoint(name)
        except FileNotFoundError as error:
            error.add_note(f"Or install all-MiniLM-L6-v2, to start from that: {hub.INSTALL_MODEL}")
            raise
        LOGGER.info("the checkpoint is %s, of the Hugging Face hub", name)
        return name
    LOGGER.info("the checkpoint is the packaged all-MiniLM-L6-v2, %s", place)
    return str(place)


def _has_dev(recipe: Recipe) -> bool:
    return bool(recipe.dev or recipe.dev_collection)


def _holds_out(recipe: Contrastive) -> bool:
    """Whether queries of the pairs are kept for evaluation."""
    if recipe.held_out and _has_dev(recipe):
        raise ValueError(
            f"held_out is {recipe.held_out}, and dev collections are given too: evaluate on these "
            "or on queries of the pairs"
        )
    if recipe.held_out is not None or _has_dev(recipe):
        return bool(recipe.held_out)
    if importlib.util.find_spec("ir_measures") is None:
        LOGGER.info('nothing is evaluated: that needs pip install "colbert-jax[eval]"')
        return False
    return True


def _callbacks(recipe: Recipe | PreFLMR) -> list[Callback]:
    return [] if recipe.wandb is None else [WandB(recipe.wandb)]


def _folder(recipe: Recipe | PreFLMR) -> Path:
    """The recipe's folder, with its settings in it."""
    folder = Path(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SETTINGS) as stream:
        stream.write(to_json(recipe))
    return folder
