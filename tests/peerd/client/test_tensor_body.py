"""The safetensors body: the library's own files are read, ours are read by the library, and damage is named."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from peerd.client.tensor_body import BadTensorBody, Tensor, decode, encode


def body(document: dict[str, Any], data: bytes = b"") -> bytes:
    header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_library_reads_what_is_written_here() -> None:
    hidden = np.arange(6, dtype=np.float32).reshape(2, 3)
    mask = np.array([[1, 0, 1]], dtype=np.uint8)
    pieces = encode(
        {"mask": Tensor("U8", (1, 3), mask.tobytes()), "hidden": Tensor("F32", (2, 3), hidden.tobytes())}, {}
    )
    read = safetensors.numpy.load(b"".join(pieces))
    assert (read["hidden"] == hidden).all()
    assert (read["mask"] == mask).all()


def test_what_the_library_writes_is_read_here() -> None:
    hidden = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors, settings = decode(safetensors.numpy.save({"hidden": hidden}, {"model": "demo"}))
    assert settings == {"model": "demo"}
    assert (tensors["hidden"].dtype, tensors["hidden"].shape) == ("F32", (2, 3))
    assert bytes(tensors["hidden"].data) == hidden.tobytes()


def test_tensors_are_written_from_and_read_as_views_of_what_is_there() -> None:
    data = bytearray(24)
    pieces = encode({"hidden": Tensor("F32", (6,), data)}, {})
    assert pieces[1] is data
    whole = bytearray(b"".join(pieces))
    view = decode(whole)[0]["hidden"].data
    whole[-1] = 7
    assert view[-1] == 7


def test_every_tensor_lies_aligned_whatever_their_names() -> None:
    given = {"a": Tensor("U8", (3,), b"abc"), "b": Tensor("F32", (1,), b"wxyz"), "c": Tensor("I64", (1,), b"12345678")}
    joined = b"".join(encode(given, {"x": "y"}))
    for name, tensor in decode(joined)[0].items():
        place = joined.index(bytes(tensor.data))
        assert place % len(given[name].data) == 0 or name == "a"


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (b"", "cut off"),
        (b"\x05", "cut off"),
        (b"\xff" * 8 + b"{}", "cut off"),
        ((3).to_bytes(8, "little") + b"{] ", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "no table|not a table"),
        (body({"hidden": 5}), "no description"),
        (body({"hidden": entry([1], [0, 4], "F7")}, b"1234"), "type 'F7'"),
        (body({"hidden": entry([1], [0, 4], ["F32"])}, b"1234"), "unknown here"),
        (body({"hidden": entry("x", [0, 4])}, b"1234"), "no sound shape"),
        (body({"hidden": entry([-1], [0, 4])}, b"1234"), "no sound shape"),
        (body({"hidden": entry([True], [0, 4])}, b"1234"), "no sound shape"),
        (body({"hidden": entry([1] * 9, [0, 4])}, b"1234"), "no sound shape"),
        (body({"hidden": entry([1], [0, 4, 8])}, b"1234"), "no sound shape"),
        (body({"hidden": entry([2], [0, 4])}, b"1234"), "add up"),
        (body({"hidden": entry([2], [0, 8])}, b"1234"), "add up"),
        (body({"hidden": entry([1], [4, 0])}, b"1234"), "add up"),
        (body({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"1234"), "overlap"),
        (body({"a": entry([1], [4, 8])}, b"12345678"), "gaps"),
        (body({"a": entry([1], [0, 4])}, b"12345678"), "4 bytes, and there are 8"),
        (body({"__metadata__": {"a": 1}}), "__metadata__"),
        (body({"__metadata__": [1]}), "__metadata__"),
    ],
)
def test_damage_is_named(damaged: bytes, words: str) -> None:
    with pytest.raises(BadTensorBody, match=words):
        decode(damaged)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(junk: bytes) -> None:
    for start in (b"", (len(junk) // 2).to_bytes(8, "little")):
        try:
            decode(start + junk)
        except BadTensorBody:
            pass
