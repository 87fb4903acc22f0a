"""Make the folders of checkpoints/ with the libraries that checkpoints come from.

    python make_checkpoints.py LIBRARY [output folder, by default checkpoints/ beside this script]

LIBRARY is stanford (colbert-ai 0.2.22, transformers 4.57.6), pylate (PyLate 1.6.0,
sentence-transformers 5.3.0, transformers 5.3.0), sentence-transformers (6.2.0, transformers
5.23.0), transformers (5.23.0) or flmr (transformers 5.23.0: FLMR is not published as a package, so
its folders are laid out by hand around transformers' BertModel and its embeddings are computed here
as its source computes them). Run it once for each with an interpreter that has the library; all of
them with torch 2.13.0 on the CPU and Python 3.11.

Each folder is a tiny model with random weights, saved by the library, loaded back by the library,
and the library's answer to checkpoints/texts.json in expected.npz (see convert/originals.py).
"""

import importlib.util
import json
import os
import shutil
import string
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location(
    "originals", HERE.parent.parent / "convert" / "originals.py"
)
originals = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(originals)

_WORDS = """the a of and to in is was for on with by it who which what wrote book river bank water
search query passage document token cat dog bird run fast city capital france paris moon light
dune planet red cafe entree price"""
WORDS = _WORDS.split()
SENTENCES = [
    "the dog and the bird run to the river bank",
    "who wrote the book of the red planet and the dune",
    "search query: what is the capital city of france, paris?",
    "a passage of the document with a token for the cat on the moon",
]
QUERIES = [
    "who wrote the book of the dune planet?",
    "",
    "Zürich naïve café: prix d'ENTRÉE 東京 🙂",
    "  what is the [MASK] of a river bank?  ",
    "dogs, cats & birds... run!",
    "which city of france is the capital and which river bank was the dog running to, "
    "and what was the price of the book, the cat and the bird on the red moon?",
    "cat",
    "...!?",
]
DOCUMENTS = [
    "Dune is a 1965 book; who wrote it? (the planet is red)",
    "",
    "the water of the river",
    "Überraschung! naïve CAFÉ \u2013 “curly quotes” — 東京 🙂🙃 e\u0301",
    " \t leading and trailing white space \n ",
    "a [MASK] token in the document, and the [SEP]arator",
    "...!?",
    "paris is the capital of france. " * 8 + "over-long text is cut",
]
TEXTS = {"queries": QUERIES, "documents": DOCUMENTS, "query_maxlen": 24, "doc_maxlen": 32}

HIDDEN, DIM, POSITIONS = 16, 8, 40
BACKBONES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "modernbert")
# What no loader of a checkpoint needs.
NEEDLESS = ("README.md", ".gitattributes")


# --- Tokenizers -----------------------------------------------------------------------------


