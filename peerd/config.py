"""What a daemon is told: flags, ``PEERD_*`` variables and an optional TOML file, checked once and frozen.

Owns every option's name, form and sentence of refusal, and is the one file that reads the environment. Light: no torch, no HTTP, no
tokenizer, since `peerd start` checks its flags here before the daemon's imports begin. A flag goes before a variable, a variable
before the file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overlay.errors import Blame, InvalidAddress, PeerdError
from peerd.client import locate
from routing.types import Span

DEVICE_PATTERN = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTS = ("none", "int8", "nf4")
LOG_LEVELS = ("debug", "info", "warning", "error")
ADDRESSES_MAX = 64
MODELS_MAX = 64
MAX_BLOCKS_MAX = 4096
TORCH_THREADS_MAX = 1024
CONFIG_FILE_BYTES_MAX = 1 << 20
SOCKET_PATH_BYTES_MAX = 103 if sys.platform == "darwin" else 107

AUTO = "auto"
NONE = "none"


class ConfigError(PeerdError):
    """An option that can't be meant; the sentence names it and says what can."""

    code = "bad-config"
    exit_code = 2
    http_status = 400
    blame = Blame.USER


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the daemon keeps its state, and where it answers."""

    state_dir: Path
    socket: Path


@dataclass(frozen=True, slots=True)
class Network:
    """Whom to join and where to listen. Empty ``listen``: all interfaces, on a port chosen once and kept."""

    join: tuple[str, ...] = ()
    listen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve, and with how much of the machine.

    Attributes:
        models: as given: ``demo``, a directory or a hub id. Empty: what the network needs most.
        blocks: `AUTO`, `NONE` or a span.
        max_memory_bytes: None: from the free memory.
        max_blocks: None: as many as fit.
        torch_threads: None: torch's own choice.
    """

    models: tuple[str, ...] = ()
    blocks: str | Span = AUTO
    device: str = "auto"
    dtype: str = "auto"
    quant: str = "none"
    max_memory_bytes: int | None = None
    max_blocks: int | None = None
    torch_threads: int | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that `peerd start` was told."""

    paths: Paths
    network: Network = Network()
    serving: Serving = Serving()
    log_level: str = "info"
    stop_with_stdin: bool = False


@dataclass(frozen=True, slots=True)
class _Option:
    """One option: its flag without dashes, how its text becomes a value, and what help says."""

    name: str
    parse: Callable[[str], Any]
    metavar: str
    description: str
    many: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return "PEERD_" + self.key.upper()


def _memory(text: str) -> int:
    from blocks.sizing import InvalidSize, parse_size

    try:
        size = parse_size(text)
    except InvalidSize as error:
        raise ConfigError(str(error)) from error
    if size == 0:
        raise ConfigError(f"{text[:40]!r} is no memory at all; to serve nothing, write --serve-blocks none.")
    return size


def parse_address(text: str) -> str:
    """A multiaddr that can be dialled or listened on. Raises ConfigError."""
    from overlay.multiaddr import Multiaddr

    try:
        address = Multiaddr.parse(text)
    except InvalidAddress as error:
        raise ConfigError(str(error)) from error
    if not address.is_tcp:
        raise ConfigError(f"{text[:80]!r} is no TCP address; write it like /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...")
    return str(address)


def parse_blocks(text: str) -> str | Span:
    """``auto``, ``none`` or ``a:b``. Raises ConfigError."""
    if text in (AUTO, NONE):
        return text
    try:
        return Span.parse(text)
    except ValueError as error:
        raise ConfigError(f"{text[:40]!r} are no blocks to serve; write auto, none or a span like 0:4.") from error


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ConfigError(f"{text[:40]!r} is not one of {', '.join(allowed)}.")
        return text.lower()

    return parse


def _device(text: str) -> str:
    if not DEVICE_PATTERN.fullmatch(text):
        raise ConfigError(f"{text[:40]!r} is no device; write auto, cpu or cuda:0.")
    return text


def _count(limit: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= limit:
            raise ConfigError(f"{text[:40]!r} is no whole number from 1 to {limit}.")
        return int(text)

    return parse


def _text(text: str) -> str:
    if not text or "\0" in text:
        raise ConfigError("it must not be empty.")
    return text


_OPTIONS = (
    _Option("model", _text, "MODEL", "a model to serve: demo, a directory or a hub id; without it, what the network needs most", True),
    _Option("serve-blocks", parse_blocks, "BLOCKS", "which blocks to serve: auto (default), none, or a span like 0:4"),
    _Option("join", parse_address, "MULTIADDR", "a peer of the network to join, as its `ready` line says", True),
    _Option("listen", parse_address, "MULTIADDR", "where to listen; default: all interfaces, on a port chosen once and kept", True),
    _Option("state-dir", _text, "DIR", "where identity and state are kept; the socket goes there, too"),
    _Option("socket", _text, "PATH", "the local API's Unix socket, in a directory that is only yours"),
    _Option("device", _device, "DEVICE", "auto (default), cpu or cuda:0"),
    _Option("dtype", _one_of(*DTYPES), "DTYPE", f"{', '.join(DTYPES)}; auto follows the model's other servers"),
    _Option("quant", _one_of(*QUANTS), "QUANT", f"{', '.join(QUANTS)}"),
    _Option("max-memory", _memory, "SIZE", "how much memory blocks may take, like 6GB"),
    _Option("max-blocks", _count(MAX_BLOCKS_MAX), "N", "how many blocks to serve at most"),
    _Option("torch-threads", _count(TORCH_THREADS_MAX), "N", "threads for computing; default: torch's own choice"),
    _Option("log-level", _one_of(*LOG_LEVELS), "LEVEL", f"{', '.join(LOG_LEVELS)} (default info)"),
)  # fmt: skip
_CONFIG_VARIABLE = "PEERD_CONFIG"
STOP_WITH_STDIN = "--stop-with-stdin"
"""A flag only: as a variable or a key it would end daemons whose standard input nobody holds."""


def start_parser(prog: str = "peerd start") -> argparse.ArgumentParser:
    """The flags of `peerd start`; values stay text until `load`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run the daemon in the foreground: join a network, serve blocks, answer on the local socket.",
        epilog="Every flag can also be given as a variable: --max-memory as PEERD_MAX_MEMORY; lists are separated by commas.",
        allow_abbrev=False,
    )
    for option in _OPTIONS:
        action = "append" if option.many else "store"
        text = option.description + (" (repeatable)" if option.many else "")
        parser.add_argument(f"--{option.name}", action=action, metavar=option.metavar, help=text)
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file with the same names (default: the user's, if it is there)"
    )
    parser.add_argument(
        STOP_WITH_STDIN,
        action="store_true",
        help="stop at once when standard input ends, so that the program at its other end can't leave daemons behind",
    )
    return parser


