"""S3: rclone on a folder, with a key that each request is signed with.

What a bucket holds are files of the same names, and stays when the server ends. This server
overwrites where a put asks for an absent object (If-None-Match is not heeded), which is harmless
for objects that are named by their content, as Esper's are.
"""

import http.client

from esper.lab._asked import HOST
from esper.lab._errors import LabError
from esper.lab._folder import LabFolder
from esper.lab._programs import Programs
from esper.lab._secrets import LabSecrets
from esper.lab._server import NotReady, Server

BUCKET = "esper"
REGION = "us-east-1"
"""Any will do for rclone; clients want to be told one."""


def s3_endpoint(port: int) -> str:
    """Where the service is."""
    return f"http://{HOST}:{port}"


def s3_server(folder: LabFolder, port: int, secrets: LabSecrets, programs: Programs) -> Server:
    """The server; its bucket is a folder."""
    return Server(
        name="s3",
        shown="S3 (rclone)",
        command=(str(programs.rclone), "serve", "s3", "--addr", f"{HOST}:{port}", str(folder.s3)),
        folder=folder.root,
        check=lambda: _check(port),
        port=port,
        environment={
            "RCLONE_CONFIG": "/dev/null",
            "RCLONE_AUTH_KEY": f'"{secrets.s3_key},{secrets.s3_secret}"',
        },
        begin=lambda run: (folder.s3 / BUCKET).mkdir(mode=0o700, exist_ok=True),
    )


def _check(port: int) -> None:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        answer.read(1 << 16)
    except (OSError, http.client.HTTPException) as error:
        raise NotReady(str(error) or type(error).__name__) from None
    finally:
        connection.close()
    if answer.status not in (400, 403):
        raise LabError(
            f"the S3 service at port {port} answers a request without a signature with"
            f" {answer.status}; 400 or 403 is expected: another program listens there"
        )