def wordpiece(special: dict[str, str], unused: int = 2) -> tokenizers.Tokenizer:
    """BERT's tokenizer with a vocabulary in which any plain text can be spelt."""
    letters = list(string.ascii_lowercase + string.digits)
    vocabulary = [special["pad"], *(f"[unused{i}]" for i in range(unused))]
    vocabulary += [special[role] for role in ("unk", "cls", "sep", "mask")]
    pieces = ["##" + c for c in letters]
    vocabulary = [*vocabulary, *string.punctuation, *letters, *pieces, *WORDS, "東", "##ing"]
    ids = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = tokenizers.Tokenizer(WordPiece(ids, unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def byte_level(special: dict[str, str], first: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on a few sentences; `first` are its first tokens."""
    trained = tokenizers.Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(first) + 256 + 24,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES, trainer)
    fields = json.loads(trained.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split()) for m in fields["merges"]]
    tokenizer = tokenizers.Tokenizer(BPE(fields["vocab"], merges, unk_token=special.get("unk")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def unigram(special: dict[str, str]) -> tokenizers.Tokenizer:
    """XLM-R's kind: pieces with scores, spaces as a character."""
    letters = list(string.ascii_letters + string.digits + string.punctuation + "éïüéÜ東京")
    pieces = ["▁", *letters, *("▁" + word for word in WORDS), "ing", "s", "▁."]
    scores = [-2.0 - 8.0 / len(piece) for piece in pieces]
    head = [special[role] for role in ("cls", "pad", "sep", "unk")]
    vocabulary = [(token, 0.0) for token in head] + list(
        dict(zip(pieces, scores, strict=True)).items()
    )
    vocabulary.append((special["mask"], 0.0))
    tokenizer = tokenizers.Tokenizer(Unigram(vocabulary, unk_id=head.index(special["unk"])))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


SQUARE = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
ANGLE = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}


def write_tokenizer(folder: Path, backbone: str, **settings) -> int:
    """tokenizer.json and its settings, for AutoTokenizer; the size of the vocabulary."""
    special = ANGLE if backbone in ("roberta", "xlm-roberta", "mpnet") else SQUARE
    if backbone == "roberta":
        tokenizer = byte_level(special, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        kind = "RobertaTokenizer"
    elif backbone == "modernbert":
        tokenizer = byte_level(special, [*SQUARE.values(), "[unused0]", "[unused1]"])
        kind = "PreTrainedTokenizerFast"
    elif backbone == "xlm-roberta":
        tokenizer, kind = unigram(special), "XLMRobertaTokenizer"
    else:
        tokenizer = wordpiece(special)
        names = {"bert": "Bert", "electra": "Electra", "distilbert": "DistilBert"}
        kind = f"{names.get(backbone, 'MPNet')}Tokenizer"
    ids = {role: tokenizer.token_to_id(token) for role, token in special.items()}
    start, end = (special["cls"], ids["cls"]), (special["sep"], ids["sep"])
    if backbone in ("roberta", "mpnet"):
        tokenizer.post_processor = processors.RobertaProcessing(end, start, add_prefix_space=False)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start[0]} $A {end[0]}",
            pair=f"{start[0]} $A {end[0]} $B:1 {end[0]}:1",
            special_tokens=[start, end],
        )
    if kind.startswith(("Roberta", "XLM", "MPNet")):  # the mask takes the space before it
        mask = AddedToken(special["mask"], lstrip=True, normalized=False)
    else:
        mask = AddedToken(special["mask"], lstrip=backbone == "modernbert", normalized=False)
    rest = [special[role] for role in ("pad", "unk", "cls", "sep")]
    tokenizer.add_special_tokens([*(AddedToken(token, normalized=False) for token in rest), mask])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{role}_token": token for role, token in special.items()}
    if special is ANGLE:
        named |= {"bos_token": "<s>", "eos_token": "</s>"}
    fields = {"tokenizer_class": kind, "model_max_length": POSITIONS, **named, **settings}
    if kind in ("BertTokenizer", "ElectraTokenizer", "DistilBertTokenizer", "MPNetTokenizer"):
        fields.setdefault("do_lower_case", True)
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return tokenizer.get_vocab_size()


# --- Backbones ------------------------------------------------------------------------------


def config_of(backbone: str, vocabulary: int, **changes):
    """A tiny configuration of the architecture."""
    common = dict(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=POSITIONS,
        type_vocab_size=2,
        initializer_range=0.3,
    )
    after_pad = common | {"max_position_embeddings": POSITIONS + 2, "pad_token_id": 1}
    if backbone == "bert":
        return transformers.BertConfig(**(common | changes))
    if backbone == "electra":
        return transformers.ElectraConfig(**(common | {"embedding_size": 8} | changes))
    if backbone in ("roberta", "xlm-roberta"):
        kind = transformers.RobertaConfig
        if backbone == "xlm-roberta":
            kind = transformers.XLMRobertaConfig
        settings = after_pad | {"type_vocab_size": 1, "bos_token_id": 0, "eos_token_id": 2}
        return kind(**(settings | changes))
    if backbone == "mpnet":
        del after_pad["type_vocab_size"]
        return transformers.MPNetConfig(**(after_pad | changes))
    if backbone == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=vocabulary,
            dim=HIDDEN,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=POSITIONS,
            initializer_range=0.3,
            **changes,
        )
    settings = common | dict(
        num_hidden_layers=4,
        local_attention=8,  # narrower than the texts
        global_attn_every_n_layers=3,
        initializer_cutoff_factor=2.0,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        attn_implementation="sdpa",
    )
    del settings["type_vocab_size"]
    return transformers.ModernBertConfig(**(settings | changes))


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Large random values, biases and layer norms included, so that a mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        norm = name.endswith("weight") and parameter.ndim == 1
        with torch.no_grad():
            parameter.copy_(1 + 0.2 * values if norm else 0.3 * values)


