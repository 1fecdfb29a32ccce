"""The daemon's HTTP API on a Unix socket (DESIGN 9)."""
