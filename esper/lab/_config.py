"""What the users of a lab, and its service, are configured with."""

from typing import Any

import yaml

from esper.lab._asked import Asked
from esper.lab._folder import LabFolder, write_whole
from esper.lab._postgres import postgres_url
from esper.lab._redis import redis_url
from esper.lab._s3 import BUCKET, REGION, s3_endpoint
from esper.lab._secrets import LabSecrets
from esper.lab._urza import service_url


def user_config(asked: Asked, secrets: LabSecrets, token: str) -> dict[str, Any]:
    """The library over HTTP, and the bus."""
    return {
        "library": {"where": service_url(asked.ports["urza"]), "token": token},
        "bus": {"url": redis_url(asked.ports["redis"], secrets)},
    }


def service_config(folder: LabFolder, asked: Asked, secrets: LabSecrets) -> dict[str, Any]:
    """The library's database and bucket themselves."""
    return {
        "library": {
            "database": postgres_url(asked.ports["postgres"], secrets),
            "blobs": f"s3://{BUCKET}/library",
            "s3": {
                "endpoint": s3_endpoint(asked.ports["s3"]),
                "region": REGION,
                "access_key_id": secrets.s3_key,
                "secret_access_key": secrets.s3_secret,
            },
        },
        "bus": {"url": redis_url(asked.ports["redis"], secrets)},
        "serve": {"port": asked.ports["urza"], "token_file": str(folder.tokens)},
    }


def write_configs(folder: LabFolder, asked: Asked, secrets: LabSecrets) -> None:
    """Write them where the lab's users and its service look for them, for their owner alone."""
    for path, config in (
        (folder.config, user_config(asked, secrets, secrets.user_token)),
        (folder.worker_config, user_config(asked, secrets, secrets.worker_token)),
        (folder.service_config, service_config(folder, asked, secrets)),
    ):
        text = yaml.safe_dump(config, sort_keys=False)
        write_whole(path, f"# Written by the lab whenever it comes up: changes are lost.\n{text}")
