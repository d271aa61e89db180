"""A worker process: `python -m garserve.batch.worker FD`, on a socket that it inherits. Bundles in, parcels out.

Messages are JSON and arrays. The first one says how to prepare.
"""

import json
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from garserve.batch.bundles import Bundle
from garserve.batch.parcel import Parcel, array_count
from garserve.batch.wire import has_image, read_bundle


def send_messages(connection: Connection, messages: Sequence[bytes]) -> None:
    """Send a bundle's messages to a worker that waits for one."""
    for message in messages:
        connection.send_bytes(message)


def receive_bundle(connection: Connection) -> Bundle:
    """Wait for a bundle; EOFError where the other side is gone."""
    header = connection.recv_bytes()
    return read_bundle([header, *([connection.recv_bytes()] if has_image(header) else [])])


def send_parcel(connection: Connection, parcel: Parcel) -> None:
    """Send what became of a bundle."""
    for message in parcel.to_messages():
        connection.send_bytes(message)


def receive_parcel(connection: Connection) -> Parcel:
    """Receive a parcel; EOFError or OSError where the worker died."""
    header = connection.recv_bytes()
    return Parcel.from_messages(header, [connection.recv_bytes() for _ in range(array_count(header))])


def main() -> None:
    """Prepare bundles until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the front process decides
    connection = Connection(int(sys.argv[1]))
    import torch

    from garserve.batch.prepare import Preparation, Preparer

    torch.set_num_threads(1)
    preparer = Preparer(Preparation(**json.loads(connection.recv_bytes())))
    while True:
        try:
            bundle = receive_bundle(connection)
            send_parcel(connection, preparer(bundle))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
