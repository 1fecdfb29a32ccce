"""THE checker: greedy tokens of any generator against local `transformers`, and how far apart they may be.

Owns the comparison of DESIGN 1.1: grade (a), float32: any difference fails; grade (b), other dtypes and quantisations: tokens equal the
reference's wherever its gap between the two highest logits exceeds e, where e is what the reference differs from itself by when the
same tokens come whole, in chunks and one by one. ``python -m tests.exact``, the demo and start-up checks all call this.
Never loosened to make something pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import DynamicCache

from blocks.model.architecture import Anatomy, build, parse_dtype, read_config
from blocks.model.head import Head
from blocks.model.hub import fetch
from blocks.model.quantise import quantise
from blocks.model.source import ModelSource, resolve
from blocks.model.span import Span, max_positions
from blocks.model.weights import open_tensors

_CHUNK = 7


class Generated(NamedTuple):
    """What a generator gave: token ids, and where it can the logits row (vocabulary,) that each was chosen from."""

    tokens: list[int]
    logits: list[torch.Tensor] | None = None


Generate = Callable[[Sequence[int], int], Generated]
"""(prompt ids, how many tokens) to greedy tokens; end tokens don't end it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token of one prompt at which a generator left the reference."""

    prompt: int
    index: int  # among the generated tokens
    expected: int
    got: int
    gap: float  # the reference's, between its two highest logits there
    logit_difference: float | None  # the largest along the common prefix, where the generator gave logits


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome over all prompts."""

    grade: str  # a or b
    epsilon: float
    prompts: int
    tokens: int
    differences: tuple[Difference, ...] = field(default=())
    largest_logit_difference: float | None = None

    @property
    def passed(self) -> bool:
        if self.grade == "a":
            return not self.differences
        too_far = self.largest_logit_difference is not None and self.largest_logit_difference > self.epsilon
        return not too_far and all(difference.gap <= self.epsilon for difference in self.differences)

    def describe(self) -> str:
        """A few lines for people."""
        verdict = "exact" if self.passed else "WRONG"
        counts = f"{self.prompts} prompts, {self.tokens} tokens, {len(self.differences)} first differences"
        lines = [f"{verdict} (grade {self.grade}): {counts}, e = {self.epsilon:.3g}"]
        if self.largest_logit_difference is not None:
            lines.append(f"  largest logit difference along common prefixes: {self.largest_logit_difference:.3g}")
        lines += [
            f"  prompt {d.prompt}, token {d.index}: {d.got} instead of {d.expected}; the reference's top-2 gap is {d.gap:.3g}"
            for d in self.differences
        ]
        return "\n".join(lines)


class Reference:
    """Local `transformers`, loaded with a route's dtype and quantisation; the whole model, its own forward and cache."""

    def __init__(self, anatomy: Anatomy, dtype: str, quant: str, device: str) -> None:
        self.model = anatomy.model
        self.dtype = dtype
        self.quant = quant
        self.device = torch.device(device)
        self.max_positions = max_positions(self.model.config.to_dict())

    @classmethod
    def load(
        cls, model: str | ModelSource, *, dtype: str = "float32", quant: str = "none", device: str = "cpu"
    ) -> Reference:
        """Load a whole model, named as everywhere or already found."""
        source = resolve(model) if isinstance(model, str) else model
        names = tuple(sorted(source.tensors))
        fetch(source, names)
        with open_tensors(source, names) as tensors:
            kept = {name: tensor for name, tensor in tensors.items() if not _is_extra(source, name)}
            anatomy = build(read_config(source.config), kept, parse_dtype(dtype), None, device)
        quantise(anatomy.blocks, quant, parse_dtype(dtype), device)
        return cls(anatomy, dtype, quant, device)

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy continuation of a prompt, token by token."""
        return self.generate(prompt, max_tokens).tokens

    def generate(self, prompt: Sequence[int], max_tokens: int) -> Generated:
        """`greedy`, with the logits rows."""
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        with torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            ids = list(prompt)
            for _ in range(max_tokens):
                window = torch.tensor([ids], device=self.device)
                row = self.model(input_ids=window, past_key_values=cache, use_cache=True).logits[0, -1]
                ids = [int(row.argmax())]
                tokens.append(ids[0])
                rows.append(row)
        return Generated(tokens, rows)

    def score(self, tokens: Sequence[int], windows: Sequence[int]) -> torch.Tensor:
        """Logits (tokens, vocabulary) of known tokens, given to the model in ``windows`` of these lengths."""
        rows = []
        with torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            position = 0
            for length in windows:
                window = torch.tensor([list(tokens[position : position + length])], device=self.device)
                rows.append(self.model(input_ids=window, past_key_values=cache, use_cache=True).logits[0])
                position += length
        return torch.cat(rows)

    def epsilon(self, texts: Sequence[Sequence[int]]) -> float:
        """How far the reference is from itself: the largest logit difference between whole, chunked and single-token passes."""
        largest = 0.0
        for text in texts:
            whole = self.score(text, [len(text)]).float()
            chunks = [_CHUNK] * (len(text) // _CHUNK) + ([len(text) % _CHUNK] if len(text) % _CHUNK else [])
            for windows in (chunks, [1] * len(text)):
                largest = max(largest, float((self.score(text, windows).float() - whole).abs().max()))
        return largest


def _is_extra(source: ModelSource, name: str) -> bool:
    """Whether a tensor belongs to a block beyond the declared ones (extra prediction layers), which no reference runs."""
    prefix = source.block_prefix
    index = name[len(prefix) + 1 :].partition(".")[0] if name.startswith(prefix + ".") else ""
    return index.isdecimal() and int(index) >= source.blocks


def use_one_thread() -> None:
    """Leave the machine's other cores to who else computes on it."""
    torch.set_num_threads(1)


