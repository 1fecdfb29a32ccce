"""The Hugging Face hub: a model id pinned to a commit, and only the whole shards that hold what is needed, verified.

Owns every call of `huggingface_hub` and the translation of what the hub refuses into sentences. Torch-free. Files land in
``HF_HOME`` as usual; shards are checked by the SHA-256 that the hub's own listing gave before anybody opens them. Nothing of a
repository is ever executed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.errors import HTTPError as TransportError
from huggingface_hub.utils import tqdm

from blocks.model.errors import BadModel, DiskFull, HubRefused, HubUnavailable, ModelNotFound
from blocks.model.limits import (
    FREE_DISK_MARGIN_BYTES,
    HUB_ATTEMPTS,
    HUB_RETRY_AFTER_S,
    HUB_TIMEOUT_S,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
)
from blocks.model.source import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    ModelSource,
    Progress,
    WeightFile,
    files_by_tensor,
    no_safetensors,
    read_json,
    sha256_of,
)
from blocks.text import TEXT_FILES

Result = TypeVar("Result")


class Hub:
    """One hub. Everything blocks on the network.

    Args:
        endpoint: its address; `huggingface_hub`'s own (``HF_ENDPOINT``) if None.
        token: an access token; the one that ``hf auth login`` stored, or ``HF_TOKEN``, if None.
        cache_dir: where files land; ``HF_HOME``'s if None.
        sleep: waits between attempts.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._token = token
        self._cache_dir = Path(cache_dir or constants.HF_HUB_CACHE)
        self._sleep = sleep
        self._api = HfApi(endpoint=endpoint, token=token)

    def resolve(self, spec: str) -> ModelSource:
        """Pin ``owner/name[@revision]`` and read its config, index and text files; no weights.

        Raises:
            ModelNotFound, BadModel, HubRefused, HubUnavailable.
        """
        name, _, revision = spec.partition("@")
        info = self._call(
            spec,
            lambda: self._api.model_info(name, revision=revision or None, files_metadata=True, timeout=HUB_TIMEOUT_S),
        )
        commit = str(info.sha)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        if CONFIG_FILE not in siblings:
            raise ModelNotFound(f"{spec} has no {CONFIG_FILE}: it is not a model that transformers can load.")
        directory = self._download(name, commit, CONFIG_FILE).parent
        config = read_json(directory / CONFIG_FILE, MAX_CONFIG_BYTES)
        tensors = self._tensors(name, commit, siblings)
        for text_file in TEXT_FILES:
            if text_file in siblings:
                self._download(name, commit, text_file)
        weights = tuple(self._weight_file(spec, siblings, file) for file in sorted(set(tensors.values())))
        return ModelSource("hub", name, directory, config, weights, tensors, commit)

    def _tensors(self, name: str, commit: str, siblings: dict[str, Any]) -> dict[str, str]:
        if INDEX_FILE in siblings:
            path = self._download(name, commit, INDEX_FILE)
            return files_by_tensor(read_json(path, MAX_INDEX_BYTES), f"{name}'s {INDEX_FILE}")
        if SINGLE_FILE not in siblings:
            raise no_safetensors(name, sorted(siblings))
        metadata = self._call(
            name, lambda: self._api.parse_safetensors_file_metadata(name, SINGLE_FILE, revision=commit)
        )
        return dict.fromkeys(sorted(metadata.tensors), SINGLE_FILE)

    def _weight_file(self, spec: str, siblings: dict[str, Any], file: str) -> WeightFile:
        sibling = siblings.get(file)
        digest = getattr(getattr(sibling, "lfs", None), "sha256", None)
        size = getattr(sibling, "size", None)
        if sibling is None or not isinstance(digest, str) or len(digest) != 64 or not isinstance(size, int):
            raise BadModel(f"The hub gives no digest for {file} of {spec}, so it can't be verified: use another copy.")
        return WeightFile(file, size, digest.lower())

    def fetch(self, source: ModelSource, tensors: Sequence[str], progress: Progress | None = None) -> None:
        """Download the whole shards that hold ``tensors``, those that aren't here yet, and verify each.

        Raises:
            DiskFull: before anything is downloaded.
            BadModel: a shard isn't what the hub's listing said; it is removed.
            HubRefused, HubUnavailable.
        """
        missing = [file for file in source.files_of(tuple(tensors)) if not self._is_here(source, file.name)]
        total = sum(file.size for file in missing)
        self._check_disk(source, total)
        done = 0
        for file in missing:
            path = self._download(source.name, str(source.revision), file.name, _bar(progress, done, total))
            if path.stat().st_size != file.size or sha256_of(path) != file.sha256:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise BadModel(
                    f"{file.name} of {source.name} arrived damaged and was removed: start again to fetch it."
                )
            done += file.size
            if progress:
                progress(done, total)

    def _is_here(self, source: ModelSource, file: str) -> bool:
        found = try_to_load_from_cache(source.name, file, cache_dir=self._cache_dir, revision=source.revision)
        return isinstance(found, str)

    def _check_disk(self, source: ModelSource, needed: int) -> None:
        place = self._cache_dir
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed and needed + FREE_DISK_MARGIN_BYTES > free:
            raise DiskFull(
                f"The shards of {source.name} need {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free: "
                "make room, set HF_HOME to another disk, or serve fewer blocks."
            )

    def _download(self, name: str, commit: str, file: str, bar: Any = None) -> Path:
        options: dict[str, Any] = {"tqdm_class": bar} if bar else {}

        def download() -> str:
            return str(
                hf_hub_download(
                    name, file, revision=commit, cache_dir=self._cache_dir, endpoint=self._endpoint,
                    token=self._token, etag_timeout=HUB_TIMEOUT_S, **options,
                )
            )  # fmt: skip

        return Path(self._call(name, download))

    def _call(self, what: str, request: Callable[[], Result]) -> Result:
        """Make a request; wait and repeat where the hub says that it is too busy; say the rest in words."""
        for attempt in range(1, HUB_ATTEMPTS + 1):
            try:
                return request()
            except HFValidationError as error:
                raise ModelNotFound(f"{what[:200]!r} is no hub id: write owner/name or owner/name@revision.") from error
            except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
                raise BadModel(f"The safetensors of {what} can't be read: {error}") from error
            except (HfHubHTTPError, TransportError, LocalEntryNotFoundError, OSError) as error:
                wait_s = _retry_after(error)
                if wait_s is None or attempt == HUB_ATTEMPTS:
                    raise _in_words(what, error) from error
            self._sleep(min(wait_s, HUB_RETRY_AFTER_S))
        raise HubUnavailable(f"The hub doesn't answer for {what}: try again later.")


