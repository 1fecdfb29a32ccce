"""`transformers` models whose blocks are other people's: forward, backward and generate through the daemon's socket.

The only part of the client library that needs torch; nothing of ours imports it. docs/training.md, section 7.
"""

from peerd.client.torch.cache import RemoteCache
from peerd.client.torch.model import RemoteModelForCausalLM
from peerd.client.torch.span import RemoteBlocks

__all__ = ["RemoteBlocks", "RemoteCache", "RemoteModelForCausalLM"]
