"""Pulls GGUF models from the Hugging Face Hub, or from anything that speaks its protocol (`HF_ENDPOINT`).

huggingface_hub answers what a repository holds; the bytes come over plain HTTP range requests, so that a transfer cut
off at any point goes on where it stopped, whatever wrote the first part. A model becomes visible only once every part
has arrived, has the size and the hash that the Hub announced, and is a sound GGUF file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NoReturn
from urllib.parse import unquote

from edgellm.errors import InvalidModelFileError, ModelUnsupportedError, PullError
from edgellm.models.describe import describe
from edgellm.models.files import publish
from edgellm.models.names import place, slug
from edgellm.models.split import model_stem, split_names
from edgellm.models.store import ModelStore, StoredModel
from edgellm.models.transfer import Transfer, check_disk, fetch

DEFAULT_ENDPOINT = "https://huggingface.co"
PREFERENCE = tuple(
    "Q4_K_M Q4_0 Q4_K_S Q5_K_M Q8_0 Q6_K Q5_K_S Q5_0 Q4_1 IQ4_XS IQ4_NL Q3_K_M Q3_K_L Q2_K F16 BF16 F32".split()  # noqa: SIM905
)
"""Which quantisation is taken where the user names none: the first of these that the repository has."""

_HOST = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/)", re.IGNORECASE)
_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPO = re.compile(rf"({_ID}/{_ID})(?:@([^:\s]+))?(?::([A-Za-z0-9_]+))?(?:@(\S+))?")
_FILE = re.compile(rf"({_ID}/{_ID})(?:@([^/\s]+))?/((?:(?!@).)+\.gguf)(?:@(\S+))?", re.IGNORECASE)
_PAGE = re.compile(rf"({_ID}/{_ID})/(?:resolve|blob|tree)/([^/]+)(?:/(.*))?")


@dataclass(frozen=True, slots=True)
class HubSpec:
    """What the user asked for: a repository, and which of its files."""

    repo: str
    file: str | None = None
    quantisation: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class PullProgress:
    """Bytes of all files of the model; `resumed_bytes` of them had arrived earlier."""

    name: str
    done_bytes: int
    total_bytes: int
    resumed_bytes: int


Progress = Callable[[PullProgress], None]


@dataclass(frozen=True, slots=True)
class _HubFile:
    path: str
    file_bytes: int
    sha256: str | None  # of files in large-file storage
    git_blob: str | None  # of the others


def parse_spec(text: str) -> HubSpec:
    """`owner/repo`, `owner/repo:Q4_K_M`, `owner/repo/path/file.gguf`, each with `@revision`, or an address on hf.co.

    Raises PullError.
    """
    rest = text.strip()
    if match := _HOST.match(rest):
        rest = unquote(rest[match.end() :].partition("?")[0].partition("#")[0].rstrip("/"))
        if page := _PAGE.fullmatch(rest):
            file = page[3] or None
            if file is None or file.lower().endswith(".gguf"):
                return HubSpec(page[1], file=file, revision=page[2])
    if match := _FILE.fullmatch(rest):
        return HubSpec(match[1], file=match[3], revision=match[2] or match[4])
    if match := _REPO.fullmatch(rest):
        return HubSpec(match[1], quantisation=match[3], revision=match[2] or match[4])
    raise PullError(
        f"{text!r} names no model: write owner/repo, owner/repo:Q4_K_M, owner/repo/file.gguf or its address on hf.co"
    )


def pull(
    spec: str,
    store: ModelStore,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> StoredModel:
    """Bring the model `spec` (see `parse_spec`) into `store`; what is there already is not fetched again.

    `endpoint` defaults to `HF_ENDPOINT` or the Hub, `token` to `HF_TOKEN` or the one that `hf auth login` saved.
    Raises PullError with one line; what had arrived is kept for the next try unless it was wrong.
    """
    wanted = parse_spec(spec)
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    commit, listed = _list_files(wanted, endpoint, token)
    files = _choose(wanted, listed)
    if nameless := [file.path for file in files if file.file_bytes <= 0]:
        raise PullError(f"{endpoint} does not say how large {nameless[0]} is")
    try:
        stem = PurePosixPath(files[0].path)
        name = slug(f"{wanted.repo}/{stem.with_name(model_stem(stem.name))}")
        paths = [place(store.root, slug(f"{wanted.repo}/{file.path[:-5]}"), ".gguf") for file in files]
    except ValueError as error:
        raise PullError(f"{spec}: {error}") from None
    token = token or _saved_token()
    transfers = [
        Transfer(
            url=_file_url(endpoint, wanted.repo, commit, file.path),
            path=path,
            partial_folder=store.root / ".partial",
            file_bytes=file.file_bytes,
            sha256=file.sha256,
            git_blob=file.git_blob,
            token=token,
        )
        for file, path in zip(files, paths, strict=True)
    ]
    source = f"{endpoint.split('://')[-1]}/{wanted.repo}@{commit[:12]}/{files[0].path}"
    return _fetch_all(name, source, transfers, store, progress)


def _fetch_all(
    name: str, source: str, transfers: Sequence[Transfer], store: ModelStore, progress: Progress | None
) -> StoredModel:
    try:
        arrived = [transfer.arrived_bytes() for transfer in transfers]
        check_disk(store.root, sum(item.file_bytes for item in transfers) - sum(arrived))
        done, total = sum(arrived), sum(transfer.file_bytes for transfer in transfers)

        def report(n_bytes: int) -> None:  # negative where a transfer had to start again
            nonlocal done
            done += n_bytes
            if progress:
                progress(PullProgress(name, done, total, sum(arrived)))

        report(0)
        ready = [(fetch(transfer, report), transfer) for transfer in transfers]
        for temporary, transfer in reversed(ready):  # the first part makes the model visible, so it comes last
            transfer.path.parent.mkdir(parents=True, exist_ok=True)
            if temporary != transfer.path:
                publish(temporary, transfer.path)
        if describe(transfers[0].path).is_adapter:
            raise InvalidModelFileError(f"{name} is a LoRA adapter, not a model")
        store.record(transfers[0].path, source, sha256=transfers[0].sha256)
    except (InvalidModelFileError, ModelUnsupportedError) as error:
        for transfer in transfers:
            transfer.path.unlink(missing_ok=True)
        raise PullError(f"{error}; it was removed") from None
    except OSError as error:
        raise PullError(f"{name}: cannot be stored: {error.strerror or error}") from None
    return store.find(name)


def _choose(wanted: HubSpec, listed: Sequence[_HubFile]) -> list[_HubFile]:
    """The files of the model that is meant: one, or all parts of a split one."""
    by_path = {file.path: file for file in listed}
    if wanted.file is not None:
        first = split_names(wanted.file)[0]
        if first not in by_path:
            raise PullError(f"{wanted.repo} has no file {wanted.file}.{_offer(_models(listed))}")
    else:
        first = _best(wanted, _models(listed))
    missing = [name for name in split_names(first) if name not in by_path]
    if missing:
        raise PullError(f"{wanted.repo} lacks a part of the model: {missing[0]}")
    return [by_path[name] for name in split_names(first)]


def _models(listed: Sequence[_HubFile]) -> list[str]:
    """First files of the models in a repository, without vision projectors and importance matrices."""
    return sorted(
        file.path
        for file in listed
        if file.path.lower().endswith(".gguf")
        and split_names(file.path)[0] == file.path
        and not re.search(r"(^|[-_./])(mmproj|imatrix)", file.path, re.IGNORECASE)
    )


def _best(wanted: HubSpec, models: list[str]) -> str:
    if not models:
        raise PullError(f"{wanted.repo} holds no GGUF file; look for a repository whose name ends in -GGUF")
    order = (wanted.quantisation,) if wanted.quantisation else PREFERENCE
    for quantisation in order:
        fitting = [path for path in models if _is_quantised(path, quantisation)]
        if fitting:
            return min(fitting, key=lambda path: (len(path), path))
    if wanted.quantisation is None and len(models) == 1:
        return models[0]
    which = f"no {wanted.quantisation}" if wanted.quantisation else "no file of a usual quantisation"
    raise PullError(f"{wanted.repo} has {which}.{_offer(models)}")


def _is_quantised(path: str, quantisation: str) -> bool:
    return re.search(rf"(^|[-_./]){re.escape(quantisation)}($|[-_./])", path, re.IGNORECASE) is not None


def _offer(models: list[str]) -> str:
    more = f" and {len(models) - 8} more" if len(models) > 8 else ""
    return f" It has {', '.join(models[:8])}{more}." if models else ""


def _file_url(endpoint: str, repo: str, commit: str, path: str) -> str:
    from huggingface_hub import hf_hub_url  # imported late: it takes a while, and serving does not need it

    return hf_hub_url(repo, path, revision=commit, endpoint=endpoint)


def _saved_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _list_files(wanted: HubSpec, endpoint: str, token: str | None) -> tuple[str, list[_HubFile]]:
    """(commit, files) of the repository. Raises PullError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=endpoint, token=token)
        info = api.model_info(wanted.repo, revision=wanted.revision, files_metadata=True, timeout=30.0)
    except Exception as error:  # the HTTP library beneath, and so its errors, differ between versions
        _refuse(wanted, endpoint, error)
    files = [
        _HubFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else None, item.blob_id)
        for item in info.siblings or ()
        if not {"", "..", "."} & set(item.rfilename.split("/"))
    ]
    commit = info.sha or wanted.revision or "main"
    return commit, files


def _refuse(wanted: HubSpec, endpoint: str, error: Exception) -> NoReturn:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    access = "set HF_TOKEN to a token that may read it"
    if isinstance(error, errors.GatedRepoError):
        raise PullError(f"{wanted.repo} is gated: accept its terms on {endpoint}/{wanted.repo} and {access}") from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise PullError(f"{wanted.repo} has no revision {wanted.revision}") from None
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        raise PullError(f"{endpoint} shows no repository {wanted.repo}; if it is private, {access}") from None
    if isinstance(error, errors.OfflineModeIsEnabled):
        raise PullError("HF_HUB_OFFLINE is set, so nothing can be pulled") from None
    if isinstance(error, errors.HFValidationError):
        raise PullError(f"{wanted.repo} is not a repository name") from None
    if status is not None:
        raise PullError(f"{endpoint} answered {status} for {wanted.repo}; try again later") from None
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise PullError(f"{endpoint} could not be asked for {wanted.repo}: {reason}") from None
