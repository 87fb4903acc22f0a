"""Token ids: golden ids of Stanford's own tests on the real bert-base-uncased vocabulary."""

import json
import shutil
import string

import numpy as np
import pytest
import support
import tokenizers

from colbert_jax.checkpoints.tokenizer import read_tokenizer
from colbert_jax.config import TextConfig
from colbert_jax.text import ModelTokenizer, TextTokenizer


@pytest.fixture(scope="module")
def bert(minilm_folder):
    """Stanford's settings on the real vocabulary; doc_maxlen as in colbertv2.0."""
    return TextTokenizer(read_tokenizer(minilm_folder), TextConfig(doc_maxlen=180))


@pytest.fixture(scope="module")
def small(stanford_folder):
    return TextTokenizer(
        read_tokenizer(stanford_folder), TextConfig(query_maxlen=12, doc_maxlen=20)
    )


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("what color is amber urine", [101, 1, 2054, 3609, 2003, 8994, 17996, 102]),
        ("are some cats just skinny?", [101, 1, 2024, 2070, 8870, 2074, 15629, 1029, 102]),
    ],
)
def test_golden_queries(bert, query, ids):
    tokens = bert.queries([query])
    assert tokens.ids[0].tolist() == ids + [103] * (32 - len(ids))
    assert tokens.attended.tolist() == [len(ids)]


def test_golden_document(bert):
    """The start of document 0 of the original's tests, and the full stop and [SEP] of its end."""
    ids = bert.documents(["The presence of communication."]).ids[0].tolist()
    assert ids == [101, 2, 1996, 3739, 1997, 4807, 1012, 102]


def test_golden_skiplist(bert):
    expected = {0, *range(999, 1014), *range(1024, 1037), *range(1063, 1067)}
    assert set(np.flatnonzero(bert.skiplist)) == expected
    assert len(expected) == len(string.punctuation) + 1


def test_attend_to_mask_tokens(minilm_folder):
    config = TextConfig(attend_to_mask_tokens=True)
    assert TextTokenizer(read_tokenizer(minilm_folder), config).queries(["a"]).attended[0] == 32


def test_truncation_keeps_marker_and_sep(small):
    long = " ".join(["heat"] * 100)
    query, document = small.queries([long]).ids[0], small.documents([long]).ids[0]
    sep = small.documents([""]).ids[0][-1]
    assert len(query) == 12 and query[1] == small.special.query_marker and query[-1] == sep
    assert len(document) == 20 and document[1] == small.special.doc_marker
    assert document[-1] == sep and small.queries([long]).attended[0] == 12


def test_empty_text_is_cls_marker_sep(small):
    assert len(small.documents([""]).ids[0]) == 3
    assert small.queries([""]).attended.tolist() == [3]


def test_untrained_defaults_have_no_marker_and_no_expansion(plain_folder):
    tokenizer = TextTokenizer(read_tokenizer(plain_folder), TextConfig.untrained(doc_maxlen=64))
    plain = tokenizers.BertWordPieceTokenizer(str(plain_folder / "vocab.txt"))
    assert tokenizer.queries(["heat flow."]).ids[0].tolist() == plain.encode("heat flow.").ids
    assert tokenizer.kept(tokenizer.documents(["heat, flow."]).ids[0]).all()


def test_kept_drops_punctuation_only(small):
    ids = small.documents(["heat, flow."]).ids[0]
    assert small.kept(ids).tolist() == [True, True, True, False, True, False, True]


def test_a_hundred_thousand_characters(small):
    assert len(small.documents(["heat flow " * 10_000]).ids[0]) == 20


def test_labels_match_rows(small):
    query = small.labels("skinny cats?", is_query=True)
    assert query == ["[CLS]", "[Q]", "skinny", "cats", "?", "[SEP]"] + ["[MASK]"] * 6
    assert small.labels("heats, flow", is_query=False) == [
        *("[CLS]", "[D]", "heats", "heats", "flow", "[SEP]")
    ]


def test_spans_are_places_in_the_text_as_it_was_given(small, stanford_folder):
    text = "Heats, FLOW"
    spans = small.spans(text, is_query=False)
    words = [None if span is None else text[slice(*span)] for span in spans]
    assert words == [None, None, "Heats", "Heats", "FLOW", None]
    assert len(small.spans("skinny cats?", is_query=True)) == 12
    config = TextConfig(doc_prompt="heat ", strip=True, lowercase=True, doc_maxlen=20)
    prompted = TextTokenizer(read_tokenizer(stanford_folder), config)
    for text in ("  cats \u0130\u0130 flow ", "CATS flow"):
        spans = prompted.spans(text, is_query=False)
        assert len(spans) == len(prompted.labels(text, is_query=False))
        found = [text[slice(*span)].lower() for span in spans if span is not None]
        assert found[0] == "cats" and found[-1] == "flow" and "heat" not in found


