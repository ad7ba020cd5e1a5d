"""Stands where the package s3fs would: the buckets are folders of $BUCKETS. fsspec finds it by its name, here and in
spawned workers, as it finds the real one."""

import os

from fsspec.implementations.local import LocalFileSystem

__version__ = "2026.0"


class S3FileSystem(LocalFileSystem):
    protocol = ("s3", "s3a")

    @classmethod
    def _strip_protocol(cls, path):
        bucket = os.fspath(path).removeprefix("s3://")
        return super()._strip_protocol(path if bucket == path else f"{os.environ['BUCKETS']}/{bucket}")