def write_base(
    folder: Path, backbone: str, seed: int, kind: str = "Model", tokenizer=None, **changes
) -> Path:
    """A plain Hugging Face folder of the architecture; `kind` is the end of the class' name."""
    with tempfile.TemporaryDirectory() as place:
        draft = Path(place)
        size = write_tokenizer(draft, backbone, **(tokenizer or {}))
        config = config_of(backbone, size, **changes)
        config.save_pretrained(draft)
        names = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
        names |= {"distilbert": "DistilBert", "electra": "Electra", "mpnet": "MPNet"}
        name = names.get(backbone, "ModernBert")
        model = getattr(transformers, name + kind)(config)
        randomise(model, seed)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(draft).save_pretrained(folder)
    return folder


# --- The libraries --------------------------------------------------------------------------


def make_stanford(out: Path) -> None:
    from colbert.infra.config import ColBERTConfig
    from colbert.modeling.base_colbert import BaseColBERT

    # backbone -> settings, and how the weights are written
    plans = {
        "bert": (dict(), {}),
        "roberta": (dict(attend_to_mask_tokens=True), {}),  # markers become <unk>
        "xlm-roberta": (dict(query_maxlen=16), {}),  # and here
        "distilbert": (dict(mask_punctuation=False), dict(safe_serialization=False)),
        "electra": (dict(dim=12), dict(max_shard_size="9KB")),
        "mpnet": (dict(attend_to_mask_tokens=True, doc_maxlen=40), {}),
        "modernbert": (dict(attend_to_mask_tokens=True), {}),
    }
    for seed, (backbone, (settings, saving)) in enumerate(plans.items()):
        settings = dict(dim=DIM, query_maxlen=12, doc_maxlen=28) | settings
        with tempfile.TemporaryDirectory() as place:
            base = write_base(Path(place) / "base", backbone, seed)
            model = BaseColBERT(str(base), ColBERTConfig(checkpoint=str(base), **settings))
            assert model.name == str(base), "colbert-ai fell back to another class"
        randomise(model.model, seed + 100)
        folder = out / f"stanford_{backbone}"
        # What BaseColBERT.save does, whose save_pretrained takes no settings.
        model.model.save_pretrained(folder, **saving)
        model.raw_tokenizer.save_pretrained(folder)
        model.colbert_config.save_for_checkpoint(str(folder))
        finish("stanford", folder)


