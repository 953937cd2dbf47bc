"""What is configured: a file, the environment over it, and where each value comes from.

Importing it costs nothing: what reads settings is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from esper.settings._found import is_configured

if TYPE_CHECKING:
    from esper.settings._load import (
        Loaded,
        check_settings_file,
        is_secret,
        load_settings,
        shown_value,
    )
    from esper.settings._password import HIDDEN, without_password
    from esper.settings._secret import SecretUrl
    from esper.settings._sections import (
        DEFAULT_LIBRARY,
        BusSettings,
        LibrarySettings,
        LoggingSettings,
        S3Settings,
        Section,
        ServeSettings,
        TamiyoSettings,
        TelemetrySettings,
        WorkerSettings,
    )
    from esper.settings._settings import VARIABLES, Settings, setting_fields, variable_of

__all__ = [
    "DEFAULT_LIBRARY",
    "HIDDEN",
    "VARIABLES",
    "BusSettings",
    "LibrarySettings",
    "Loaded",
    "LoggingSettings",
    "S3Settings",
    "SecretUrl",
    "Section",
    "ServeSettings",
    "Settings",
    "TamiyoSettings",
    "TelemetrySettings",
    "WorkerSettings",
    "check_settings_file",
    "is_configured",
    "is_secret",
    "load_settings",
    "setting_fields",
    "shown_value",
    "variable_of",
    "without_password",
]

_HOMES = ("_password", "_secret", "_sections", "_settings", "_load")


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        for home in _HOMES:
            module = import_module(f"esper.settings.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
