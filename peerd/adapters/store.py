"""The adapters of this node: names to directories under the state directory.

Owns that a name is safe, that an adapter is there whole or not at all, and what is listed. What the files say is `directory`'s. Blocks
on the disk: call it off the loop.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlay.rpc.types import Part
from peerd.adapters.adapter import Adapter, ModelShape
from peerd.adapters.directory import CONFIG, OURS, PICKLE, TENSORS, Files, read_adapter, write_adapter
from peerd.adapters.errors import AdapterExists, AdapterNotSaved, BadAdapter, UnknownAdapter
from peerd.adapters.limits import ADAPTERS_LISTED_MAX, CONFIG_BYTES_MAX, NAME_CHARS_MAX, TENSORS_BYTES_MAX
from peerd.durable import sync_directory, write_synced

_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}")
_NEW, _OLD, _GONE = ".new", ".old", ".gone"
"""Ends of directories that a save or a removal has under way; with the dot in front, no name of an adapter."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter as it is listed; ``problem`` says why it can't be used, and the rest is then unknown."""

    name: str
    size_bytes: int
    kind: str = ""
    model_id: str = ""
    model_name: str = ""
    length: int = 0
    problem: str = ""


class AdapterStore:
    """See the module."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def recover(self) -> None:
        """Make good what a crash left, before anything else is asked of the store.

        A replacement that was cut off between its two renames gives the former adapter its name back; all else is cleared away.
        """
        if not self._directory.is_dir():
            return
        try:
            found = sorted(self._directory.iterdir())
        except OSError:  # told to whoever asks for an adapter
            return
        for aside in found:
            name = aside.stem.removeprefix(".")
            if not aside.name.startswith(".") or aside.suffix not in (_NEW, _OLD, _GONE) or not _NAME.fullmatch(name):
                continue
            if aside.suffix == _OLD and not (self._directory / name).exists():
                with contextlib.suppress(OSError):  # tried again at the next start
                    aside.rename(self._directory / name)
            else:
                shutil.rmtree(aside, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether the name is taken."""
        return bool(_NAME.fullmatch(name)) and (self._directory / name).is_dir()

    def load(self, name: str) -> Adapter:
        """Read and check one. Raises UnknownAdapter, BadAdapter."""
        path = self._path(name)
        return read_adapter(name, _read(name, path))

    def list(self) -> tuple[AdapterInfo, ...]:
        """All of them, in the order of their names."""
        if not self._directory.is_dir():
            return ()
        names = sorted(path.name for path in self._directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
        return tuple(self._info(name) for name in names[:ADAPTERS_LISTED_MAX])

    def info(self, name: str) -> AdapterInfo:
        """One of them. Raises UnknownAdapter."""
        self._path(name)
        return self._info(name)

    def remove(self, name: str) -> None:
        """Delete one. Raises UnknownAdapter, AdapterNotSaved."""
        path = self._path(name)
        gone = self._directory / f".{name}{_GONE}"
        try:
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)  # at once, whatever becomes of the files
            shutil.rmtree(gone)
        except OSError as error:
            raise AdapterNotSaved(f"The adapter {name} can't be removed ({error.strerror}).") from error

    def save_prompt(
        self, name: str, model: ModelShape, prefix: Part, trained: Mapping[str, Any], *, replace: bool = False
    ) -> None:
        """Keep a ``prompt``: ``prefix`` is (length, d_embedding).

        Raises:
            BadAdapter: the name or the values can't be. AdapterExists: the name is taken, and ``replace`` is not set.
            AdapterNotSaved: the disk refused; what was there before is whole.
        """
        self._save(name, write_adapter(_checked(name), model, prefix, None, trained), replace)

    def save_deep_prompt(
        self,
        name: str,
        model: ModelShape,
        prefix: Part | None,
        prompts: Part,
        trained: Mapping[str, Any],
        *,
        replace: bool = False,
    ) -> None:
        """Keep a ``deep-prompt``: ``prompts`` is (blocks, length, d_model), ``prefix`` (length, d_embedding). Raises as `save_prompt`."""
        self._save(name, write_adapter(_checked(name), model, prefix, prompts, trained), replace)

    def _path(self, name: str) -> Path:
        if not self.has(name):
            raise UnknownAdapter(
                f"There is no adapter {name[:NAME_CHARS_MAX]!r}; `peerctl adapters` lists those there are."
            )
        return self._directory / name

    def _info(self, name: str) -> AdapterInfo:
        path = self._directory / name
        size_bytes = 0
        try:
            size_bytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            adapter = self.load(name)
        except OSError as error:
            return AdapterInfo(name, size_bytes, problem=f"The adapter {name} can't be read ({error.strerror}).")
        except (BadAdapter, UnknownAdapter) as error:
            return AdapterInfo(name, size_bytes, problem=str(error))
        rows = adapter.length or (0 if adapter.prompts is None else adapter.prompts.shape[1])
        return AdapterInfo(name, size_bytes, adapter.kind, adapter.model_id, adapter.model_name, rows)

    def _save(self, name: str, files: Files, replace: bool) -> None:
        final = self._directory / name
        new, old = self._directory / f".{name}{_NEW}", self._directory / f".{name}{_OLD}"
        if final.exists() and not replace:
            raise AdapterExists(
                f"There is an adapter {name!r} already; choose another name, or `peerctl adapters remove {name}`."
            )
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for aside in (new, old):
                shutil.rmtree(aside, ignore_errors=True)
            new.mkdir(mode=0o700)
            for file, data in ((TENSORS, files.tensors), (OURS, files.ours), (CONFIG, files.config)):
                write_synced(new / file, data or b"")
            sync_directory(new)
            if final.exists():
                final.rename(old)
            new.rename(final)
            sync_directory(self._directory)
        except OSError as error:
            if old.exists() and not final.exists():
                old.rename(final)
            shutil.rmtree(new, ignore_errors=True)
            raise AdapterNotSaved(
                f"The adapter {name} can't be written to {self._directory} ({error.strerror}); free some space and save it again."
            ) from error
        shutil.rmtree(old, ignore_errors=True)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BadAdapter(
            f"{name[:NAME_CHARS_MAX]!r} can't be the name of an adapter: use a to z, 0 to 9, and inside it . _ -; at most "
            f"{NAME_CHARS_MAX} characters."
        )
    return name


def _read(name: str, path: Path) -> Files:
    def data(file: str, most: int) -> bytes | None:
        try:
            with open(path / file, "rb") as opened:
                found = opened.read(most + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadAdapter(f"The {file} of the adapter {name} can't be read ({error.strerror}).") from error
        if len(found) > most:
            raise BadAdapter(f"The {file} of the adapter {name} is over {most >> 20} MiB.")
        return found

    config, ours = data(CONFIG, CONFIG_BYTES_MAX), data(OURS, CONFIG_BYTES_MAX)
    return Files(config, data(TENSORS, TENSORS_BYTES_MAX), ours, (path / PICKLE).exists())