def load(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Config:
    """The configuration from the flags after `peerd start`, the environment and the TOML file.

    Raises:
        ConfigError: one sentence about the first thing that is wrong.
        SystemExit: argparse's own, for unknown flags and ``--help``.
    """
    environment = os.environ if environment is None else environment
    flags = vars(start_parser().parse_args(arguments))
    stop_with_stdin = bool(flags.pop("stop_with_stdin"))
    values: dict[str, Any] = {}
    values |= _from_file(_config_file(flags.pop("config"), environment))
    values |= _from_environment(environment)
    values |= {
        option.key: _parsed(option, given, f"--{option.name}")
        for option in _OPTIONS
        if (given := flags[option.key]) is not None
    }
    if flags["state_dir"] is not None and flags["socket"] is None:
        values.pop("socket", None)  # a state directory that was given keeps its socket to itself
    return replace(_assemble(values, environment), stop_with_stdin=stop_with_stdin)


def user_environment() -> Mapping[str, str]:
    """The environment, for the commands' own few needs."""
    return os.environ


def state_directory(given: str | None = None, environment: Mapping[str, str] | None = None) -> Path:
    """Where state is kept, for commands that need nothing else."""
    return Path(locate.state_directory(os.environ if environment is None else environment, given)).absolute()


def _assemble(values: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    serving = Serving(
        models=tuple(dict.fromkeys(values.get("model", ()))),
        blocks=values.get("serve_blocks", AUTO),
        device=values.get("device", "auto"),
        dtype=values.get("dtype", "auto"),
        quant=values.get("quant", "none"),
        max_memory_bytes=values.get("max_memory"),
        max_blocks=values.get("max_blocks"),
        torch_threads=values.get("torch_threads"),
    )
    network = Network(
        join=tuple(dict.fromkeys(values.get("join", ()))), listen=tuple(dict.fromkeys(values.get("listen", ())))
    )
    if isinstance(serving.blocks, Span) and len(serving.models) != 1:
        raise ConfigError(
            f"--serve-blocks {serving.blocks} needs exactly one --model, so that it's clear whose blocks."
        )
    if len(serving.models) > MODELS_MAX or max(len(network.join), len(network.listen)) > ADDRESSES_MAX:
        raise ConfigError(f"At most {MODELS_MAX} models and {ADDRESSES_MAX} addresses can be given.")
    return Config(_paths(values, environment), network, serving, values.get("log_level", "info"))


def _paths(values: Mapping[str, Any], environment: Mapping[str, str]) -> Paths:
    state_dir = Path(locate.state_directory(environment, values.get("state_dir"))).absolute()
    socket = Path(locate.socket_path(environment, values.get("state_dir"), values.get("socket"))).absolute()
    length = len(os.fsencode(socket))
    if length > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"The socket path {socket} has {length} bytes and this system allows {SOCKET_PATH_BYTES_MAX}; "
            "give a shorter one with --socket."
        )
    return Paths(state_dir, socket)


def _parsed(option: _Option, given: object, source: str) -> Any:
    """One option's value from text (or, from TOML, plain values), with its source named in a refusal."""
    if option.many:
        texts = given if isinstance(given, list) else [given]
        return tuple(_parsed_one(option, text, source) for text in texts)
    return _parsed_one(option, given, source)


def _parsed_one(option: _Option, given: object, source: str) -> Any:
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if not isinstance(given, str):
        raise ConfigError(f"{source}: {str(given)[:40]!r} must be text or a whole number.")
    try:
        return option.parse(given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known = {option.variable: option for option in _OPTIONS}
    values: dict[str, Any] = {}
    for variable in sorted(environment):
        text = environment[variable]
        if not variable.startswith("PEERD_") or variable == _CONFIG_VARIABLE or not text:
            continue
        option = known.get(variable)
        if option is None:
            raise ConfigError(
                f"There is no variable {variable[:80]}{_suggestion(variable, (*known, _CONFIG_VARIABLE))}"
            )
        given = [part.strip() for part in text.split(",") if part.strip()] if option.many else text
        values[option.key] = _parsed(option, given, variable)
    return values


def _config_file(flag: str | None, environment: Mapping[str, str]) -> Path | None:
    """The file that was named, which has to be there, or the user's own, if it is."""
    named = flag or environment.get(_CONFIG_VARIABLE)
    if named:
        return Path(named)
    base = environment.get("XDG_CONFIG_HOME", "")
    home = environment.get("HOME", "/")
    usual = Path(base if base.startswith("/") else f"{home}/.config", "peerd", "config.toml")
    return usual if usual.is_file() else None


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import tomllib

    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_FILE_BYTES_MAX + 1)
        if len(data) > CONFIG_FILE_BYTES_MAX:
            raise ConfigError(f"{path} is over {CONFIG_FILE_BYTES_MAX >> 20} MiB; that is no configuration.")
        document = tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigError(f"Can't read {path} ({error.strerror}); check --config.") from error
    except ValueError as error:  # TOML's and UTF-8's own
        raise ConfigError(f"{path} is not TOML: {error!s:.120}.") from error
    known = {option.key: option for option in _OPTIONS}
    values: dict[str, Any] = {}
    for key, given in document.items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            raise ConfigError(f"{path}: there is no option {key[:80]!r}{_suggestion(key, tuple(known))}")
        values[option.key] = _parsed(option, given, f"{path}: {key}")
    return values


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else "; see `peerd start --help`."
