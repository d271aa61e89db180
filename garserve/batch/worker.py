"""A worker process: `python -m garserve.batch.worker FD`, on a socket that it inherits. Bundles in, parcels out.

Messages are JSON and arrays. The first one says how to prepare.
"""

import json
import signal
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from garserve.batch.bundles import Bundle
from garserve.batch.parcel import Parcel, array_count
from garserve.batch.record import Member, Record


def send_bundle(connection: Connection, bundle: Bundle) -> None:
    """Send a bundle to a worker that waits for one."""
    image = bundle.records[0].image
    described: Any = {"bytes": True} if isinstance(image, bytes) else image
    if isinstance(image, Member):
        described = {"member": asdict(image)}
    # One image for all; records that came without one have an error, and do not get here.
    records = [{**record.__dict__, "image": "", "options": dict(record.options)} for record in bundle.records]
    header = {"image": described, "records": records, "wanted": bundle.wanted}
    connection.send_bytes(json.dumps(header).encode())
    if isinstance(image, bytes):
        connection.send_bytes(image)


def receive_bundle(connection: Connection) -> Bundle:
    """Wait for a bundle; EOFError where the other side is gone."""
    data = json.loads(connection.recv_bytes())
    image = data["image"]
    if isinstance(image, dict):
        image = Member(**image["member"]) if "member" in image else connection.recv_bytes()
    records = [Record(**{**one, "image": image, "regions": tuple(one["regions"])}) for one in data["records"]]
    return Bundle(tuple(records), tuple(data["wanted"]))


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