def make_pylate(out: Path) -> None:
    from pylate import models
    from torch import nn

    def dense(inner, outer, seed, **settings):
        layer = models.Dense(inner, outer, **({"bias": False} | settings))
        randomise(layer, seed)
        return layer

    one = [(HIDDEN, DIM, {})]
    # name -> backbone, tokenizer settings, dense layers, settings of ColBERT, of the transformer
    plans = {
        "bert": ("bert", {}, one, dict(), {}),
        "roberta": (
            "roberta",
            {},
            [(HIDDEN, 24, dict(bias=True, activation_function=nn.ReLU())), (24, DIM, {})],
            dict(
                query_prefix="",
                document_prefix="",
                do_query_expansion=False,
                skiplist_words=[",", "Ġthe", "no such token"],
            ),
            {},
        ),
        "xlm-roberta": (
            "xlm-roberta",
            {},
            [
                (HIDDEN, 24, dict(bias=True, activation_function=nn.Tanh())),
                (24, DIM, dict(use_residual=True)),
            ],
            dict(attend_to_expansion_tokens=True, skiplist_words=[]),
            {},
        ),
        "distilbert": (
            "distilbert",
            {},
            [(HIDDEN, DIM, dict(bias=True, activation_function=nn.GELU()))],
            dict(
                query_prefix="[unused0]",
                document_prefix="[unused1]",
                prompts={"query": "search query: ", "document": "passage: "},
            ),
            {},
        ),
        "electra": (
            "electra",
            {},
            one,
            dict(
                document_prefix="",
                query_length=16,
                prompts={"all": "token: "},
                default_prompt_name="all",
            ),
            {},
        ),
        "mpnet": (
            "mpnet",
            {},
            [
                (
                    HIDDEN,
                    HIDDEN,
                    dict(bias=True, use_residual=True, activation_function=nn.Sigmoid()),
                ),
                (HIDDEN, DIM, dict(bias=True, use_residual=True, activation_function=nn.SiLU())),
            ],
            dict(document_length=40, skiplist_words=["the", "##ing", "?"]),
            {},
        ),
        "modernbert": ("modernbert", {}, one, dict(do_query_expansion=False), {}),
        "modernbert_lower": (
            "modernbert",
            {},
            one,
            dict(query_length=10, attend_to_expansion_tokens=True),
            dict(do_lower_case=True),
        ),
        # Without a mask token the end of the sequence fills queries.
        "modernbert_eos": (
            "modernbert",
            {"mask_token": None, "eos_token": "[SEP]"},
            one,
            dict(query_length=10, attend_to_expansion_tokens=True),
            {},
        ),
        # Words cased and accented, the query marker one of the vocabulary and the other added.
        "bert_cased": (
            "bert",
            {"do_lower_case": False},
            one,
            dict(query_prefix="[unused0]"),
            {},
        ),
    }
    for seed, (name, plan) in enumerate(plans.items()):
        backbone, tokenizer, layers, settings, transformer = plan
        settings = dict(query_length=12, document_length=28) | settings
        with tempfile.TemporaryDirectory() as place:
            base = write_base(Path(place) / "base", backbone, seed, tokenizer=tokenizer)
            from sentence_transformers.models import Transformer

            modules = [Transformer(str(base), **transformer)]
            modules += [
                dense(i, o, seed + 10 * n + 1, **more) for n, (i, o, more) in enumerate(layers)
            ]
            model = models.ColBERT(modules=modules, device="cpu", **settings)
        # The embeddings of added tokens are drawn anew each time.
        randomise(model[0].auto_model, seed + 100)
        folder = out / f"pylate_{name}"
        model.save(str(folder), create_model_card=False)
        finish("pylate", folder)


