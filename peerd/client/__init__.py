"""The light client library: the daemon's local API for Python, with nothing but the standard library.

Must import nothing of ours but the version and the exit codes, so that commands stay small and anybody can copy it.
"""

from peerd.client.client import Client
from peerd.client.errors import ApiError, BadAnswer, ClientError, DaemonLost, DaemonNotRunning, SocketRefused

__all__ = ["ApiError", "BadAnswer", "Client", "ClientError", "DaemonLost", "DaemonNotRunning", "SocketRefused"]
