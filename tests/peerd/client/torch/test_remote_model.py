"""The torch client against real daemons: everything that a local `transformers` model gives, for three families, in float32.

Two servers hold every block of every model, and a third daemon that has none of their files is asked, so that all numbers come over the
wire. Starting daemons is what costs, so one swarm serves the whole module; the last test kills a server.
"""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

from peerd.client import ApiError, Client
from peerd.client.torch import RemoteModelForCausalLM
from peerd.loopback import Daemon, running, start_daemon
from tests.e2e.processes import span_of, wait_until
from tests.models import make_tiny
from tests.peerd.in_process import LocalDaemon, daemon

FAMILIES = ("llama", "gpt2", "bloom")
BLOCKS = 4
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
PAD = 0

pytestmark = pytest.mark.timeout(240)


@dataclass
class Swarm:
    """Two servers of all models, the second a process, and a client's daemon."""

    models: dict[str, Path]
    first: LocalDaemon
    second: Daemon
    client: LocalDaemon

    def replicas(self, name: str) -> list[int]:
        """How many servers each block of a model has online, as the client's daemon sees it."""
        found = [entry for entry in self.client.client.swarm()["models"] if entry["name"] == name]
        spans = [span_of(server) for entry in found for server in entry["servers"] if server["state"] == "online"]
        return [sum(start <= block < end for start, end in spans) for block in range(BLOCKS)]

    def wait_sessions(self, count: int) -> None:
        """Until the servers hold KV for as many sessions: freeing them is told, not waited for."""
        servers = (self.first.socket_path, self.second.socket_path)
        wait_until(lambda: sum(figure(server, "sessions_served") for server in servers) == count, 10.0)


def figure(socket_path: Path, name: str) -> float:
    """One of a daemon's metrics."""
    matched = re.search(rf"^peerd_{name} (\S+)", Client(socket_path).metrics(), re.MULTILINE)
    assert matched is not None
    return float(matched.group(1))


@dataclass
class Pair:
    """A model here, and the same through the swarm."""

    local: Any
    remote: Any

    @property
    def width(self) -> int:
        return int(self.local.config.hidden_size)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.local.get_input_embeddings()(ids).detach()


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    directory = tmp_path_factory.mktemp("torch")
    models = {family: make_tiny(family, directory / f"little-{family}") for family in FAMILIES}
    served = [word for path in models.values() for word in ("--model", str(path))]
    with ExitStack() as stack:
        first = stack.enter_context(daemon(directory / "one", *served))
        join = ("--join", first.join_address)
        client = stack.enter_context(daemon(directory / "client", "--serve-blocks", "none", *join))
        wait_until(lambda: online(client) == len(FAMILIES))
        # What the first server found out about the families need not be found out twice.
        shutil.copytree(directory / "one" / "cache", directory / "two" / "cache")
        second = start_daemon("two", directory, *served, *join)
        stack.enter_context(running([second]))
        second.wait_ready()
        made = Swarm(models, first, second, client)
        wait_until(lambda: all(made.replicas(path.name) == [2] * BLOCKS for path in models.values()))
        yield made
    assert "Traceback" not in second.log_path.read_text(), second.log_tail(60)


def online(daemon: LocalDaemon) -> int:
    """How many servers' spans are online."""
    return sum(server["state"] == "online" for entry in daemon.client.swarm()["models"] for server in entry["servers"])


@pytest.fixture(scope="module")
def pairs(swarm: Swarm) -> dict[str, Pair]:
    socket = swarm.client.socket_path
    made = {}
    for family, path in swarm.models.items():
        local = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
        made[family] = Pair(local, RemoteModelForCausalLM.from_pretrained(str(path), socket=socket))
    return made


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    torch.manual_seed(1)
    return pairs[request.param]