def make_sentence_transformers(out: Path) -> None:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling
    from torch import nn

    token = dict(module_input_name="token_embeddings")
    punctuation = list(string.punctuation)

    def dense(inner, outer, seed, level=None, **settings):
        settings = {"bias": False, "activation_function": nn.Identity()} | settings
        layer = Dense(inner, outer, **settings, **(token if level is None else level))
        randomise(layer, seed)
        return layer

    def encoder(base, seed, transformer, layers, mask, added=()):
        first = Transformer(str(base), **transformer)
        if added:
            first.tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
            first.model.resize_token_embeddings(len(first.tokenizer))
        randomise(first.model, seed + 100)
        heads = [dense(i, o, seed + 10 * n, **more) for n, (i, o, more) in enumerate(layers)]
        return [first, *heads, MultiVectorMask(**mask), Normalize(**token)]

    one = [(HIDDEN, DIM, {})]
    markers = {"query": "[Q] ", "document": "[D] "}
    # name -> transformer, dense layers, mask, prompts, added tokens
    plans = {
        "bert": (
            dict(query_expansion=dict(strategy="fixed", length=12), document_length=28),
            one,
            dict(skiplist_words=punctuation),
            dict(prompts={"query": "[Q]", "document": "[D]"}),
            ("[Q]", "[D]"),
        ),
        "roberta": (
            dict(query_length=12, document_length=28),
            one,
            dict(skiplist_words=[",", "Ġthe", "?"], skiplist_tasks=["query", "document"]),
            dict(prompts=markers),
            ("[Q] ", "[D] "),
        ),
        "xlm-roberta": (
            dict(query_expansion=dict(strategy="min", length=10, attend=True)),
            [
                (HIDDEN, 24, dict(bias=True, activation_function=nn.Tanh())),
                (24, DIM, dict(use_residual=True)),
            ],
            dict(),
            dict(prompts=markers),
            (),
        ),
        "distilbert": (
            dict(
                query_expansion=dict(strategy="min", length=8, token="[unused1]"),
                query_length=14,
                document_length=28,
            ),
            [(HIDDEN, HIDDEN, dict(bias=True, use_residual=True)), (HIDDEN, DIM, {})],
            dict(skiplist_words=["the", "no such token"]),
            dict(),
            (),
        ),
        "electra": (
            dict(do_lower_case=True),
            one,
            dict(skiplist_words=punctuation),
            dict(prompts={"query": "Query: ", "document": "Passage: "}),
            (),
        ),
        "mpnet": (
            dict(
                query_expansion=dict(strategy="fixed", length=12, attend=True),
                document_length=28,
            ),
            [(HIDDEN, DIM, dict(bias=True, activation_function=nn.GELU()))],
            dict(keep_only_token_ids=list(range(0, 200, 2)), skiplist_words=["."]),
            dict(),
            (),
        ),
        "modernbert": (
            dict(query_length=16, document_length=28, do_lower_case=True),
            one,
            dict(),
            dict(prompts=markers),
            ("[Q] ", "[D] "),
        ),
    }
    for seed, (backbone, plan) in enumerate(plans.items()):
        transformer, layers, mask, settings, added = plan
        with tempfile.TemporaryDirectory() as place:
            base = write_base(Path(place) / "base", backbone, seed)
            modules = encoder(base, seed, transformer, layers, mask, added)
            model = MultiVectorEncoder(modules=modules, device="cpu", **settings)
            folder = out / f"sentence-transformers_{backbone}"
            model.save_pretrained(str(folder), create_model_card=False)
        finish("sentence-transformers", folder)

    # Single-vector models: their token embeddings, with the Dense module on tokens.
    sentence = dict(module_input_name="sentence_embedding")
    for backbone, heads, settings in (
        ("bert", [], dict(prompts={"query": "query: ", "passage": "passage: "})),
        ("mpnet", [(HIDDEN, DIM)], dict()),
    ):
        with tempfile.TemporaryDirectory() as place:
            base = write_base(Path(place) / "base", backbone, 7)
            modules = [Transformer(str(base)), Pooling(HIDDEN)]
            modules += [
                dense(i, o, 8, sentence, bias=True, activation_function=nn.Tanh()) for i, o in heads
            ]
            modules.append(Normalize())
            model = SentenceTransformer(modules=modules, device="cpu", **settings)
            folder = out / f"sentence-transformers_{backbone}_single"
            model.save_pretrained(str(folder), create_model_card=False)
        finish("sentence-transformers", folder)


def make_transformers(out: Path) -> None:
    # Half of them with the head of another task, whose tensors have a prefix.
    for seed, backbone in enumerate(BACKBONES):
        kind = "ForMaskedLM" if seed % 2 else "Model"
        changes = {"embedding_size": HIDDEN} if backbone == "electra" else {}
        folder = write_base(out / f"transformers_{backbone}", backbone, seed, kind, **changes)
        finish("transformers", folder)