def test_bad_texts_are_named(small):
    with pytest.raises(TypeError, match="document 1 must be a string, got int"):
        small.documents(["a", 3])
    with pytest.raises(ValueError, match="query 0 is not valid Unicode"):
        small.queries(["\ud800"])


def test_missing_marker_is_named(plain_folder):
    with pytest.raises(ValueError, match=r"doc_token_id '\[D\]' is not in the tokenizer"):
        TextTokenizer(read_tokenizer(plain_folder), TextConfig(doc_token_id="[D]"))


def test_tokenizer_json_padding_and_truncation_are_switched_off(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "copy")
    published = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"))
    published.enable_truncation(4)
    published.enable_padding(length=50)
    published.save(str(folder / "tokenizer.json"))
    ids = (
        TextTokenizer(read_tokenizer(folder), TextConfig(doc_maxlen=40))
        .documents(["a " * 9])
        .ids[0]
    )
    assert len(ids) == 12


def test_special_tokens_written_as_objects(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "copy")
    tokens = {"mask_token": {"content": "[unused1]"}, "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    tokenizer = TextTokenizer(read_tokenizer(folder), TextConfig())
    assert tokenizer.special.expansion == support.vocabulary().index("[unused1]")
    unknown = support.vocabulary().index("[UNK]")
    assert unknown in tokenizer.documents(["HEAT"]).ids[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
        {"tokenizer_class": "BertTokenizer"},
        {"tokenizer_class": "BertTokenizer", "strip_accents": False, "do_lower_case": True},
        {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False},
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
    ],
)
@pytest.mark.parametrize("lowercase", [True, False])
def test_settings_against_tokenizer_json_as_transformers_does(
    minilm_folder, tmp_path, settings, lowercase
):
    transformers = pytest.importorskip("transformers")
    own = tokenizers.BertWordPieceTokenizer(str(minilm_folder / "vocab.txt"), lowercase=lowercase)
    own.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(minilm_folder / "vocab.txt", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | special))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = TextTokenizer(read_tokenizer(tmp_path), TextConfig.untrained())
    for text in ("Über Café 日本語 ABC", "Plain words."):
        assert ours.documents([text]).ids[0].tolist() == theirs(text)["input_ids"]


def test_padding_in_a_query_is_masked(bert):
    """As Stanford does with every padding id."""
    assert bert.queries(["a [PAD] b"]).ids[0].tolist()[:6] == [101, 1, 1037, 103, 1038, 102]


def test_tokenizer_without_cls_and_sep_is_refused(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "copy")
    bare = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt")).to_str()
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(bare) | {"post_processor": None}))
    with pytest.raises(ValueError, match=r"does not put \[CLS\] before a text"):
        TextTokenizer(read_tokenizer(folder), TextConfig())


def test_no_tokenizer(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "copy")
    (folder / "vocab.txt").unlink()
    with pytest.raises(
        ValueError, match=r"no tokenizer: tokenizer\.json and vocab\.txt are missing"
    ):
        TextTokenizer(read_tokenizer(folder), TextConfig())


def test_damaged_tokenizer_names_the_file(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        TextTokenizer(read_tokenizer(folder), TextConfig())


def test_translation(small, stanford_folder):
    """Pieces are found under their other ids, special tokens by their role."""
    assert small.translation(small) is None
    model = read_tokenizer(stanford_folder)
    words = model.tokenizer.get_vocab()
    other = [f"<{word}>" if word in ("[CLS]", "[SEP]") else word for word in reversed(words)]
    wordpiece = {word: n + 5 for n, word in enumerate(other)}
    renamed = {
        role: f"<{token}>" if f"<{token}>" in wordpiece else token
        for role, token in model.special.items()
    }
    bare = tokenizers.BertWordPieceTokenizer(wordpiece, cls_token="<[CLS]>", sep_token="<[SEP]>")
    theirs = TextTokenizer(
        ModelTokenizer(tokenizers.Tokenizer.from_str(bare.to_str()), renamed), small.config
    )
    ids = small.translation(theirs)
    text = "what is heat, [MASK] zzz?"
    assert ids.dtype == np.int32 and len(ids) == small.vocab_size
    assert ids[small.documents([text]).ids[0]].tolist() == theirs.documents([text]).ids[0].tolist()
    back = theirs.translation(small)
    assert back[ids].tolist() == list(range(small.vocab_size))

    del wordpiece["heat"]
    fewer = tokenizers.BertWordPieceTokenizer(wordpiece, cls_token="<[CLS]>", sep_token="<[SEP]>")
    fewer = ModelTokenizer(tokenizers.Tokenizer.from_str(fewer.to_str()), renamed)
    with pytest.raises(ValueError, match=r"lacks 1 of .* pieces: 'heat'"):
        small.translation(TextTokenizer(fewer, small.config))