def same_gradients(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal, and not both nothing."""
    assert found is not None and expected is not None and expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, **CLOSE)


def ragged(rows: int = 3, columns: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask of left padding, as a tokenizer makes it."""
    ids = torch.randint(1, 256, (rows, columns))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def test_the_model_is_one_of_its_own_class_without_blocks_here(pair: Pair) -> None:
    assert isinstance(pair.remote, RemoteModelForCausalLM)
    assert isinstance(pair.remote, type(pair.local))
    here = sum(parameter.numel() for parameter in pair.remote.parameters())
    assert here < sum(parameter.numel() for parameter in pair.local.parameters()) / 2
    assert len(pair.remote.blocks) == BLOCKS


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_and_loss_are_the_local_model_s(pair: Pair, padding: str) -> None:
    ids, mask = ragged()
    if padding == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    given = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    if padding != "none":
        given["attention_mask"] = mask
    expected, found = pair.local(**given), pair.remote(**given)
    real = mask.bool() if padding != "none" else torch.ones_like(mask).bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    assert found.past_key_values is None  # sessions are made only when asked for


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # bloom has none
def test_position_ids_reach_the_servers(pairs: dict[str, Pair], family: str) -> None:
    pair = pairs[family]
    ids, mask = ragged()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    real = mask.bool()
    torch.testing.assert_close(pair.remote(**given).logits[real], pair.local(**given).logits[real], **CLOSE)


def test_hidden_states_of_every_layer_are_the_local_model_s(pair: Pair) -> None:
    ids, mask = ragged()
    expected = pair.local(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    found = pair.remote(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    real = mask.bool()
    assert len(found) == len(expected) == BLOCKS + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[real], other[real], **CLOSE)


def test_a_hook_on_a_block_sees_what_it_would_locally(pair: Pair) -> None:
    ids, _ = ragged()
    seen: dict[str, list[torch.Tensor]] = {"local": [], "remote": []}
    hooks = []
    for name, model in (("local", pair.local), ("remote", pair.remote)):
        block = pair.remote._anatomy.blocks[2] if name == "remote" else blocks_of(model)[2]

        def note(_: Any, arguments: Any, output: Any, name: str = name) -> None:
            seen[name] += [arguments[0], output[0] if isinstance(output, tuple) else output]

        hooks.append(block.register_forward_hook(note))
        model(ids)
    for hook in hooks:
        hook.remove()
    for one, other in zip(seen["remote"], seen["local"], strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def blocks_of(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith((".h", ".layers")))


def test_gradients_of_inputs_are_the_local_model_s(pair: Pair) -> None:
    ids, mask = ragged()
    gradients = []
    for model in (pair.local, pair.remote):
        embeds = pair.embed(ids).requires_grad_()
        labels = ids.masked_fill(mask == 0, -100)
        model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
        gradients.append(embeds.grad)
    same_gradients(gradients[1], gradients[0])


def test_gradients_of_a_soft_prompt_are_the_local_model_s(pair: Pair) -> None:
    ids, mask = ragged()
    ids, mask = ids.flip(1), mask.flip(1)
    start = torch.randn(1, 4, pair.width)
    gradients = []
    for model in (pair.local, pair.remote):
        prompt = start.clone().requires_grad_()
        embeds = torch.cat([prompt.expand(len(ids), -1, -1), pair.embed(ids)], 1)
        padding = torch.cat([torch.ones(len(ids), 4, dtype=mask.dtype), mask], 1)
        labels = torch.cat([torch.full((len(ids), 4), -100), ids.masked_fill(mask == 0, -100)], 1)
        model(inputs_embeds=embeds, attention_mask=padding, labels=labels).loss.backward()
        gradients.append(prompt.grad)
    same_gradients(gradients[1], gradients[0])


def test_deep_prompts_and_their_gradients_are_as_with_hooks_on_local_blocks(pair: Pair) -> None:
    ids, _ = ragged()
    start = torch.randn(BLOCKS, 3, pair.width) / 4

    def locally(prompts: torch.Tensor) -> Any:
        with added_to_blocks(pair.local, prompts):
            return pair.local(ids, labels=ids)

    gradients, losses = [], []
    for run in (locally, lambda prompts: pair.remote(ids, labels=ids, deep_prompts=prompts)):
        prompts = start.clone().requires_grad_()
        loss = run(prompts).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(prompts.grad)
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    same_gradients(gradients[1], gradients[0])


@pytest.mark.parametrize("cached", [True, False])
def test_deep_prompts_generate_as_with_hooks_on_local_blocks(pair: Pair, swarm: Swarm, cached: bool) -> None:
    ids = torch.randint(1, 256, (2, 9))
    prompts = torch.randn(BLOCKS, 3, pair.width)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    with added_to_blocks(pair.local, prompts):
        expected = pair.local.generate(ids, use_cache=False, **settings)
    found = pair.remote.generate(ids, deep_prompts=prompts, use_cache=cached, **settings)
    assert torch.equal(found, expected)
    bare = pair.local.generate(ids, **settings)
    assert not torch.equal(expected, bare)
    assert torch.equal(pair.remote.generate(ids, **settings), bare)  # nothing of them is left behind
    swarm.wait_sessions(0)


def test_a_prefix_with_deep_prompts_generates_as_it_would_locally(pair: Pair) -> None:
    """What a `deep-prompt` adapter is."""
    ids, prefix = ragged(1)[0], torch.randn(1, 4, pair.width)
    prompts = torch.randn(BLOCKS, 4, pair.width)
    text, new = ids, 6
    with added_to_blocks(pair.local, prompts):
        for _ in range(new):
            logits = pair.local(inputs_embeds=torch.cat([prefix, pair.embed(text)], 1)).logits
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
    embeds = torch.cat([prefix, pair.embed(ids)], 1)
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": PAD}
    found = pair.remote.generate(inputs_embeds=embeds, deep_prompts=prompts, **settings)[0].tolist()
    assert found == text[0, ids.shape[1] :].tolist()[: len(found)]


@contextmanager
def added_to_blocks(model: Any, prompts: torch.Tensor) -> Iterator[None]:
    """What deep prompts mean, said with hooks."""
    hooks = [
        block.register_forward_pre_hook(adding(prompts[index]), with_kwargs=True)
        for index, block in enumerate(blocks_of(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def adding(prompt: torch.Tensor) -> Any:
    def add(_: Any, arguments: Any, options: Any) -> Any:
        hidden = arguments[0]
        length = prompt.shape[0]
        return (torch.cat([hidden[:, :length] + prompt, hidden[:, length:]], 1), *arguments[1:]), options

    return add


def test_a_part_of_the_blocks_can_be_run_and_differentiated_alone(pair: Pair) -> None:
    hidden = torch.randn(2, 6, pair.width, requires_grad=True)
    whole = pair.remote.blocks(hidden)
    parts = pair.remote.blocks[2:](pair.remote.blocks[1](pair.remote.blocks[:1](hidden)))
    torch.testing.assert_close(parts, whole, **CLOSE)
    (of_whole,) = torch.autograd.grad(whole.square().sum(), hidden)
    (of_parts,) = torch.autograd.grad(parts.square().sum(), hidden)
    torch.testing.assert_close(of_parts, of_whole, rtol=1e-3, atol=1e-3 * float(of_whole.abs().max()))


def test_threads_may_share_a_model(pair: Pair) -> None:
    inputs = [torch.randn(2, 5 + index, pair.width) for index in range(4)]

    def gradient(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone().requires_grad_()
        # The blocks alone: what is local may differ in the last bit from thread to thread.
        return torch.autograd.grad(pair.remote.blocks[:](hidden), hidden, torch.ones_like(hidden))[0]

    alone = [gradient(hidden) for hidden in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, inputs))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
def test_prompt_tuning_of_peft_trains_through_the_swarm(pair: Pair) -> None:
    ids, mask = ragged()
    ids, mask = ids.flip(1), mask.flip(1)
    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    losses, gradients = [], []
    for model in (pair.local, pair.remote):
        torch.manual_seed(3)
        tuned = get_peft_model(model, settings)
        loss = tuned(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients += [parameter.grad for parameter in tuned.parameters() if parameter.grad is not None]
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    assert len(gradients) == 2
    same_gradients(gradients[1], gradients[0])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
def test_peft_s_generate_gives_each_row_what_it_gets_alone_locally(pair: Pair, swarm: Swarm) -> None:
    ids, mask = ragged()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}

    def tuned(model: Any) -> Any:
        torch.manual_seed(3)
        made = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=9))
        with torch.no_grad():
            made.prompt_encoder["default"].embedding.weight.mul_(6)  # so that it is heard
        return made

    found = tuned(pair.remote).generate(input_ids=ids, attention_mask=mask, **settings)
    swarm.wait_sessions(0)
    for row in range(len(ids)):
        # Alone: beside padding, peft's prompt is locally as far from the text as the padding is wide.
        alone = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        expected = tuned(pair.local).generate(input_ids=alone, **settings)[0, alone.shape[1] :]
        assert found[row, ids.shape[1] :][: len(expected)].tolist() == expected.tolist()
    assert not torch.equal(found, pair.remote.generate(ids, attention_mask=mask, **settings))


def test_a_second_backward_through_the_same_graph_works_without_its_tape(pair: Pair) -> None:
    hidden = torch.randn(1, 5, pair.width, requires_grad=True)
    output = pair.remote.blocks[1:3](hidden).sum()
    (first,) = torch.autograd.grad(output, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(output, hidden)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_tokens_are_the_local_model_s(pair: Pair, swarm: Swarm, cached: bool) -> None:
    ids, mask = ragged()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "use_cache": cached}
    for given in ({"attention_mask": mask}, {}):
        expected = pair.local.generate(ids, **given, **settings)
        assert torch.equal(pair.remote.generate(ids, **given, **settings), expected)
    swarm.wait_sessions(0)


def test_sampled_tokens_are_the_local_model_s_for_one_seed(pair: Pair) -> None:
    ids, mask = ragged()
    tokens = []
    for model in (pair.local, pair.remote):
        torch.manual_seed(7)
        sampled = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=True,
            top_k=20,
            num_return_sequences=2,
            pad_token_id=PAD,
        )
        tokens.append(sampled)
    assert torch.equal(tokens[0], tokens[1])


def test_a_soft_prompt_generates_as_it_would_locally(pair: Pair) -> None:
    embeds = torch.cat([torch.randn(1, 4, pair.width), pair.embed(ragged(1)[0])], 1)
    settings = {"inputs_embeds": embeds, "max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(pair.remote.generate(**settings), pair.local.generate(**settings))


def test_a_returned_cache_continues_is_cropped_and_frees_its_sessions(pair: Pair, swarm: Swarm) -> None:
    ids = ragged(1)[0]
    settings = {"do_sample": False, "pad_token_id": PAD}
    expected = pair.local.generate(ids, max_new_tokens=12, **settings)
    cache = pair.remote.new_cache(64)
    first = pair.remote.generate(ids, max_new_tokens=6, past_key_values=cache, **settings)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(pair.remote.generate(first, max_new_tokens=6, past_key_values=cache, **settings), expected)
    cache.crop(-5)
    kept = expected[:, : cache.get_seq_length()]
    with torch.no_grad():
        again = pair.remote(expected[:, kept.shape[1] : kept.shape[1] + 2], past_key_values=cache).logits
        whole = pair.local(expected[:, : kept.shape[1] + 2]).logits[:, -2:]
    torch.testing.assert_close(again, whole, **CLOSE)
    swarm.wait_sessions(1)
    [session] = swarm.client.client.status()["sessions"]
    assert (session["model"], session["tokens"]) == (pair.remote.name_or_path.rpartition("/")[2], kept.shape[1] + 2)
    assert [hop["span"] for hop in session["route"]] == [f"0:{BLOCKS}"]
    del cache
    gc.collect()
    swarm.wait_sessions(0)
    assert swarm.client.client.status()["sessions"] == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "beam_search is refused"),
    ({"cache_implementation": "static"}, "cache_implementation is refused"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is refused"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "use_cache=False"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_sessions_can_not_do_is_refused_in_words(
    pairs: dict[str, Pair], swarm: Swarm, settings: dict[str, Any], words: str
) -> None:
    remote = pairs["llama"].remote
    with pytest.raises(ValueError, match=words):
        remote.generate(ragged()[0], max_new_tokens=3, pad_token_id=PAD, **settings)
    swarm.wait_sessions(0)


def test_wrong_arguments_of_forward_are_refused_in_words(pairs: dict[str, Pair]) -> None:
    remote = pairs["llama"].remote
    ids, mask = ragged()
    with pytest.raises(ValueError, match="output_attentions is refused"):
        remote(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask has to be"):
        remote(ids, attention_mask=torch.zeros(3, 1, 11, 11))
    with pytest.raises(ValueError, match="packed texts"):
        remote(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]]))
    with pytest.raises(ValueError, match="RemoteCache"):
        remote(ids, past_key_values=object())
    with pytest.raises(IndexError, match="no span"):
        remote.blocks[3:3]
    with pytest.raises(IndexError, match="left to right"):
        remote.blocks[::2]
    with pytest.raises(IndexError, match=f"no block {BLOCKS} in"):
        remote.blocks[BLOCKS]
    with pytest.raises(ValueError, match="save what you trained"):
        remote.save_pretrained("nowhere")
    with pytest.raises(TypeError, match="from_pretrained"):
        RemoteModelForCausalLM()
    with pytest.raises(ApiError, match=r"prompts has the shape \(3, 1, 32\)"):
        remote.generate(ids, deep_prompts=torch.zeros(3, 1, 32), max_new_tokens=2)
    with remote.new_cache(32) as cache, torch.no_grad():
        remote(ids, deep_prompts=torch.ones(BLOCKS, 1, 32), past_key_values=cache)
        for other in (None, torch.zeros(BLOCKS, 1, 32), torch.ones(BLOCKS, 2, 32)):
            with pytest.raises(ValueError, match="other deep prompts"):
                remote(ids[:, :1], deep_prompts=other, past_key_values=cache)
    with remote.new_cache(10) as cache, pytest.raises(ApiError, match="opened for 10 tokens"):
        remote(ids, past_key_values=cache)
    with remote.new_cache(32) as cache:
        embeds = remote.get_input_embeddings()(ids).requires_grad_()
        with pytest.raises(ValueError, match="no gradients"):
            remote(inputs_embeds=embeds, past_key_values=cache)
        with pytest.raises(ValueError, match="no gradients"):
            remote(ids, deep_prompts=torch.ones(BLOCKS, 1, 32, requires_grad=True), past_key_values=cache)
        with pytest.raises(ValueError, match="count a row's tokens"):
            remote(ids, attention_mask=mask, position_ids=torch.arange(11).expand(3, -1), past_key_values=cache)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden": torch.zeros(5, 32)}, "floating-point"),
        ({"hidden": torch.zeros(0, 5, 32)}, "none of them 0"),
        ({"hidden": torch.zeros(2, 5, 32, dtype=torch.long)}, "floating-point"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask has to be \(2, 5\)"),
        ({"attention_mask": torch.zeros(2, 5).fill_(-torch.inf)}, "1 where there is a token"),
        ({"position_ids": torch.arange(4)}, "position_ids have to be"),
        ({"position_ids": torch.arange(5.0)}, "whole numbers"),
    ],
)
def test_blocks_refuse_what_would_be_sent_as_something_else(
    pairs: dict[str, Pair], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pairs["llama"].remote.blocks[1:3](**{"hidden": torch.zeros(2, 5, 32)} | given)


def test_the_daemon_s_refusals_are_raised_with_its_sentence(pairs: dict[str, Pair]) -> None:
    remote = pairs["llama"].remote
    with pytest.raises(ApiError, match="context of little-llama is 128") as caught:
        remote.blocks(torch.zeros(1, 129, 32))
    assert (caught.value.http_status, caught.value.code) == (400, "invalid-request")
    hidden = torch.zeros(1, 2, 32)
    hidden[0, 0, 0] = float("nan")
    with pytest.raises(ApiError, match="not a number"):
        remote.blocks[1:3](hidden)


def test_a_model_whose_files_are_not_here_comes_from_the_daemon(swarm: Swarm, pairs: dict[str, Pair]) -> None:
    socket = swarm.client.socket_path
    remote = RemoteModelForCausalLM.from_pretrained("little-gpt2", socket=socket)
    ids, _ = ragged()
    torch.testing.assert_close(remote(ids).logits, pairs["gpt2"].local(ids).logits, **CLOSE)
    with pytest.raises(Exception, match="'unheard-of'"):
        RemoteModelForCausalLM.from_pretrained("unheard-of", socket=socket)


@dataclass
class LongBatch:
    """Three micro-batches with a soft prompt in front and deep prompts: what is differentiated by, and the loss of a model."""

    pair: Pair
    ids: torch.Tensor
    mask: torch.Tensor
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # embeddings, the soft prompt, deep prompts

    def loss(self, model: Any, leaves: tuple[torch.Tensor, ...]) -> torch.Tensor:
        embeds, prompt, deep = leaves
        rows, length = len(self.ids), prompt.shape[1]
        front = torch.ones(rows, length, dtype=self.mask.dtype)
        labels = torch.cat([-100 * front, self.ids.masked_fill(self.mask == 0, -100)], 1)
        given = {
            "inputs_embeds": torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
            "attention_mask": torch.cat([front, self.mask], 1),
            "labels": labels,
        }
        if model is self.pair.remote:
            return model(**given, deep_prompts=deep).loss  # type: ignore[no-any-return]
        with added_to_blocks(model, deep):
            return model(**given).loss  # type: ignore[no-any-return]

    def fresh_leaves(self) -> tuple[torch.Tensor, ...]:
        return tuple(leaf.clone().requires_grad_() for leaf in self.leaves)


def long_batch(pair: Pair) -> LongBatch:
    ids = torch.randint(1, 256, (48, 60))
    mask = torch.ones_like(ids)
    for row in range(48):
        mask[row, 60 - row % 7 :] = 0
    leaves = (pair.embed(ids), torch.randn(1, 4, pair.width), torch.randn(BLOCKS, 4, pair.width) / 4)
    return LongBatch(pair, ids, mask, leaves)


def test_a_server_killed_between_forward_and_backward_changes_no_gradient_of_any_family(
    swarm: Swarm, pairs: dict[str, Pair]
) -> None:
    torch.manual_seed(5)
    batches = [long_batch(pair) for pair in pairs.values()]
    under_way = []
    for batch in batches:
        before = figure(swarm.second.socket_path, "device_jobs_done")
        leaves = batch.fresh_leaves()
        loss = batch.loss(batch.pair.remote, leaves)
        # The server that is to die computed a part of this forward.
        assert figure(swarm.second.socket_path, "device_jobs_done") > before
        under_way.append((loss, leaves))
    swarm.second.kill()
    for batch, (loss, leaves) in zip(batches, under_way, strict=True):
        before = figure(swarm.first.socket_path, "device_jobs_done")
        loss.backward()
        assert figure(swarm.first.socket_path, "device_jobs_done") >= before + 3
        expected = batch.fresh_leaves()
        local = batch.loss(batch.pair.local, expected)
        local.backward()
        torch.testing.assert_close(loss, local, **CLOSE)
        for found, wanted in zip(leaves, expected, strict=True):
            same_gradients(found.grad, wanted.grad)