def make_flmr(out: Path) -> None:
    # name -> separate encoders, sides in the file, names of the BERT, torch file, settings
    both = ["query", "context"]
    plans = {
        "tied": (False, ["query"], ["bert_model"], False, {}),
        "context": (False, ["context"], ["bert_model"], False, dict(mask_punctuation=False)),
        "separate": (True, both, ["bert_model"], False, dict(mask_instruction_token=":")),
        "alias": (False, ["query"], ["text_model"], False, dict(attend_to_mask_tokens=True)),
        "bin": (False, both, ["bert_model", "text_model"], True, {}),
    }
    for seed, (name, (separate, sides, aliases, torch_file, settings)) in enumerate(plans.items()):
        folder = out / f"flmr_bert_{name}"
        folder.mkdir(parents=True)
        tokenizer = wordpiece(SQUARE)
        words = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
        config = config_of("bert", len(words))
        models, linears = {}, {}
        for n, side in enumerate(both):
            if n and not separate:  # one encoder under two names
                models[side], linears[side] = models["query"], linears["query"]
                continue
            models[side] = transformers.BertModel(config).eval()
            linears[side] = torch.nn.Linear(HIDDEN, DIM, bias=False)
            randomise(models[side], 10 * seed + n)
            randomise(linears[side], 10 * seed + n + 5)
        tensors = {}
        for side in sides:
            for key, value in models[side].state_dict().items():
                for alias in aliases:
                    tensors[f"{side}_text_encoder.{alias}.{key}"] = value
            tensors[f"{side}_text_encoder_linear.weight"] = linears[side].weight.detach()
        if torch_file:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        attend = settings.pop("attend_to_mask_tokens", False)
        write_flmr_settings(folder, config, words, separate, attend, settings)
        finish("flmr", folder, encode_flmr(folder, models, linears, attend))


