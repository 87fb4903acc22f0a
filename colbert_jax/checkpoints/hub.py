"""Model names to folders: a local folder as it is, else a Hugging Face hub id.

Caching, tokens (`HF_TOKEN`) and offline mode (`HF_HUB_OFFLINE`) are huggingface_hub's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from colbert_jax.checkpoints import colbertv1, flmr
from colbert_jax.tensors.weights import WEIGHT_FILES

# What the readers open beside weights, in the root and in the folders of modules and tokenizers.
_SETTINGS = (
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_*_config.json",
    "artifact.metadata",
    "colbert_jax.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    f"*{colbertv1.SUFFIX}",
)
# Folders of modules and of tokenizers. Others hold copies for other runtimes, or of a training run.
_FOLDERS = ("[0-9]*_*", flmr.QUERY_TOKENIZER, flmr.CONTEXT_TOKENIZER)
# One of them must be in a cached copy of unknown extent: without its settings, as another library
# may have left it there, a checkpoint would be read as a plain encoder. No library opens the last
# one; it comes with a download of everything.
_TELLING = ("artifact.metadata", "modules.json", "colbert_jax.json", ".gitattributes")


def resolve_checkpoint(
    name_or_path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[Path, Path | None]:
    """The folder of a checkpoint, or a `.dnn` file and the folder of its base model.

    Raises:
      FileNotFoundError: neither here nor reachable on the hub.
      ValueError: a `base` for something else than a `.dnn` file.
    """
    path = Path(name_or_path).expanduser()
    if not (path.is_file() and path.suffix == colbertv1.SUFFIX):
        if base is not None:
            raise ValueError(f"{name_or_path}: base is for a {colbertv1.SUFFIX} file only")
        return resolve(name_or_path, revision=revision, token=token), None
    if base is None:
        beside = (path.parent / "config.json").is_file()
        base = path.parent if beside else colbertv1.base_name(path)
    return path, resolve(base, revision=revision, token=token, weights=False)


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint, fetched from the hub where the name is not a folder here.

    Args:
      weights: whether they are needed too.

    Raises:
      FileNotFoundError: neither a folder nor reachable on the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists():
        raise FileNotFoundError(
            f"{name}: a file; a checkpoint is a folder, or a ColBERTv1 {colbertv1.SUFFIX} file"
        )
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
    """The cached copy of a hub repository, with the files that the readers need.

    Where the hub is not reached, what an earlier run fetched serves as well, if it is complete.

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
        return FileNotFoundError(f"{where}: no such folder here, and {reason}. {advice}")

    advice = "Without the hub, download the checkpoint elsewhere and pass its folder"
    reason, wanted = "HF_HUB_OFFLINE is set", None
    try:
        if not constants.HF_HUB_OFFLINE:
            try:
                # model_info does not retry for half a minute, as listing the tree does.
                info = HfApi().model_info(
                    name, revision=revision, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT
                )
                wanted = needed_files((f.rfilename for f in info.siblings or ()), weights)
                if wanted:
                    got = snapshot_download(
                        name, revision=revision, token=token, allow_patterns=wanted
                    )
                    if not _lacking(Path(got), wanted):
                        return Path(got)
                    reason = "the download broke off"
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                raise
            except Exception as error:  # of whichever HTTP library the client is built on
                reason = _first_line(error)
                if getattr(getattr(error, "response", None), "status_code", None) == 401:
                    advice = "Check the token: token=, or HF_TOKEN"
            if wanted == []:
                raise missing(
                    "its repository on the Hugging Face hub has no file of a checkpoint",
                    "A checkpoint has a config.json and weights in safetensors or torch files",
                )
        # Asked for no files, newer clients do not refuse a snapshot for those that were left out.
        cached = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: neither a folder here nor a hub id: {error}") from None
    except GatedRepoError as error:
        raise missing(
            "its repository on the Hugging Face hub is gated",
            "Accept its terms there and pass token=, or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise missing(f"the Hugging Face hub has no revision {revision!r} of it", advice) from error
    except RepositoryNotFoundError as error:
        raise missing(
            "the Hugging Face hub has no repository of that name that this token may read",
            "Check the spelling; for a private one pass token=, or set HF_TOKEN",
        ) from error
    except LocalEntryNotFoundError as error:
        raise missing(
            f"the Hugging Face hub did not provide it ({reason}), nor is it in the cache", advice
        ) from error
    listed = _cached_listing(name, revision)
    doubt = _doubt(Path(cached), wanted if listed is None else needed_files(listed, weights))
    if doubt is not None:
        raise missing(f"the Hugging Face hub did not provide it ({reason}); {doubt}", advice)
    return Path(cached)


def _cached_listing(name: str, revision: str | None) -> list[str] | None:
    """The names of a repository's files, which downloads have left in the cache since 1.23."""
    import huggingface_hub
    from huggingface_hub import errors

    cached = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if cached is None:
        return None
    try:
        return [file.path for file in cached(name, revision=revision)]
    except errors.CachedRepoTreeNotFoundError:
        return None


def _doubt(folder: Path, wanted: list[str] | None) -> str | None:
    """What speaks against a cached snapshot being complete; `wanted` None: not known."""
    if wanted is None:
        if any((folder / name).is_file() for name in _TELLING):
            return None
        return f"its copy in the cache may be a part only, no file tells its layout: {folder}"
    lacking = _lacking(folder, wanted)
    if not lacking:
        return None
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    return f"its copy in the cache lacks {', '.join(lacking[:3])}{more}: {folder}"


def _lacking(folder: Path, wanted: Iterable[str]) -> list[str]:
    return [name for name in wanted if not (folder / name).is_file()]


def needed_files(names: Iterable[str], weights: bool = True) -> list[str]:
    """Of a repository's files those that the readers open: settings, tokenizer, one set of weights.

    Weights of a folder are taken in one format only, safetensors before torch files.
    """
    folders: dict[PurePosixPath, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(path.parent, []).append(path.name)
    wanted = []
    for folder, files in folders.items():
        settings = [f for f in files if any(fnmatch(f, pattern) for pattern in _SETTINGS)]
        known = any(fnmatch(str(folder), pattern) for pattern in _FOLDERS)
        if len(folder.parts) > known or not settings:
            continue
        best = next((f for f in WEIGHT_FILES if weights and f in files), None)
        if best is not None:
            settings = [f for f in settings if not f.endswith(colbertv1.SUFFIX)] + [best]
            if best.endswith(".index.json"):
                suffix = best.removesuffix(".index.json").partition(".")[2]
                settings += [f for f in files if f.endswith(f".{suffix}")]
        wanted += [str(folder / f) for f in settings]
    return wanted


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
