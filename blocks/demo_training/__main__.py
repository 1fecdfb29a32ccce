"""``python -m blocks.demo_training --out DIR``: makes the demo model and says how good it is."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from blocks.demo_training.corpus import ASSISTANT, BEGIN, END, USER
from blocks.demo_training.train import (
    Recipe,
    build_tokenizer,
    continue_greedily,
    held_out_perplexity,
    save_model,
    train,
)

SAMPLE_PROMPTS = (
    f"{BEGIN}Once upon a time, there was a",
    f"{BEGIN}One cold morning, the fox",
    f"{BEGIN}{USER}Tell me a story about an owl.{END}{ASSISTANT}",
    f"{BEGIN}{USER}What is the capital of France?{END}{ASSISTANT}",
    f"{BEGIN}{USER}Why is the sky blue?{END}{ASSISTANT}",
    f"{BEGIN}{USER}Who are you?{END}{ASSISTANT}",
)


def main() -> None:
    """Trains, saves, measures and shows samples."""
    parser = argparse.ArgumentParser(prog="python -m blocks.demo_training", description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="fewer make a worse model sooner")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    tokenizer = build_tokenizer()
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens  {time.perf_counter() - started:.1f} s", flush=True)
    model = train(tokenizer, Recipe(steps=arguments.steps), arguments.out)
    save_model(model, tokenizer, arguments.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, trained in {time.perf_counter() - started:.0f} s")
    print(f"perplexity on held-out text: {held_out_perplexity(model, tokenizer):.3f} per token")
    for prompt in SAMPLE_PROMPTS:
        print(f"\n> {prompt}\n{continue_greedily(model, tokenizer, prompt)}")


if __name__ == "__main__":
    main()
