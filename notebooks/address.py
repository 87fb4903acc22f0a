"""Write the repository's address into all notebooks: into their Colab badges and install cells.

    python notebooks/address.py OWNER/NAME

OWNER/NAME is of GitHub. This is the one place where the address is set: run it again when that
changes.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What stands before the address, and what behind it.
ADDRESS = re.compile(
    r"(colab\.research\.google\.com/github/|git\+https://github\.com/)([\w.-]+/[\w.-]+?)(?=/blob/|[\"\\])"
)


def addresses(text: str) -> list[str]:
    """The addresses in a notebook: of its badge and of its install cell."""
    return [found for _, found in ADDRESS.findall(text)]


def with_address(text: str, address: str) -> str:
    """The notebook with another address."""
    return ADDRESS.sub(rf"\g<1>{address}", text)


def main(arguments: list[str], folder: Path = HERE) -> None:
    """Change the notebooks of a folder."""
    if len(arguments) != 1 or not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments[0]):
        raise SystemExit("usage: python notebooks/address.py OWNER/NAME")
    for file in sorted(folder.glob("*.ipynb")):
        text = file.read_text("utf-8")
        file.write_text(with_address(text, arguments[0]), "utf-8")
        print(f"{file.name}: {', '.join(addresses(text))} -> {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
