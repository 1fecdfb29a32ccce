"""The torch-free tokenizer and chat template against ``transformers``' own."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from blocks.demo import MODEL_DIRECTORY
from blocks.text import ChatTemplateError, TextCodec, TextFilesError

CODEC = TextCodec.from_directory(MODEL_DIRECTORY)
THEIRS = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
NOW = datetime(2025, 3, 4, 5, 6)  # noqa: DTZ001 - a template prints local time
CHAT = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "What is a fox? <b>&'\"</b>"},
    {"role": "assistant", "content": "An animal."},
    {"role": "user", "content": "And a 🦊?"},
]
TEMPLATES = {
    "loops and trimming": (
        "{% for m in messages %}\n  {% if loop.first %}\n{{ bos_token }}{% endif %}\n"
        "  {%- if m.role == 'assistant' %}{% continue %}{% endif %}[{{ m['content'] | trim | upper }}]\n{% endfor %}\n"
    ),
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ eos_token }}{{ unk_token is defined }}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{{ dict(a=1)['a'] }}{% generation %}x{% endgeneration %}{% if tools %}tools{% endif %}"
    ),
    "generation prompt": "{% if add_generation_prompt %}>{% else %}<{% endif %}{{ messages[-1].content[:3] }}",
    "missing things": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0].get('name', 'no name') }}",
}


def _write_model(directory: Path, **settings_: Any) -> Path:
    """Writes a tokenizer of characters with the given tokenizer_config."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *sorted(set("▁abcdefgh"))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                **settings_,
            }
        )
    )
    return directory


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="|"), max_size=80))
@settings(deadline=None)
def test_encoding_and_decoding_equal_transformers(text: str) -> None:
    ids = CODEC.encode(text)
    assert ids == THEIRS(text)["input_ids"]
    assert CODEC.encode(text, add_special_tokens=False) == THEIRS(text, add_special_tokens=False)["input_ids"]
    assert CODEC.decode(ids) == THEIRS.decode(ids, skip_special_tokens=True) == text


def test_control_tokens_written_in_a_prompt_are_control_tokens() -> None:
    text = "<|user|>Hello<|end|><|assistant|>"
    assert CODEC.encode(text) == THEIRS(text)["input_ids"]
    assert sum(map(CODEC.is_special, CODEC.encode(text))) == 4


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_the_demo_chat_renders_as_in_transformers(generation_prompt: bool) -> None:
    ours = CODEC.render_chat(CHAT, now=NOW, add_generation_prompt=generation_prompt)
    assert ours == THEIRS.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation_prompt)
    ids = THEIRS.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert CODEC.encode_chat(CHAT, now=NOW) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_template_renders_as_in_transformers(name: str, tmp_path: Path) -> None:
    directory = _write_model(tmp_path, chat_template=TEMPLATES[name], unk_token="<unk>")
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(CHAT, tokenize=False)
    ours = TextCodec.from_directory(directory).render_chat(CHAT, now=NOW, add_generation_prompt=False)
    assert ours == theirs


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"pad_token": "<pad>"},
        {"bos_token": {"content": "<s>", "__type": "AddedToken", "special": True}, "add_bos_token": True},
    ],
)
def test_begin_and_end_tokens_follow_the_settings(settings_: dict[str, Any], tmp_path: Path) -> None:
    directory = _write_model(tmp_path, **settings_)
    theirs, ours = AutoTokenizer.from_pretrained(directory), TextCodec.from_directory(directory)
    for text in ("abc def", "<s>a", "", "</s> h", "<pad>a"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def test_a_template_of_its_own_file_wins(tmp_path: Path) -> None:
    directory = _write_model(tmp_path, chat_template="config")
    (directory / "chat_template.jinja").write_text("file")
    assert TextCodec.from_directory(directory).render_chat([], now=NOW) == "file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    assert TextCodec.from_directory(_write_model(tmp_path, chat_template=named)).render_chat([], now=NOW) == "yes"


def test_a_template_prints_the_time_that_it_is_given(tmp_path: Path) -> None:
    directory = _write_model(tmp_path, chat_template="{{ strftime_now('%d %b %Y') }}")
    assert TextCodec.from_directory(directory).render_chat([], now=NOW) == "04 Mar 2025"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{% if %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(__init__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{% for i in range(9999999) %}x{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_coded_error(template: str, tmp_path: Path) -> None:
    codec = TextCodec.from_directory(_write_model(tmp_path, chat_template=template))
    with pytest.raises(ChatTemplateError):
        codec.render_chat(CHAT, now=NOW)


def test_a_role_that_the_demo_does_not_know_is_refused_in_words() -> None:
    with pytest.raises(ChatTemplateError, match="system, user and assistant"):
        CODEC.render_chat([{"role": "wizard", "content": "x"}], now=NOW)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    codec = TextCodec.from_directory(_write_model(tmp_path))
    assert not codec.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        codec.render_chat(CHAT, now=NOW)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"\xff\x00"},
        {"tokenizer.json": b"[" * 5000},
        {"tokenizer.json": b"{}", "tokenizer_config.json": b"nonsense"},
        {"tokenizer.json": b"{}", "tokenizer_config.json": b"[1]"},
        {"tokenizer.json": b"{}", "generation_config.json": b"{"},
    ],
)
def test_broken_files_are_refused_in_words(files: dict[str, bytes]) -> None:
    with pytest.raises(TextFilesError):
        TextCodec(files)


def test_end_tokens_come_from_the_generation_config_first() -> None:
    files = {
        "tokenizer.json": (MODEL_DIRECTORY / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": (MODEL_DIRECTORY / "tokenizer_config.json").read_bytes(),
    }
    assert TextCodec(files).end_token_ids == (2,)
    files["config.json"] = b'{"eos_token_id": 7}'
    assert TextCodec(files).end_token_ids == (7,)
    files["generation_config.json"] = b'{"eos_token_id": [8, 9]}'
    assert TextCodec(files).end_token_ids == (8, 9)
