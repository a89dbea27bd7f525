"""Where a tuning run in the terminal works, and where its adapter goes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgellm.config import home_dir
from edgellm.errors import ConfigError, InvalidModelFileError, StorageError
from edgellm.models.describe import describe
from edgellm.models.files import copy_atomic, sha256_file, temporary_beside, write_atomic
from edgellm.models.names import is_name, slug
from edgellm.models.store import TUNED, AdapterStore, ModelStore, StoredModel
from edgellm.tune.curve import draw_curve, read_curve
from edgellm.tune.hashes import ModelHashes
from edgellm.tune.ownership import LOCK, Ownership
from edgellm.tune.places import FOLDER

_FORGOTTEN_S = 30 * 86_400
_NAME_CHARS_MAX = 100


class Workplace:
    """`home`/tuning/cli/KEY: one folder for each run, told apart by what it is told, its data and its model.

    It stays when the run is stopped, so that the same command goes on; those of 30 days ago are removed.
    """

    def __init__(self, facts: Mapping[str, object], home: Path | None = None) -> None:
        """`facts`: whatever makes another run of it."""
        text = json.dumps(facts, sort_keys=True)
        self._root = (home or home_dir()) / FOLDER / "cli"
        self.folder = self._root / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.state = self.folder / "state"
        self.adapter = self.folder / "adapter.gguf"
        self._ownership = Ownership(self.folder)

    def __enter__(self) -> Workplace:
        """Raises ConfigError if this very run is going on already, StorageError."""
        self._sweep()
        while True:
            if not self._ownership.acquire():
                raise ConfigError("this very run is going on in another process")
            if (self.folder / LOCK).exists():  # else its last holder removed it in the meantime
                break
            self._ownership.release()
        try:
            self.state.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self._ownership.release()
            raise StorageError(f"{self.state} cannot be made: {error.strerror or error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._ownership.release()

    def remove(self) -> None:
        """There is nothing to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self) -> None:
        before_s = time.time() - _FORGOTTEN_S
        for folder in list(self._root.iterdir()) if self._root.is_dir() else []:
            with contextlib.suppress(OSError, StorageError):
                if folder != self.folder and (folder / "state").stat().st_mtime < before_s:
                    _remove_idle(folder)


def _remove_idle(folder: Path) -> None:
    lock = Ownership(folder)
    if lock.acquire():
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def file_hashes(model: str, others: Iterable[str]) -> list[str]:
    """The SHA-256 of the model, all its parts, and of other files: dates and sizes may stay when content changes.

    Raises ConfigError for one that cannot be read.
    """
    found, path = [], model
    try:
        found.append(ModelHashes().sha256(Path(model)))
        for path in others:
            found.append(sha256_file(Path(path)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return found


@dataclass(frozen=True, slots=True)
class Target:
    """What the adapter is called, and its file: in the store, or `output`."""

    name: str
    output: Path | None = None

    @staticmethod
    def choose(model: StoredModel, data: Path, name: str | None, output: Path | None) -> Target:
        """Raises ConfigError for names that are none and for files that cannot, or must not, be written."""
        if output is not None:
            return Target(name or _slug(output.stem), _writable(output.expanduser()))
        if name is None:
            name = _slug(f"{model.name.rsplit('/', 1)[-1]}-{data.stem}")
        if not is_name(name) or "/" in name or len(name) > _NAME_CHARS_MAX:
            raise ConfigError(f"--name: {name!r} cannot name an adapter: use letters, digits and . _ -")
        if any(known.name == name.lower() for known in ModelStore().list()):
            raise ConfigError(f"--name: {name!r} is the name of a model")
        return Target(name.lower())

    @property
    def path(self) -> Path:
        """The adapter's file."""
        return self.output or AdapterStore().path_of(self.name)

    @property
    def metrics(self) -> Path:
        """The CSV beside it."""
        return self._beside(".csv")

    @property
    def picture(self) -> Path:
        """The SVG beside it."""
        return self._beside(".svg")

    def keep(self, adapter: Path, metrics: Path, model: StoredModel) -> None:
        """Puts the adapter in its place, its metrics and their picture beside it. Raises AdapterError, StorageError."""
        try:
            if self.output is None:
                AdapterStore().add(adapter, self.name, TUNED, model=model.name)
            else:
                copy_atomic(adapter, self.output, private=True)
            copy_atomic(metrics, self.metrics, private=True)
            curve = read_curve(metrics)
            if curve.train or curve.validation:
                write_atomic(self.picture, draw_curve(curve, f"{self.name}: loss of an answer's token").encode())
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def command(self, model: str | None) -> str:
        """What serves it, for a shell. `model`: as the user called it; None: the default."""
        adapter = self.name if self.output is None else f"{self.name}={self.output}"
        return shlex.join(["edgellm", "serve", *(["--model", model] if model else []), "--adapter", adapter])

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name.removesuffix(".gguf") + suffix)


def _slug(text: str) -> str:
    try:
        return slug(text.replace("/", "-"))[:_NAME_CHARS_MAX].rstrip("._+-")
    except ValueError:
        raise ConfigError(f"no name can be made of {text!r}: use --name") from None


def _writable(path: Path) -> Path:
    """`path`, if an adapter may be written there: better told now than after hours."""
    if not path.name.endswith(".gguf"):
        raise ConfigError(f"--output: {path} should end in .gguf")
    try:
        if path.exists() and not describe(path).is_adapter:
            raise ConfigError(f"--output: {path} is there already, and is no adapter")
        with temporary_beside(path, make_folders=False):
            return path.absolute()
    except (OSError, InvalidModelFileError) as error:
        raise ConfigError(f"--output: {path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
