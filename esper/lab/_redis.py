"""Redis, with a log on the disk of every change."""

from esper.lab._asked import HOST
from esper.lab._errors import LabError
from esper.lab._folder import LabFolder, write_whole
from esper.lab._programs import Programs
from esper.lab._secrets import LabSecrets
from esper.lab._server import NotReady, Server


def redis_url(port: int, secrets: LabSecrets) -> str:
    """Where Redis is, with its password."""
    return f"redis://:{secrets.redis}@{HOST}:{port}/0"


def redis_server(folder: LabFolder, port: int, secrets: LabSecrets, programs: Programs) -> Server:
    """The server. Its settings are a file, because its password must not be on a command line."""
    settings = folder.redis / "redis.conf"
    write_whole(
        settings,
        f"bind {HOST}\n"
        f"port {port}\n"
        f"requirepass {secrets.redis}\n"
        "dir .\n"
        "appendonly yes\n"
        # What was acknowledged is on the disk: with `everysec`, up to two seconds may not be.
        "appendfsync always\n"
        'save ""\n'
        "maxmemory-policy noeviction\n",
    )
    return Server(
        name="redis",
        shown="Redis",
        command=(str(programs.redis), str(settings)),
        folder=folder.redis,
        check=lambda: _check(port, secrets),
        port=port,
    )


def _check(port: int, secrets: LabSecrets) -> None:
    import redis
    import redis.exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis(
        host=HOST, port=port, password=secrets.redis, socket_timeout=2, retry=Retry(NoBackoff(), 0)
    )
    try:
        client.ping()
    except redis.exceptions.AuthenticationError as error:
        raise LabError(
            f"Redis refuses its password ({error}): another Redis listens at port {port}"
        ) from None
    except redis.exceptions.RedisError as error:
        raise NotReady(str(error)) from None
    finally:
        client.close()
