"""Noise XX with the libp2p payload (libp2p specs: noise/README). Pure."""
