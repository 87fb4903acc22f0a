"""One way to show progress: a tqdm bar on a terminal or in a notebook, silence elsewhere."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int | None, description: str, unit: str, show: bool | None = None) -> tqdm:
    """A bar with rate and time left. `show` None: only where somebody can watch it."""
    if show is None:
        show = sys.stderr.isatty() or _in_notebook()
    return tqdm(total=total, desc=description, unit=unit, disable=not show, dynamic_ncols=True)


def _in_notebook() -> bool:
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and kernel.IPKernelApp.initialized()
