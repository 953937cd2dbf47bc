"""The lab's own tokens in the file that its service knows them from; those of others stay."""

import hashlib
import json
import time
from typing import Any

from esper.lab._errors import LabInputError
from esper.lab._folder import LabFolder, write_whole
from esper.lab._secrets import LabSecrets


def write_tokens(folder: LabFolder, secrets: LabSecrets) -> None:
    """Have the lab's users, workers and administrator known to the service.

    Raises:
        LabInputError: where the file holds something else.
        LabError: where it cannot be written.
    """
    known = _known(folder)
    wanted = {
        "lab": ("write", secrets.user_token),
        "lab-worker": ("write", secrets.worker_token),
        "lab-admin": ("admin", secrets.admin_token),
    }
    digests = {name: (scope, _digest(token)) for name, (scope, token) in wanted.items()}
    there = {token["name"]: (token["scope"], token["sha256"]) for token in known}
    if digests.items() <= there.items():
        return
    own = [
        {"name": name, "scope": scope, "sha256": digest, "created": time.time()}
        for name, (scope, digest) in digests.items()
    ]
    others = [token for token in known if token["name"] not in wanted]
    text = json.dumps({"schema_version": 1, "tokens": [*others, *own]}, indent=1)
    write_whole(folder.tokens, text + "\n")


def _known(folder: LabFolder) -> list[dict[str, Any]]:
    try:
        data = json.loads(folder.tokens.read_text(encoding="utf-8"))
        tokens = list(data["tokens"])
        if data["schema_version"] != 1 or not all(
            isinstance(token[key], str) for token in tokens for key in ("name", "scope", "sha256")
        ):
            raise ValueError("it is of another version, or of something else")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabInputError(
            f"{folder.tokens} is no file of tokens ({error}): put it back from a copy, or remove"
            " it; tokens that were made for others are worthless then"
        ) from error
    return tokens


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