def write_flmr_settings(folder, config, words, separate, attend, settings) -> None:
    """config.json, sparse as FLMR writes it, and the two slow BERT tokenizers."""
    text = {"model_type": "flmr_text_model", "vocab_size": len(words), "torch_dtype": "float32"}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        text[name] = getattr(config, name)
    text["max_position_embeddings"] = config.max_position_embeddings
    fields = {
        "architectures": ["FLMRModelForRetrieval"],
        "context_concat_output_from_text_encoder": True,
        "context_concat_output_from_vision_encoder": False,
        "dim": DIM,
        "load_cpu_extension": False,
        "mask_instruction_token": None,
        "mask_punctuation": True,
        "model_type": "flmr",
        "query_concat_output_from_text_encoder": True,
        "query_concat_output_from_vision_encoder": False,
        "separate_query_and_context_text_encoder": separate,
        "separate_query_and_context_vision_encoder": False,
        "text_config": text,
        "torch_dtype": "float32",
        "transformers_version": "4.38.0.dev0",
        "use_transformer_mapping_network": False,
        "use_vision_encoder": False,
        "vision_config": {"dropout": 0.0, "model_type": "flmr_vision_model"},
    }
    (folder / "config.json").write_text(json.dumps(fields | settings, indent=2) + "\n")
    special = {f"{role}_token": token for role, token in SQUARE.items()}
    common = dict(
        clean_up_tokenization_spaces=True,
        do_basic_tokenize=True,
        do_lower_case=True,
        model_max_length=POSITIONS,
        never_split=None,
        strip_accents=None,
        tokenize_chinese_chars=True,
        **special,
    )
    for side, own in (
        ("Query", dict(query_maxlen=12, attend_to_mask_tokens=attend)),
        ("Context", dict(doc_maxlen=28)),
    ):
        place = folder / f"{side.lower()}_tokenizer"
        place.mkdir()
        (place / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        (place / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        own = common | own | {"tokenizer_class": f"FLMR{side}EncoderTokenizer"}
        (place / "tokenizer_config.json").write_text(json.dumps(own, indent=2) + "\n")


def encode_flmr(folder: Path, models, linears, attend: bool) -> originals.Encoded:
    """What FLMR's query and doc do with texts: its tokenizers put ". " before them and write the
    marker over it."""
    fields = json.loads((folder / "config.json").read_text())
    vocabulary = str(folder / "query_tokenizer" / "vocab.txt")
    tokenizer = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=True)
    skip = set()
    if fields["mask_punctuation"]:
        for char in string.punctuation:
            skip.add(tokenizer.encode(char, add_special_tokens=False).ids[0])
    instruction = fields["mask_instruction_token"]
    mask_id, pad_id = tokenizer.token_to_id("[MASK]"), 0

    def embed(text: str, side: str, length: int, marker: int) -> torch.Tensor:
        tokenizer.enable_truncation(length)
        ids = tokenizer.encode(". " + text).ids
        ids[1] = marker
        attention = [1] * len(ids) + [0] * (length - len(ids))
        ids = ids + [pad_id] * (length - len(ids))
        if side == "query":
            ids = [mask_id if i == pad_id else i for i in ids]
            keep = [True] * length
            attention = [1] * length if attend else attention
            if instruction is not None:
                token = tokenizer.encode(instruction, add_special_tokens=False).ids[0]
                end = max(ids.index(token), 1) if token in ids else 1
                keep = [n > end or n < 2 for n in range(length)]
        else:
            keep = [i not in skip and i != pad_id for i in ids]
        with torch.inference_mode():
            hidden = models[side](
                torch.tensor([ids]), attention_mask=torch.tensor([attention])
            ).last_hidden_state
            rows = torch.nn.functional.normalize(linears[side](hidden), dim=-1)[0]
        return rows[torch.tensor(keep)].numpy()

    queries = [embed(text, "query", 12, 1) for text in QUERIES]
    documents = [embed(text, "context", 28, 2) for text in DOCUMENTS]
    return originals.Encoded(queries, documents, originals.maxsim(queries, documents))


# --- Finishing ------------------------------------------------------------------------------


def finish(library: str, folder: Path, encoded: originals.Encoded | None = None) -> None:
    """Remove what is of no use or of this machine, load it back and write the answers."""
    for file in list(folder.rglob("*")):
        if file.name in NEEDLESS:
            file.unlink()
    for file in (*folder.rglob("*.json"), *folder.rglob("artifact.metadata")):
        fields = json.loads(file.read_text(encoding="utf-8"))
        if scrub(file.name, fields):
            file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if encoded is None:
        encoded = originals.encode(library, folder, TEXTS)
    originals.save(folder / "expected.npz", encoded, originals.versions(library))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder.name}: {size / 1024:.0f} KiB, {sum(map(len, encoded.documents))} tokens")


def scrub(name: str, fields) -> bool:
    """Take paths and the like out of a parsed file; whether there were any."""
    if not isinstance(fields, dict):
        return False
    private = ("_name_or_path", "name_or_path", "checkpoint")
    if name == "artifact.metadata":
        private += ("root", "experiment", "index_root", "name", "gpus", "meta")
    return any([fields.pop(key, None) is not None for key in private])


MAKERS = {
    "stanford": make_stanford,
    "pylate": make_pylate,
    "sentence-transformers": make_sentence_transformers,
    "transformers": make_transformers,
    "flmr": make_flmr,
}


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in MAKERS:
        sys.exit(__doc__)
    library = sys.argv[1]
    out = Path(sys.argv[2]) if len(sys.argv) == 3 else HERE / "checkpoints"
    out.mkdir(parents=True, exist_ok=True)
    for folder in out.glob(f"{library}_*"):
        shutil.rmtree(folder)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (out / "texts.json").write_text(
        json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    MAKERS[library](out)


if __name__ == "__main__":
    main()
