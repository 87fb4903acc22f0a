"""This library inside others, each used as its own users use it; skipped where it is missing."""

import asyncio
import importlib.util
import warnings

import pytest

from colbert_jax import Retriever
from colbert_jax.retriever import rank_documents

QUERY = "running cats"
# Other libraries' own warnings are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def needs(extra, package):
    """Skip a test where the package of an extra is not installed."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f'needs pip install "colbert-jax[{extra}]"')


def adapter_of(name):
    """The module of an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"colbert_jax.adapters.{name}")


@pytest.fixture(scope="module")
def retriever(model, texts, tmp_path_factory) -> Retriever:
    records = [{"id": f"d{n}", "text": text, "year": 2000 + n} for n, text in enumerate(texts[:30])]
    return Retriever.build(tmp_path_factory.mktemp("adapters") / "i", model, records)


@pytest.fixture(scope="module")
def hits(retriever):
    return retriever.search(QUERY, k=4)


@pytest.fixture(scope="module")
def ranked(model, texts):
    return rank_documents(model, QUERY, texts[:5])


@needs("langchain", "langchain_core")
def test_langchain(retriever, hits, ranked, model, texts):
    adapter = adapter_of("langchain")
    from langchain_core.documents import Document
    from langchain_core.language_models import FakeListChatModel
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnablePassthrough

    finder = adapter.ColBERTRetriever(retriever=retriever, k=4)
    found = finder.invoke(QUERY)
    assert [one.id for one in found] == [hit.id for hit in hits]
    assert found[0].page_content == hits[0].text
    assert found[0].metadata["year"] == 2000 + hits[0].position
    assert found[0].metadata["score"] == pytest.approx(hits[0].score)
    assert asyncio.run(finder.ainvoke(QUERY)) == found
    chosen = adapter.ColBERTRetriever(retriever=retriever, search_kwargs={"where": {"year": 2003}})
    assert [one.id for one in chosen.invoke(QUERY)] == ["d3"]

    seen = []
    prompt = ChatPromptTemplate.from_template("{context}\n{question}")
    chain = (
        {
            "context": finder
            | (lambda documents: "\n".join(one.page_content for one in documents)),
            "question": RunnablePassthrough(),
        }
        | prompt
        | (lambda value: seen.append(value.to_string()) or value)
        | FakeListChatModel(responses=["an answer"])
        | StrOutputParser()
    )
    assert chain.invoke(QUERY) == "an answer"
    assert all(hit.text in seen[0] for hit in hits) and QUERY in seen[0]

    documents = [Document(page_content=text, metadata={"n": n}) for n, text in enumerate(texts[:5])]
    compressor = adapter.ColBERTCompressor(model=model, k=3)
    kept = compressor.compress_documents(documents, QUERY)
    assert [one.metadata["n"] for one in kept] == [hit.position for hit in ranked[:3]]
    assert kept[0].metadata["relevance_score"] == pytest.approx(ranked[0].score)
    assert "relevance_score" not in documents[0].metadata
    assert asyncio.run(compressor.acompress_documents(documents, QUERY)) == kept
    assert compressor.compress_documents([], QUERY) == []


@needs("llama-index", "llama_index")
def test_llama_index(retriever, hits, ranked, model, texts):
    adapter = adapter_of("llama_index")
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.schema import NodeWithScore, TextNode

    finder = adapter.ColBERTRetriever(retriever, k=4)
    found = finder.retrieve(QUERY)
    assert [one.node.node_id for one in found] == [hit.id for hit in hits]
    assert found[0].node.metadata == {"year": 2000 + hits[0].position}
    assert found[0].score == pytest.approx(hits[0].score)
    again = asyncio.run(finder.aretrieve(QUERY))
    assert [one.node.node_id for one in again] == [hit.id for hit in hits]

    reranker = adapter.ColBERTRerank(model=model, top_n=2)
    nodes = [
        NodeWithScore(node=TextNode(text=text, id_=str(n))) for n, text in enumerate(texts[:5])
    ]
    kept = reranker.postprocess_nodes(nodes, query_str=QUERY)
    assert [int(one.node.node_id) for one in kept] == [hit.position for hit in ranked[:2]]
    with pytest.raises(ValueError, match="needs the query"):
        reranker.postprocess_nodes(nodes)

    engine = RetrieverQueryEngine.from_args(finder, llm=MockLLM(), node_postprocessors=[reranker])
    answer = engine.query(QUERY)
    assert len(answer.source_nodes) == 2
    assert all(one.node.get_content() in str(answer) for one in answer.source_nodes)


