"""Addresses that hold passwords, which are shown without them."""

from pydantic import Secret

from esper.settings._password import without_password


class SecretUrl(Secret[str]):
    """An address that may hold a password; shown without it."""

    def _display(self) -> str:
        return without_password(self.get_secret_value(), whole=True)