def check(generate: Generate, reference: Reference, prompts: Sequence[Sequence[int]], max_tokens: int) -> Verdict:
    """Compare greedy tokens over ``prompts`` with the reference's.

    Args:
        generate: what is checked.
        reference: loaded with the same dtype, quantisation and attention.
        prompts: token ids, each at least one.
        max_tokens: how many tokens to compare for each prompt, the context permitting.
    """
    grade = "a" if reference.dtype == "float32" and reference.quant == "none" else "b"
    differences: list[Difference] = []
    texts: list[list[int]] = []
    largest: float | None = None
    compared = 0
    for number, prompt in enumerate(prompts):
        count = min(max_tokens, reference.max_positions - len(prompt))
        expected = reference.generate(prompt, count)
        got = generate(prompt, count)
        texts.append([*prompt, *expected.tokens])
        common = _common(expected.tokens, got.tokens)
        compared += min(common + 1, count)
        apart = _logit_difference(expected, got, common)
        if apart is not None:
            largest = apart if largest is None else max(largest, apart)
        if common < count:
            differences.append(_difference(reference, number, prompt, expected, got, common, apart))
    return Verdict(grade, reference.epsilon(texts), len(prompts), compared, tuple(differences), largest)


def _common(expected: Sequence[int], got: Sequence[int]) -> int:
    same = (index for index, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b)
    return next(same, min(len(expected), len(got)))


def _logit_difference(expected: Generated, got: Generated, common: int) -> float | None:
    """The largest along the common prefix; the row after it counts too, as it has the same past."""
    if got.logits is None or expected.logits is None:
        return None
    rows = min(common + 1, len(got.logits), len(expected.logits))
    pairs = zip(expected.logits[:rows], got.logits[:rows], strict=True)
    return max((float((a.float() - b.float()).abs().max()) for a, b in pairs), default=0.0)


def _difference(
    reference: Reference,
    number: int,
    prompt: Sequence[int],
    expected: Generated,
    got: Generated,
    index: int,
    apart: float | None,
) -> Difference:
    """Re-score the first difference on the reference, whole: the gap between its two highest logits there."""
    text = [*prompt, *expected.tokens[:index]]
    top = reference.score(text, [len(text)])[-1].float().topk(2).values
    wrong = got.tokens[index] if index < len(got.tokens) else -1
    return Difference(number, index, expected.tokens[index], wrong, float(top[0] - top[1]), apart)


def route_generator(head: Head, spans: Sequence[Span], chunk_tokens: int | None = None) -> Generate:
    """A generator over spans in this process, prefilling in chunks where asked to."""

    def generate(prompt: Sequence[int], max_tokens: int) -> Generated:
        caches = [span.new_cache(len(prompt) + max_tokens) for span in spans]
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        pending, position = list(prompt), 0
        while len(tokens) < max_tokens:
            window = pending[: chunk_tokens or len(pending)]
            hidden = head.embed(window, position)
            for span, cache in zip(spans, caches, strict=True):
                hidden = span.forward(hidden, position, cache)
            pending, position = pending[len(window) :], position + len(window)
            if not pending:
                rows.append(head.logits(hidden[:, -1:])[0])
                pending = [int(rows[-1].argmax())]
                tokens += pending
        return Generated(tokens, rows)

    return generate