@needs("haystack", "haystack")
def test_haystack(retriever, hits, ranked, stanford_folder, texts):
    adapter = adapter_of("haystack")
    from haystack import Document, Pipeline

    path = str(retriever.index.path)
    pipeline = Pipeline()
    pipeline.add_component("retriever", adapter.ColBERTRetriever(path, top_k=4))
    pipeline.add_component("ranker", adapter.ColBERTRanker(str(stanford_folder), top_k=2))
    pipeline.connect("retriever.documents", "ranker.documents")
    inputs = {"retriever": {"query": QUERY}, "ranker": {"query": QUERY}}
    both = {"retriever", "ranker"}
    result = pipeline.run(inputs, include_outputs_from=both)
    found = result["retriever"]["documents"]
    assert [one.id for one in found] == [hit.id for hit in hits]
    assert found[0].meta == {"year": 2000 + hits[0].position}
    order = rank_documents(retriever.model, QUERY, [hit.text for hit in hits])
    kept = result["ranker"]["documents"]
    assert [one.id for one in kept] == [hits[one.position].id for one in order[:2]]

    again = Pipeline.loads(pipeline.dumps(), allowed_modules=[adapter.__name__])
    assert again.to_dict() == pipeline.to_dict()
    finder = pipeline.get_component("retriever")
    condition = {"field": "meta.year", "operator": "in", "value": [2003, 2004]}
    some = finder.run(QUERY, filters=condition)["documents"]
    assert {one.id for one in some} == {"d3", "d4"}
    assert asyncio.run(finder.run_async(QUERY, condition))["documents"] == some
    ranker = pipeline.get_component("ranker")
    documents = [Document(content=text) for text in texts[:5]]
    kept = ranker.run(QUERY, documents, top_k=3)["documents"]
    assert [one.content for one in kept] == [hit.text for hit in ranked[:3]]

    year = {"field": "meta.year", "operator": ">=", "value": 2003}
    missing = {"field": "lang", "operator": "==", "value": None}
    other = {"field": "lang", "operator": "not in", "value": ["en"]}
    given = {
        "operator": "NOT",
        "conditions": [year, {"operator": "OR", "conditions": [missing, other]}],
    }
    assert adapter.where_of(given) == {
        "not": {
            "and": [
                {"year": {"gte": 2003}},
                {"or": [{"lang": {"exists": False}}, {"not": {"lang": {"in": ["en"]}}}]},
            ]
        }
    }
    with pytest.raises(ValueError, match="no operator 'near' on 'year'"):
        adapter.where_of(year | {"operator": "near"})


@needs("rerankers", "rerankers")
def test_rerankers(ranked, model, texts):
    adapter = adapter_of("rerankers")
    ranker = adapter.ColBERTRanker(model)
    results = ranker.rank(QUERY, texts[:5], doc_ids=["a", "b", "c", "d", "e"])
    assert [one.doc_id for one in results] == ["abcde"[hit.position] for hit in ranked]
    assert results.top_k(1)[0].score == pytest.approx(ranked[0].score)
    assert [one.rank for one in results] == [1, 2, 3, 4, 5]
    best = ranked[0]
    assert ranker.score(QUERY, best.text) == pytest.approx(best.score, abs=1e-4)
    again = asyncio.run(ranker.rank_async(QUERY, texts[:5]))
    assert [one.doc_id for one in again] == [hit.position for hit in ranked]


