"""The commands as processes, against a real socket; what people see, and with which code it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peerd.scripted import Fail, Hang, Pending, ScriptedNode, Unserved, Wait, answering, says

TEXT = "One day a fox went out."
BIN = Path(sys.executable).parent


def environment(path: Path | None = None, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PEERD_", "XDG_"))}
    return kept | ({"PEERD_SOCKET": str(path)} if path else {}) | extra


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"cli.{name}", *arguments]


def run(
    arguments: list[str], path: Path | None = None, stdin: str = "", **extra: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, check=False, capture_output=True, text=True, input=stdin, env=environment(path, **extra), timeout=60
    )


@pytest.fixture
def node() -> ScriptedNode:
    return ScriptedNode(says(TEXT))


@pytest.fixture
def path(node: ScriptedNode, tmp_path: Path) -> Iterator[Path]:
    with answering(node, tmp_path / "run" / "s") as path:
        yield path


def test_generate_streams_the_answer(path: Path, node: ScriptedNode) -> None:
    done = run(command("peerctl", "generate", "Tell me a story about a fox."), path)
    assert (done.returncode, done.stdout, done.stderr) == (0, TEXT + "\n", "")
    request = node.decodes[0].request
    assert request.params.temperature == 0
    assert "Tell me a story" in node.codec.decode(request.prompt)


def test_generate_reads_standard_input(path: Path, node: ScriptedNode) -> None:
    assert run(command("peerctl", "generate"), path, stdin="Tell me about bees.").stdout == TEXT + "\n"
    assert run(command("peerctl", "generate", "-"), path, stdin="Tell me about bees.").stdout == TEXT + "\n"
    assert "about bees" in node.codec.decode(node.decodes[1].request.prompt)


def test_generate_passes_its_settings(path: Path, node: ScriptedNode) -> None:
    done = run(
        command(
            "peerctl", "generate", "x", "--model", "demo", "--max-tokens", "4", "--temperature", "0.7", "--top-p", "0.5",
            "--top-k", "3", "--seed", "9", "--stop", "zebra", "--raw",
        ),
        path,
    )  # fmt: skip
    assert done.returncode == 0
    request = node.decodes[0].request
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.seed, request.max_new_tokens) == (0.7, 0.5, 3, 9, 4)
    assert request.prompt == tuple(node.codec.encode("x"))


def test_generate_falls_back_to_plain_text_without_a_template(path: Path, node: ScriptedNode) -> None:
    from blocks.demo import MODEL_DIRECTORY
    from blocks.text import TextCodec

    node.codec = TextCodec({"tokenizer.json": (MODEL_DIRECTORY / "tokenizer.json").read_bytes()})
    done = run(command("peerctl", "generate", "Hello"), path)
    assert done.returncode == 0
    assert node.decodes[0].request.prompt == tuple(node.codec.encode("Hello"))


def test_generate_as_json_is_one_object(path: Path) -> None:
    done = run(command("peerctl", "generate", "Hello", "--json"), path)
    reply = json.loads(done.stdout)
    assert reply["choices"][0]["message"]["content"] == TEXT
    assert reply["peerd"]["route"][0]["span"] == "0:6"


def test_waiting_is_shown_on_standard_error(path: Path, node: ScriptedNode) -> None:
    node.script = [Wait("waiting", Pending("blocks 4:8 of demo are being loaded")), Hang()]
    process = subprocess.Popen(
        command("peerctl", "generate", "Hello"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment(path),
    )
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.readline() == b"waiting: blocks 4:8 of demo are being loaded\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert node.wait_until(lambda: node.decodes[0].cancelled, 1.0)


def test_interrupting_the_stream_is_clean(path: Path, node: ScriptedNode) -> None:
    node.script = [*says("One day a fox", end=False), Hang()]
    process = subprocess.Popen(
        command("peerctl", "generate", "Hello"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(path)
    )
    assert process.stdout is not None
    assert process.stdout.read(3) == b"One"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert node.wait_until(lambda: node.decodes[0].cancelled, 1.0)


def test_a_reader_that_leaves_is_clean(path: Path, node: ScriptedNode) -> None:
    node.script = says(TEXT * 40)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        command("peerctl", "generate", "Hello"), stderr=subprocess.PIPE, stdout=writing, env=environment(path)
    )
    os.close(writing)
    os.close(reading)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["generate", "Hello"], ["generate", "Hello", "--json"], ["status"], ["swarm"]])
def test_output_that_can_t_be_written_is_a_sentence_and_a_code(path: Path, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command("peerctl", *arguments),
            stdout=full, stderr=subprocess.PIPE, check=False, text=True, env=environment(path), timeout=60,
        )  # fmt: skip
    assert process.returncode == 9
    assert process.stderr.splitlines() == [
        f"peerctl {arguments[0]}: Can't write the output (No space left on device); send it to another place."
    ]


@pytest.mark.parametrize(("closed", "code"), [("<&-", 2), (">&-", 0), ("2>&-", 2), ("<&- >&- 2>&-", 2)])
def test_closed_standard_streams_are_empty_ones(path: Path, closed: str, code: int) -> None:
    # With standard output closed there is a prompt; else an empty standard input, which is refused.
    prompt = "Hello" if code == 0 else ""
    line = " ".join(command("peerctl", "generate", prompt)) + f" {closed}"
    done = run(["sh", "-c", line], path)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr


def test_a_terminal_doesn_t_obey_the_model(path: Path, node: ScriptedNode) -> None:
    node.script = says("a\x1b[2Jb")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command("peerctl", "generate", "Hello"), stdout=theirs, env=environment(path))
    assert process.wait(20) == 0
    os.close(theirs)
    shown = os.read(ours, 4096)
    os.close(ours)
    assert b"\x1b" not in shown
    assert b"a[2Jb" in shown


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ([Fail(Unserved("Nobody serves blocks 4:8 of demo."))], 50, "Nobody serves blocks 4:8"),
        ([*says("One", end=False), Fail(Unserved("Nobody serves blocks 4:8."))], 50, "Nobody serves"),
        ([Fail(None)], 1, "see its log"),
    ],
)
def test_failures_are_a_sentence_and_a_code(
    path: Path, node: ScriptedNode, steps: list[Fail], code: int, words: str
) -> None:
    node.script = list(steps)
    done = run(command("peerctl", "generate", "Hello"), path)
    assert done.returncode == code
    assert done.stderr.startswith("peerctl generate: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "x", "--model", "nope"], 40, "No model is called 'nope'"),
        (["generate", "x", "--max-tokens", "5000"], 60, "the context of demo is 1024"),
        (["generate", "x", "--temperature", "-1"], 2, "temperature"),
        (["generate", "x", "--top-k", "many"], 2, "--top-k"),
        (["generate", "   "], 2, "The prompt is empty"),
        (["generate", ""], 2, "The prompt is empty"),
        (["frobnicate"], 2, "there are adapters, "),
        (["status", "--frob"], 2, "--frob"),
    ],
)
def test_bad_input_is_a_sentence_and_a_code(path: Path, arguments: list[str], code: int, words: str) -> None:
    done = run(command("peerctl", *arguments), path)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_several_models_are_listed_when_none_is_named(path: Path, node: ScriptedNode) -> None:
    node.names = ("demo", "org/other")
    done = run(command("peerctl", "generate", "x"), path)
    assert done.returncode == 54
    assert "demo, org/other" in done.stderr


@pytest.mark.parametrize("name", ["status", "swarm", "generate"])
def test_without_a_daemon_there_is_advice(tmp_path: Path, name: str) -> None:
    done = run(command("peerctl", name, *(["x"] if name == "generate" else [])), tmp_path / "none")
    assert done.returncode == 3
    assert done.stderr == (
        f"peerctl {name}: Failed to connect to the daemon at {tmp_path}/none; is it running? Start it with `peerd start`.\n"
    )


def test_status_and_swarm_are_drawn(path: Path) -> None:
    status = run(command("peerctl", "status"), path).stdout
    assert "12D3KooWtest" in status
    assert "demo blocks 0:6, online" in status
    swarm = run(command("peerctl", "swarm"), path, COLUMNS="80", PYTHONIOENCODING="utf-8").stdout
    assert "██████······" in swarm
    assert "······▒▒····" in swarm
    assert "111111------" in swarm
    assert "nobody serves blocks 6:12" in swarm
    assert "######......" in run(command("peerctl", "swarm"), path, PYTHONIOENCODING="ascii").stdout


def test_status_and_swarm_as_json_are_the_daemons(path: Path) -> None:
    assert json.loads(run(command("peerctl", "status", "--json"), path).stdout)["models"][0]["span"] == "0:6"
    assert json.loads(run(command("peerctl", "swarm", "--json"), path).stdout)["models"][0]["blocks"] == 12


def test_the_socket_can_be_named_by_flag_and_by_state_directory(path: Path, tmp_path: Path) -> None:
    assert run(command("peerctl", "status", "--socket", str(path))).returncode == 0
    (tmp_path / "run" / "peerd.sock").symlink_to(path)
    assert run(command("peerctl", "status", "--state-dir", str(tmp_path)), Path("/nowhere")).returncode == 0


def test_stop_waits_for_the_process_to_end(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom tests.peerd.scripted import ScriptedNode, answering\n"
        "import threading\nstop = threading.Event()\n"
        "with answering(ScriptedNode(on_stop=stop.set), Path(sys.argv[1])):\n    print('up', flush=True)\n    stop.wait(30)\n"
        "print('bye', flush=True)\n"
    )
    socket_path = tmp_path / "run" / "s"
    daemon = subprocess.Popen(
        [sys.executable, "-c", script, str(socket_path)], stdout=subprocess.PIPE, env=environment()
    )
    assert daemon.stdout is not None
    with daemon.stdout:
        assert daemon.stdout.readline() == b"up\n"
        done = run(command("peerd", "stop"), socket_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"stopped (pid {daemon.pid})\n"
        assert daemon.wait(0.5) == 0  # it had ended when stop returned
    assert not socket_path.exists()


def test_stop_says_when_the_daemon_stays(path: Path, node: ScriptedNode) -> None:
    done = run(command("peerd", "stop", "--timeout", "0.05"), path)
    assert (done.returncode, node.stop_requests) == (6, 1)
    assert "still runs after 0.05 s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--join", "nonsense"], "peerd start: --join: 'nonsense' is no multiaddr"),
        (["--serve-blocks", "0:4"], "needs exactly one --model"),
        (["--frob"], "--frob"),
    ],
)
def test_start_refuses_bad_flags_before_anything_is_loaded(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(command("peerd", "start", "--state-dir", str(tmp_path / "state"), *arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "--help"], ["swarm", "--help"], ["--version"]])
def test_help_of_peerctl_loads_nothing_heavy(arguments: list[str]) -> None:
    assert_light("peerctl", arguments)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["start", "--help"], ["stop", "--help"], ["id", "--help"], ["demo", "--help"]]
)
def test_help_of_peerd_loads_nothing_heavy(arguments: list[str]) -> None:
    assert_light("peerd", arguments)


def assert_light(name: str, arguments: list[str]) -> None:
    script = (
        f"import sys, cli.{name} as command\nsys.argv = ['{name}', *sys.argv[1:]]\n"
        "try:\n    command.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'aiohttp', 'asyncio', 'numpy', 'rich', 'cryptography', 'prometheus_client'}\n"
        "sys.exit(f'loaded {sorted(heavy & set(sys.modules))}' if heavy & set(sys.modules) else 0)\n"
    )
    done = run([sys.executable, "-c", script, *arguments])
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.skipif(not (BIN / "peerctl").exists(), reason="not installed")
def test_the_console_scripts_are_installed() -> None:
    for name in ("peerd", "peerctl"):
        assert "COMMAND" in run([str(BIN / name), "--help"]).stdout


def test_a_daemon_that_dies_in_mid_answer_is_told(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with listener:
        process = subprocess.Popen(
            command("peerctl", "status"), stderr=subprocess.PIPE, env=environment(tmp_path / "s"), text=True
        )
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.close()
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 4
    assert "went away" in errors
