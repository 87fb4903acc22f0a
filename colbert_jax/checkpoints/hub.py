"""Model names to folders: a local folder as it is, else a Hugging Face hub id."""

from __future__ import annotations

from pathlib import Path

# What the readers of this package open; weights in other formats stay where they are.
_FILES = ["*.json", "*.safetensors", "artifact.metadata", "vocab.txt"]


def resolve(
    name_or_path: str | Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder of a checkpoint, fetched from the hub where the name is not a folder here.

    Raises:
      FileNotFoundError: neither a folder nor reachable on the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists():
        raise FileNotFoundError(f"{name}: a file; a checkpoint is a folder")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such checkpoint folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_FILES))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: neither a folder here nor a hub id: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such folder here, and the Hugging Face hub did not provide it ({reason}). "
            "Without the hub, download the checkpoint elsewhere and pass its folder"
        ) from error
