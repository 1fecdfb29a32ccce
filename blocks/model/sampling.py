"""The sampler: logits to the next token, as a pure function of the logits, the settings, the position and the tokens so far.

Owns penalties, top-k, top-p and the draw. A replay of the same tokens chooses the same ones: the noise of a token is keyed by
(seed; choice, position, token id), and the draw is the argmax of logits plus Gumbel noise, which samples the softmax (Maddison
et al., "A* sampling", 2014). Ties go to the lower id everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from blocks.model.counter_random import words_at, words_below
from blocks.sampling_params import SamplingParams

# Below this share of the vocabulary, drawing noise for the candidates alone is less work than for all.
_FEW_CANDIDATES_SHARE = 8
# Top-p first looks among this many of the likeliest tokens: sorting a whole vocabulary costs milliseconds.
_LIKELIEST = 512


def sample(
    logits: torch.Tensor, params: SamplingParams, position: int, tokens: Sequence[int], prompt_length: int
) -> int:
    """Chooses the token at ``position``.

    Args:
        logits: (vocab,), any float dtype; left as it is.
        params: the settings.
        position: the place of the new token in the session, counted from the prompt's first.
        tokens: prompt and output so far; may be empty where ``params.has_penalties`` is false.
        prompt_length: how many of ``tokens`` are the prompt.

    Returns:
        The token id.
    """
    if params.has_penalties:
        logits = penalise(logits.float(), params, tokens, prompt_length)
    if params.is_greedy:
        return int(logits.argmax())
    scores = logits.to(device="cpu", dtype=torch.float32)
    # The highest score is 0, so that no temperature overflows; a broken model's NaN is sampled like its argmax.
    scores = (scores - scores.max()) / params.temperature
    if bool(scores.isnan().any()):
        return int(logits.argmax())
    vocabulary = scores.shape[0]
    candidates = _candidates(scores, params)
    where = {"seed": params.seed, "choice": params.choice, "position": position}
    if candidates is None:
        return int((scores + torch.from_numpy(gumbel(words_below(vocabulary, **where)))).argmax())
    ids = candidates.numpy()
    few = len(ids) * _FEW_CANDIDATES_SHARE < vocabulary
    words = words_at(ids, **where) if few else words_below(vocabulary, **where)[ids]
    return int(ids[int((scores[candidates] + torch.from_numpy(gumbel(words))).argmax())])


def gumbel(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """Turns uniform 32-bit words into Gumbel noise.

    The logarithms are taken in float64 and rounded to float32 once, which hides the last-bit differences of maths libraries.
    """
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    noise: npt.NDArray[np.float32] = (-np.log(-np.log(uniform))).astype(np.float32)
    return noise


def penalise(logits: torch.Tensor, params: SamplingParams, tokens: Sequence[int], prompt_length: int) -> torch.Tensor:
    """Returns a copy of float32 logits (vocab,) with the penalties of the tokens so far applied.

    Repetition looks at prompt and output, as in ``transformers``; presence and frequency at the output, as in the OpenAI API.
    """
    logits = logits.clone()
    history = np.asarray(tokens, dtype=np.int64)
    if params.repetition_penalty != 1:
        seen = _ids(np.unique(history), logits)
        values = logits[seen]
        logits[seen] = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        unique, counts = np.unique(history[prompt_length:], return_counts=True)
        times = torch.from_numpy(counts.astype(np.float32)).to(logits.device)
        logits[_ids(unique, logits)] -= params.presence_penalty + params.frequency_penalty * times
    return logits


def _ids(unique: npt.NDArray[np.int64], logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(unique).to(logits.device)


def _candidates(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor | None:
    """Returns the ids that top-k and then top-p keep, ascending, or None for all."""
    vocabulary = scores.shape[0]
    kept: torch.Tensor | None = None
    if 0 < params.top_k < vocabulary:
        kept = _likeliest(scores, params.top_k)
    if params.top_p >= 1:
        return None if kept is None else kept.sort().values
    support = scores if kept is None else scores[kept]
    log_total = support.double().logsumexp(0)
    ordered = _likeliest(scores, min(_LIKELIEST, vocabulary)) if kept is None else kept
    mass = (scores[ordered].double() - log_total).exp().cumsum(0)
    if kept is None and float(mass[-1]) < params.top_p:
        ordered = _likeliest(scores, vocabulary)
        mass = (scores[ordered].double() - log_total).exp().cumsum(0)
    # A token stays while the mass before it is short of top_p, so at least one stays.
    count = 1 + int((mass[:-1] < params.top_p).sum())
    return ordered[:count].sort().values


def _likeliest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the ids of the ``count`` highest scores, highest first, ties by the lower id.

    ``torch.topk`` leaves the order of ties open, so it only gives the threshold.
    """
    if count >= scores.shape[0]:
        return torch.sort(scores, descending=True, stable=True).indices
    threshold = torch.topk(scores, count).values[-1]
    reaching = torch.nonzero(scores >= threshold).flatten()
    order = torch.sort(scores[reaching], descending=True, stable=True).indices
    return reaching[order][:count]