@needs("mcp", "mcp")
def test_mcp(retriever, hits):
    adapter = adapter_of("mcp")
    import json

    from mcp import Client

    server = adapter.make_server({"books": retriever})

    async def session():
        async with Client(server) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}

            async def call(name, **arguments):
                result = await client.call_tool(name, arguments)
                return result.is_error, result.content[0].text

            found = await call("search", query=QUERY, k=4)
            one = await call("search", query=QUERY, where={"year": 2003})
            text = await call("get", id="d3")
            words = await call("explain", query=QUERY, id="d3")
            wrong = await call("get", id="nobody")
            return tools, found, one, text, words, wrong

    tools, found, one, text, words, wrong = asyncio.run(session())
    assert set(tools) == {"search", "explain", "get"} and tools["search"].description
    assert [row["id"] for row in json.loads(found[1])] == [hit.id for hit in hits]
    assert [row["id"] for row in json.loads(one[1])] == ["d3"]
    assert json.loads(text[1]) == {
        "id": "d3",
        "text": retriever.index.text("d3"),
        "fields": {"year": 2003},
    }
    assert {row["query"] for row in json.loads(words[1])["matches"]} == set(QUERY.split())
    assert wrong[0] and "nobody" in wrong[1]


@needs("dspy", "dspy")
def test_dspy(retriever, hits):
    adapter = adapter_of("dspy")
    import dspy

    finder = adapter.ColBERTRM(retriever, k=4)
    assert [one.pid for one in finder(QUERY)] == [hit.id for hit in hits]
    assert [one.pid for one in finder(QUERY, k=5, where={"year": 2003})] == ["d3"]
    with dspy.context(rm=finder):
        found = dspy.Retrieve(k=4)(QUERY)
    assert found.passages == [hit.text for hit in hits]


@needs("mteb", "mteb")
def test_mteb(model, tmp_path):
    adapter = adapter_of("mteb")
    import mteb
    from mteb.models import SearchProtocol

    tasks = pytest.importorskip("mteb.mocks.mock_tasks")
    search = adapter.ColBERTSearch(model, "local/tiny")
    assert isinstance(search, SearchProtocol)
    for task in (tasks.MockRetrievalTask(), tasks.MockRerankingTask()):
        result = mteb.evaluate(search, task, cache=None, co2_tracker=False)
        (scores,) = result.task_results[0].scores["test"]
        assert 0 <= scores["ndcg_at_10"] <= 1


@needs("pyterrier", "pyterrier")
def test_pyterrier(retriever, hits, model, texts, tmp_path):
    adapter = adapter_of("pyterrier")
    import pandas as pd
    import pyterrier as pt

    topics = pd.DataFrame([["q1", QUERY], ["q2", "heat flow"]], columns=["qid", "query"])
    finder = adapter.ColBERTRetriever(retriever, text=True)
    found = (finder % 4)(topics)
    assert found[found.qid == "q1"].docno.tolist() == [hit.id for hit in hits]
    assert found[found.qid == "q1"]["rank"].tolist() == [0, 1, 2, 3]
    reranked = ((finder % 4) >> adapter.ColBERTReranker(model))(topics)
    first = reranked[reranked.qid == "q1"]
    order = rank_documents(model, QUERY, [hit.text for hit in hits])
    assert first.docno.tolist() == [hits[one.position].id for one in order]

    documents = [{"docno": f"d{n}", "text": text} for n, text in enumerate(texts[:20])]
    built = adapter.ColBERTIndexer(tmp_path / "pt", model, progress=False).index(iter(documents))
    qrels = pd.DataFrame(
        [["q1", hits[0].id, 1], ["q2", "d1", 1]], columns=["qid", "docno", "label"]
    )
    table = pt.Experiment([finder % 10, built % 10], topics, qrels, ["map", "P_5"])
    assert table["P_5"].tolist()[0] > 0 and len(table) == 2
