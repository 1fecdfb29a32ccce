"""Text to token ids and back: the tokenizer, the chat template, and the incremental detokeniser.

Torch-free: ``tokenizers`` and sandboxed ``jinja2`` directly, by the rules of ``transformers``, which would load torch.
Files may come from a peer: they are bounded, parsed as data, and a template runs in jinja's immutable sandbox with
nothing but the conversation. Owns no files, no clock: whoever calls gives bytes and the time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from overlay.errors import Blame, PeerdError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TEXT_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
)

MAX_TEXT_FILE_BYTES = 64 << 20
MAX_TEMPLATE_CHARS = 256 << 10
MAX_CHAT_CHARS = 8 << 20

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextFilesError(PeerdError):
    """A tokenizer file is missing or can't be read."""

    code = "bad-tokenizer"
    exit_code = 2
    http_status = 400
    retryable = False
    blame = Blame.USER


class ChatTemplateError(PeerdError):
    """The conversation doesn't fit the model's chat template, or there is none."""

    code = "bad-conversation"
    exit_code = 2
    http_status = 400
    retryable = False
    blame = Blame.USER


class TextCodec:
    """The tokenizer and chat template of one model.

    Args:
        files: the contents of `TEXT_FILES`, as far as the model has them, by name.

    Raises:
        TextFilesError: if ``tokenizer.json`` is missing, or a file can't be parsed.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        settings = _json_object(files, SPECIAL_TOKENS_FILE) | _json_object(files, TOKENIZER_CONFIG_FILE)
        self._special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(settings.get(name))) is not None}
        self._tokenizer = _load_tokenizer(files)
        _add_missing_specials(self._tokenizer, settings, self._special)
        self._special_ids = frozenset(
            index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._end_ids = self._find_end_ids(files)
        self._template_text = _template_text(files, settings)
        self._template: jinja2.Template | None = None

    @classmethod
    def from_directory(cls, directory: Path) -> TextCodec:
        """Reads what there is of `TEXT_FILES` in a model directory."""
        return cls({name: (directory / name).read_bytes() for name in TEXT_FILES if (directory / name).is_file()})

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: of the generation config, else of the config, else the tokenizer's own."""
        return self._end_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work."""
        return self._template_text is not None

    @property
    def vocabulary_size(self) -> int:
        """How many ids the tokenizer knows; the model's own vocabulary may be padded beyond it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which text never shows."""
        return token_id in self._special_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text, with the model's begin and end tokens unless told not to."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, now: datetime, add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation the way the model was taught.

        Args:
            messages: plain JSON data: ``role``, ``content`` and whatever else the template knows.
            now: the time that a template may print.
            add_generation_prompt: whether to end where the assistant begins to speak.

        Returns:
            The text, control tokens included: encode it with ``add_special_tokens=False``.

        Raises:
            ChatTemplateError: if there is no template, or it refuses the conversation.
        """
        if self._template_text is None:
            raise ChatTemplateError("This model has no chat template; send a plain prompt to /v1/completions.")
        variables = {
            **self._special,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            "strftime_now": now.strftime,
        }
        pieces, length = [], 0
        try:
            if self._template is None:
                self._template = _environment().from_string(self._template_text)
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > MAX_CHAT_CHARS:
                    raise ChatTemplateError(f"The conversation is longer than {MAX_CHAT_CHARS} characters; shorten it.")
                pieces.append(piece)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise ChatTemplateError(f"The chat template refuses this conversation: {error!s:.200}") from error
        return "".join(pieces)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, now: datetime) -> list[int]:
        """Returns the ids of a conversation, ready for the assistant's answer."""
        return self.encode(self.render_chat(messages, now=now), add_special_tokens=False)

    def _find_end_ids(self, files: Mapping[str, bytes]) -> tuple[int, ...]:
        for name in (GENERATION_CONFIG_FILE, CONFIG_FILE):
            value = _json_object(files, name).get("eos_token_id")
            found = value if isinstance(value, list) else [value]
            ids = tuple(index for index in found if isinstance(index, int) and not isinstance(index, bool))
            if ids:
                return ids
        index = self._tokenizer.token_to_id(self._special["eos_token"]) if "eos_token" in self._special else None
        return () if index is None else (index,)


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    if len(files[name]) > MAX_TEXT_FILE_BYTES:
        raise TextFilesError(f"{name} is over {MAX_TEXT_FILE_BYTES >> 20} MiB; this is not a tokenizer's file.")
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TextFilesError(f"{name} is not JSON; fetch the model's files again.") from error
    if not isinstance(value, dict):
        raise TextFilesError(f"{name} does not hold a JSON object; fetch the model's files again.")
    return value


def _token_text(value: object) -> str | None:
    """Returns the text of a named token, which the files write as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _load_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    if TOKENIZER_FILE not in files:
        raise TextFilesError(f"The model has no {TOKENIZER_FILE}; only models with a fast tokenizer can be driven.")
    if len(files[TOKENIZER_FILE]) > MAX_TEXT_FILE_BYTES:
        raise TextFilesError(f"{TOKENIZER_FILE} is over {MAX_TEXT_FILE_BYTES >> 20} MiB; refusing to load it.")
    try:
        tokenizer = Tokenizer.from_str(files[TOKENIZER_FILE].decode("utf-8"))
    except Exception as error:
        raise TextFilesError(f"{TOKENIZER_FILE} can't be read ({error!s:.120}); fetch the file again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _add_missing_specials(tokenizer: Tokenizer, settings: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Makes control tokens of the named tokens that ``tokenizer.json`` doesn't list as such, as ``transformers`` does.

    Which of them stand round a prompt is the file's own rule: ``add_bos_token`` counts only for models without the file.
    """
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    extra = [text for value in (listed if isinstance(listed, list) else ()) if (text := _token_text(value)) is not None]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for text in dict.fromkeys((*special.values(), *extra)):
        if text not in known:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _template_text(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    """Finds the default chat template: its own file, else the tokenizer's settings, which may name several."""
    if CHAT_TEMPLATE_FILE in files:
        text: object = files[CHAT_TEMPLATE_FILE].decode("utf-8", errors="replace")
    else:
        text = settings.get("chat_template")
        if isinstance(text, list):
            named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
            text = named.get("default")
    if not isinstance(text, str):
        return None
    if len(text) > MAX_TEMPLATE_CHARS:
        raise TextFilesError(f"The chat template is over {MAX_TEMPLATE_CHARS} characters; refusing to load it.")
    return text


class _GenerationBlock(jinja2.ext.Extension):
    """Lets ``{% generation %}`` through: a mark for training that changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainDict:
    """What a template may call ``dict``: making one, without the class's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscore names, through which templates have reached the interpreter before."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't hold {name:.40}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _PlainDict()
    environment.globals["namespace"] = _Namespace
    return environment
