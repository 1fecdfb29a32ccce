"""The demo model: an ordinary Hugging Face directory that travels with the package.

Owns where the files are, and nothing else: whoever reads them decides how. It must not import torch.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).resolve().parent
"""The directory with config.json, model.safetensors, tokenizer.json and the chat template."""
