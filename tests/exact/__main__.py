"""``python -m tests.exact --model M --route 0:4,4:8,8:12``: spans in this process against local `transformers`.

Prints the checker's verdict and exits 1 if it is not passed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blocks.model.exact import Reference, check, route_generator
from blocks.model.head import load_head
from blocks.model.source import ModelSource, resolve
from blocks.model.span import load_span
from blocks.text import TextCodec
from overlay.errors import PeerdError
from routing.types import Span as Blocks

PROMPTS = ("Once upon a time", "What is the capital of", "The little dog", "Question: why")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.exact", description=__doc__)
    parser.add_argument("--model", required=True, help="demo, a directory or a hub id")
    parser.add_argument("--route", help="spans that cover the model, for instance 0:4,4:8,8:12 (default: all in one)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quant", default="none", choices=("none", "int8", "nf4"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=Path, help="a text file with one prompt per line")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, help="prefill in chunks of this many tokens")
    return parser.parse_args(arguments)


def read_prompts(source: ModelSource, path: Path | None) -> list[list[int]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path else list(PROMPTS)
    codec = TextCodec.from_directory(source.directory)
    return [ids for line in lines if line.strip() and (ids := list(codec.encode(line)))]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        source = resolve(options.model)
        route = [Blocks.parse(part) for part in (options.route or f"0:{source.blocks}").split(",")]
        edges = [0, *(part.end for part in route)]
        if [part.start for part in route] != edges[:-1] or edges[-1] != source.blocks:
            print(f"The route must cover blocks 0:{source.blocks} without gaps.", file=sys.stderr)
            return 2
        settings = {"dtype": options.dtype, "quant": options.quant, "device": options.device}
        spans = [load_span(source, part.start, part.end, **settings) for part in route]
        head = load_head(source, dtype=options.dtype, device=options.device)
        reference = Reference.load(source, **settings)
        generate = route_generator(head, spans, options.chunk)
        verdict = check(generate, reference, read_prompts(source, options.prompts), options.max_tokens)
    except (PeerdError, ValueError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 2)
    print(verdict.describe())
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
