"""`--quant int8|nf4`: the blocks' linears through bitsandbytes, at load, on any device it runs on.

int8 has the outlier threshold 0, so that no row depends on its neighbours; nf4 has blocks of 64 without double quantisation. Only
linears inside blocks change. bitsandbytes is imported here and only when asked for, its noise kept from people. The reference
of the checker is quantised by this same function.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import nn

from blocks.model.errors import UnsupportedModel

KINDS = ("none", "int8", "nf4")


def quantise(blocks: nn.Module, kind: str, dtype: torch.dtype, device: str) -> None:
    """Replace every linear below ``blocks`` in place."""
    if kind == "none":
        return
    if kind not in KINDS:
        raise UnsupportedModel(f"The quantisation {kind!r} is not one of {', '.join(KINDS)}.")
    library = _import_bitsandbytes()
    for parent in list(blocks.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _quantised(library, child, kind, dtype, device))


def _quantised(library: Any, linear: nn.Linear, kind: str, dtype: torch.dtype, device: str) -> nn.Module:
    has_bias = linear.bias is not None
    made: nn.Module
    if kind == "int8":
        made = library.nn.Linear8bitLt(
            linear.in_features, linear.out_features, has_bias, has_fp16_weights=False, threshold=0.0
        )
        made.weight = library.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made = library.nn.Linear4bit(
            linear.in_features, linear.out_features, has_bias, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=False,
        )  # fmt: skip
        made.weight = library.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=made
        )
    if has_bias:
        made.bias = linear.bias
    return made.to(device).eval().requires_grad_(False)


def _import_bitsandbytes() -> Any:
    # For good: it also warns, at every first call, that int8 rounds its inputs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise UnsupportedModel(f"bitsandbytes can't be loaded ({error}): start without --quant.") from error
    return bitsandbytes
