"""Flags, variables and the file: what is understood, what is refused, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peerd.config import Config, ConfigError, load, state_directory
from routing.types import Span

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
JOIN = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"
HOME = {"HOME": "/nowhere"}


def loaded(*arguments: str, **environment: str) -> Config:
    return load(arguments, HOME | environment)


def test_nothing_given_is_auto_on_everything() -> None:
    config = loaded()
    assert config.serving.blocks == "auto"
    assert config.serving.models == ()
    assert (config.serving.device, config.serving.dtype, config.serving.quant) == ("auto", "auto", "none")
    assert config.network.join == ()
    assert config.network.listen == ()
    assert config.log_level == "info"
    assert config.paths.state_dir == Path("/nowhere/.local/state/peerd")
    assert config.paths.socket == Path("/nowhere/.local/state/peerd/run/peerd.sock")


def test_every_flag_is_understood() -> None:
    config = loaded(
        "--model", "demo", "--model", "org/name", "--serve-blocks", "none", "--join", JOIN, "--listen", "/ip4/0.0.0.0/tcp/0",
        "--state-dir", "/d", "--device", "cuda:0", "--dtype", "bfloat16", "--quant", "int8", "--max-memory", "6GB",
        "--max-blocks", "3", "--log-level", "debug", "--torch-threads", "2",
    )  # fmt: skip
    assert config.serving.models == ("demo", "org/name")
    assert config.serving.blocks == "none"
    assert config.network.join == (JOIN,)
    assert config.network.listen == ("/ip4/0.0.0.0/tcp/0",)
    assert config.paths.socket == Path("/d/run/peerd.sock")
    assert (config.serving.device, config.serving.dtype, config.serving.quant) == ("cuda:0", "bfloat16", "int8")
    assert (config.serving.max_memory_bytes, config.serving.max_blocks, config.serving.torch_threads) == (
        6 * 10**9,
        3,
        2,
    )
    assert config.log_level == "debug"


def test_every_flag_is_a_variable_too() -> None:
    config = loaded(
        PEERD_MODEL="demo", PEERD_SERVE_BLOCKS="4:8", PEERD_JOIN=f"{JOIN}, /dns4/example.org/tcp/1/p2p/{PEER}",
        PEERD_SOCKET="/s/sock", PEERD_MAX_MEMORY="512MiB", PEERD_LOG_LEVEL="WARNING",
    )  # fmt: skip
    assert config.serving.models == ("demo",)
    assert config.serving.blocks == Span(4, 8)
    assert len(config.network.join) == 2
    assert config.paths.socket == Path("/s/sock")
    assert config.serving.max_memory_bytes == 512 << 20
    assert config.log_level == "warning"


def test_a_flag_goes_before_a_variable_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('dtype = "float16"\nquant = "nf4"\nserve-blocks = "none"\nmax_blocks = 4\nmodel = ["a/b", "c/d"]\n')
    config = loaded("--dtype", "float32", "--config", str(file), PEERD_DTYPE="bfloat16", PEERD_QUANT="int8")
    assert (config.serving.dtype, config.serving.quant, config.serving.blocks) == ("float32", "int8", "none")
    assert config.serving.max_blocks == 4
    assert config.serving.models == ("a/b", "c/d")


def test_the_users_own_file_is_read_when_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "peerd").mkdir()
    (tmp_path / "peerd" / "config.toml").write_text('log_level = "error"')
    assert loaded(XDG_CONFIG_HOME=str(tmp_path)).log_level == "error"


def test_a_given_state_directory_keeps_its_socket_to_itself() -> None:
    assert loaded("--state-dir", "/d", PEERD_SOCKET="/e/s").paths.socket == Path("/d/run/peerd.sock")
    assert loaded("--state-dir", "/d", "--socket", "/f/s").paths.socket == Path("/f/s")
    assert loaded("--state-dir", "/d", XDG_RUNTIME_DIR="/run/user/1").paths.socket == Path("/d/run/peerd.sock")
    assert loaded(XDG_RUNTIME_DIR="/run/user/1").paths.socket == Path("/run/user/1/peerd/peerd.sock")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--join", "nonsense"], "--join: 'nonsense' is no multiaddr"),
        (["--join", "/ip4/1.2.3.4/tcp/99999"], "bad tcp"),
        (["--join", "/ip4/1.2.3.4/tcp/1/p2p/xyz"], "bad p2p"),
        (["--join", "/ip4/1.2.3.4/udp/1"], "is no TCP address"),
        (["--listen", "4001"], "--listen: '4001' is no multiaddr"),
        (["--serve-blocks", "4-8"], "write auto, none or a span"),
        (["--serve-blocks", "8:4", "--model", "demo"], "write auto, none or a span"),
        (["--serve-blocks", "0:4"], "needs exactly one --model"),
        (["--serve-blocks", "0:4", "--model", "a", "--model", "b"], "needs exactly one --model"),
        (["--model", ""], "must not be empty"),
        (["--device", "tpu"], "write auto, cpu or cuda:0"),
        (["--dtype", "int4"], "not one of auto, float32"),
        (["--quant", "int3"], "not one of none, int8, nf4"),
        (["--max-memory", "lots"], "--max-memory: "),
        (["--max-memory", "0GB"], "--max-memory: "),
        (["--max-blocks", "0"], "whole number from 1"),
        (["--max-blocks", "-3"], "whole number from 1"),
        (["--log-level", "loud"], "not one of debug"),
        (["--state-dir", "/" + "x" * 120], "give a shorter one with --socket"),
        (["--config", "/nowhere/c.toml"], "Can't read /nowhere/c.toml"),
    ],
)  # fmt: skip
def test_what_can_t_be_meant_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(*arguments)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_an_unknown_variable_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="no variable PEERD_MAX_MEMROY; did you mean PEERD_MAX_MEMORY"):
        loaded(PEERD_MAX_MEMROY="6GB")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("serve_block = 'auto'", "there is no option 'serve_block'; did you mean serve_blocks"),
        ("dtype = true", "must be text or a whole number"),
        ("dtype = 'float8'", "dtype: 'float8' is not one of"),
        ("join = [{}]", "must be text"),
        ("= nonsense", "is not TOML"),
        ("[peerd]\nx = 1", "there is no option 'peerd'"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        loaded("--config", str(file))
    assert words in str(caught.value)


def test_an_unknown_flag_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        loaded("--modle", "demo")
    assert caught.value.code == 2
    assert "--modle" in capsys.readouterr().err


def test_the_state_directory_alone_is_found() -> None:
    assert state_directory(None, HOME) == Path("/nowhere/.local/state/peerd")
    assert state_directory("/d", HOME) == Path("/d")


def test_the_configuration_loads_nothing_heavy() -> None:
    script = (
        "import sys, peerd.config\n"
        "peerd.config.load(['--join', sys.argv[1]], {'HOME': '/'})\n"
        "heavy = [m for m in ('torch', 'aiohttp', 'prometheus_client', 'numpy', 'rich') if m in sys.modules]\n"
        "sys.exit(f'{heavy} loaded' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, JOIN], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
