"""Real servers for tests: on free ports, in temporary folders, gone with the tests."""

from tests.esper.servers._postgres import create_database, postgres_server, postgres_url
from tests.esper.servers._process import Server, free_port, listens, needs
from tests.esper.servers._s3 import (
    SignedS3,
    s3_options,
    s3_server,
    s3_url,
    signed_s3_server,
    signed_s3_url,
)

__all__ = [
    "Server",
    "SignedS3",
    "create_database",
    "free_port",
    "listens",
    "needs",
    "postgres_server",
    "postgres_url",
    "s3_options",
    "s3_server",
    "s3_url",
    "signed_s3_server",
    "signed_s3_url",
]
