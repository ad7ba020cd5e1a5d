"""Fake package s3fs: buckets are folders of $BUCKETS.

fsspec imports it by name, in this process and in spawned workers, as it imports the real one.
"""

import os

from fsspec.implementations.local import LocalFileSystem

__version__ = "2026.0"


class S3FileSystem(LocalFileSystem):
    """Local file system below $BUCKETS under the protocol s3."""

    protocol = ("s3", "s3a")

    @classmethod
    def _strip_protocol(cls, path):
        bucket = os.fspath(path).removeprefix("s3://")
        return super()._strip_protocol(path if bucket == path else f"{os.environ['BUCKETS']}/{bucket}")
