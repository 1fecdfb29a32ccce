"""yamux: many streams on one connection (libp2p specs: yamux/README). Pure."""
