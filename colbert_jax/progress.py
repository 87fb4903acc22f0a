"""One way to show progress: a tqdm bar on a terminal or in a notebook, silence elsewhere."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm


def progress_bar(total: int | None, description: str, unit: str, show: bool | None = None) -> tqdm:
    """A bar with rate and time left. `show` None: only where somebody can watch it."""
    if show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(total=total, desc=description, unit=unit, disable=not show, dynamic_ncols=True)
