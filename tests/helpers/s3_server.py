"""A real S3 server (moto's) on loopback, which can go away and come back."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from internvl.launchers import find_free_port

BUCKET = "data"


class S3Server:
    """A server whose objects survive while it is stopped."""

    def __init__(self, port: int):
        self.port, self._server = port, None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which s3fs finds the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        if self._server:
            self._server.stop()
        self._server = None

    def upload(self, files: dict[str, Path]) -> None:
        """Store local files under keys of the bucket."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket=BUCKET)
        for key, file in files.items():
            client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())


@contextlib.contextmanager
def serve_s3(monkeypatch) -> Iterator[S3Server]:
    """Start a server; set the environment variables of this process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    S3FileSystem.clear_instance_cache()  # they have the address of an earlier server
    server = S3Server(int(find_free_port()))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    try:
        yield server
    finally:
        server.stop()
