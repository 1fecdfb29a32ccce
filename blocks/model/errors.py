"""What can go wrong between a model's name and its running blocks: one sentence each, which says what to do."""

from __future__ import annotations

from overlay.errors import Blame, PeerdError


class ModelNotFound(PeerdError):
    """No such directory, hub model or revision."""

    code = "unknown-model"
    exit_code = 40
    http_status = 404
    retryable = False
    blame = Blame.USER


class BadModel(PeerdError):
    """The files are there, but damaged, incomplete or not what they claim to be."""

    code = "bad-model"
    exit_code = 41
    http_status = 422
    retryable = False
    blame = Blame.USER


class UnsupportedModel(PeerdError):
    """A sound model that can't be cut into exact spans, with the reason."""

    code = "unsupported-model"
    exit_code = 42
    http_status = 422
    retryable = False
    blame = Blame.USER


class DeviceMissing(PeerdError):
    """The device that was asked for isn't there, or the installed torch can't use it."""

    code = "no-device"
    exit_code = 15
    http_status = 503
    retryable = False
    blame = Blame.USER


class HubRefused(PeerdError):
    """The hub wants a token, or the token's owner has not been granted this model."""

    code = "hub-refused"
    exit_code = 43
    http_status = 403
    retryable = False
    blame = Blame.USER


class HubUnavailable(PeerdError):
    """The hub can't be reached, limits the rate, or answers with errors."""

    code = "hub-unavailable"
    exit_code = 44
    http_status = 503
    retryable = True
    blame = Blame.NETWORK


class DiskFull(PeerdError):
    """The shards don't fit on the disk."""

    code = "disk-full"
    exit_code = 45
    http_status = 507
    retryable = False
    blame = Blame.USER


class BadManifest(PeerdError):
    """A manifest, or something fetched by one, isn't what it says."""

    code = "bad-manifest"
    exit_code = 46
    http_status = 502
    retryable = True
    blame = Blame.PEER


class CacheFull(PeerdError):
    """A window would outgrow the cache that was agreed for its session."""

    code = "cache-full"
    exit_code = 47
    http_status = 400
    retryable = False
    blame = Blame.USER
