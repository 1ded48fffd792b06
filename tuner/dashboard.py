"""Serves optuna-dashboard for a study."""

import signal
import socket

import optuna_dashboard

from ds_tune.objectives.errors import UsageError
from ds_tune.storage.database import open_storage

HOST = "127.0.0.1"
"""The dashboard has no authentication and can delete studies: it is for this machine's user only."""


def serve(storage_url: str, port: int) -> None:
    """Serves until interrupted.

    Raises:
        UsageError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:  # OverflowError: 65536 or more
            why = getattr(error, "strerror", None) or "ports end at 65535"
            raise UsageError(f"`port={port}` cannot be used ({why}); name another one") from error
    # Started in the background of a script, a process ignores Ctrl-C; this one promises to end by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"optuna-dashboard on http://{HOST}:{port}/dashboard/ (Ctrl-C ends it)", flush=True)
    optuna_dashboard.run_server(open_storage(storage_url, reading=True), host=HOST, port=port)
