"""The detokeniser: whole characters only, and stop strings that don't depend on how the text was cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.demo import MODEL_DIRECTORY
from blocks.text import TextCodec
from blocks.text_stream import MAX_STOP_STRINGS, MAX_UNFINISHED_TOKENS, InvalidStop, TextStream, check_stop

CODEC = TextCodec.from_directory(MODEL_DIRECTORY)
STOPS = st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3)


def _stream(ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(CODEC, stop)
    pieces = [stream.push(token).text for token in ids]
    return [*pieces, stream.finish()]


class Characters:
    """A decoder whose tokens are characters, so that a test decides how text is cut."""

    def decode(self, ids: list[int]) -> str:  # type: ignore[override]
        return "".join(map(chr, ids))

    def is_special(self, token_id: int) -> bool:
        return token_id == 0


def _reference_stop(text: str, stops: list[str]) -> str:
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="|"), max_size=60))
@settings(deadline=None)
def test_the_pieces_put_together_are_the_text(text: str) -> None:
    pieces = _stream(CODEC.encode(text))
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, CODEC.vocabulary_size - 1), max_size=MAX_UNFINISHED_TOKENS - 1))
@settings(deadline=None)
def test_any_ids_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(_stream(ids)) == CODEC.decode(ids)


def test_no_piece_shows_half_a_character() -> None:
    text = "a snowman ☃, a fox 🦊 and é"
    pieces = _stream(CODEC.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5


def test_bytes_that_never_become_a_character_are_let_go() -> None:
    lone = CODEC.encode("☃", add_special_tokens=False)[0]
    stream = TextStream(CODEC)
    pieces = [stream.push(lone).text for _ in range(10 * MAX_UNFINISHED_TOKENS)]
    assert any(pieces)
    assert len(stream._unfinished_ids) <= MAX_UNFINISHED_TOKENS


def test_control_tokens_show_nothing() -> None:
    ids = CODEC.encode("Hello.")
    assert "".join(_stream([*ids, *CODEC.end_token_ids, *ids])) == "Hello.Hello."


@given(st.text(alphabet="ab é", max_size=20), STOPS)
def test_a_stop_string_ends_the_text_where_it_is_complete_first(text: str, stops: list[str]) -> None:
    stream = TextStream(Characters(), stops)  # type: ignore[arg-type]
    out = "".join(stream.push(ord(character)).text for character in text) + stream.finish()
    assert out == _reference_stop(text, stops)
    assert stream.stopped == (out != text or any(stop in text for stop in stops))


@given(st.text(alphabet="ab ", max_size=20), STOPS)
@settings(deadline=None)
def test_the_cut_into_tokens_does_not_move_the_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(CODEC, stops)
    out = "".join(stream.push(token).text for token in CODEC.encode(text)) + stream.finish()
    assert out == _reference_stop(text, stops)


def test_what_could_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(Characters(), ["END"])  # type: ignore[arg-type]
    assert [stream.push(ord(character)).text for character in "xENxE"] == ["x", "", "", "ENx", ""]
    assert stream.finish() == "E"


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(Characters(), ["."])  # type: ignore[arg-type]
    pieces = [stream.push(ord(character)) for character in "a.b"]
    assert [(piece.text, piece.stopped) for piece in pieces] == [("a", False), ("", True), ("", True)]
    assert stream.finish() == ""


@pytest.mark.parametrize("stop", [[""], ["x" * 513], ["a"] * (MAX_STOP_STRINGS + 1), [3]])
def test_stop_strings_are_bounded(stop: list[str]) -> None:
    with pytest.raises(InvalidStop):
        check_stop(stop)
