"""The client of Urza's HTTP service: a library somewhere else, with the interface of one here.

Importing this needs no httpx; making a client does.
"""

from esper.urza.client._clients import DEFAULT_RETRY, AsyncLibraryClient, LibraryClient

__all__ = ["DEFAULT_RETRY", "AsyncLibraryClient", "LibraryClient"]