def resolve_hub(spec: str) -> ModelSource:
    """`Hub.resolve` on the configured hub."""
    return Hub().resolve(spec)


def fetch(source: ModelSource, tensors: Sequence[str], progress: Progress | None = None) -> None:
    """`Hub.fetch` on the configured hub; nothing to do for a model that isn't the hub's."""
    if source.kind == "hub":
        Hub().fetch(source, tensors, progress)


def _cause(error: BaseException) -> BaseException:
    """What the hub really answered: downloads wrap it in a complaint about the local cache."""
    inner = error.__cause__
    return inner if isinstance(error, LocalEntryNotFoundError) and inner is not None else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: BaseException) -> float | None:
    """How long to wait before another attempt, None where that can't help."""
    cause = _cause(error)
    if _status(cause) not in (429, 503):
        return None
    text = str(cause.response.headers.get("Retry-After", "1")) if isinstance(cause, HfHubHTTPError) else "1"
    return float(text) if text.isdecimal() else 1.0


def _in_words(what: str, error: BaseException) -> Exception:
    cause = _cause(error)
    status = _status(cause)
    if isinstance(cause, GatedRepoError) or status == 403:
        return HubRefused(
            f"{what} is gated: accept its terms on its page at the hub, then run `hf auth login` or set HF_TOKEN."
        )
    if isinstance(cause, RevisionNotFoundError):
        return ModelNotFound(f"{what}: the model is there, but it has no such revision.")
    if status == 401 or isinstance(cause, RepositoryNotFoundError):
        return ModelNotFound(
            f"The hub knows no {what}, or it is private: check the name, and run `hf auth login` or set HF_TOKEN."
        )
    if isinstance(cause, EntryNotFoundError) or status == 404:
        return ModelNotFound(f"{what} lacks a file that its own listing names: try another revision.")
    if status == 429:
        return HubUnavailable(f"The hub limits how often it is asked, {what} included: wait a few minutes.")
    if status is not None:
        return HubUnavailable(f"The hub answered {status} for {what}: try again later.")
    return HubUnavailable(f"The hub can't be reached for {what}: check the network, or give a model directory.")


def _bar(progress: Progress | None, before: int, total: int) -> Any:
    """A progress bar class that draws nothing and reports bytes of all shards together."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._bytes = 0

        def update(self, n: float | None = 1) -> None:
            self._bytes += int(n or 0)
            if progress:
                progress(min(before + self._bytes, total), total)

    return Bar
