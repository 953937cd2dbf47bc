"""All settings, and their names."""

from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from esper.settings._found import PREFIX
from esper.settings._sections import (
    BusSettings,
    LibrarySettings,
    LoggingSettings,
    ServeSettings,
    TamiyoSettings,
    TelemetrySettings,
    WorkerSettings,
)


class Settings(BaseSettings):
    """All settings: from the environment, else from a file, else by default.

    `load_settings` makes them; without it, the environment alone is read.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        hide_input_in_errors=True,
    )

    library: LibrarySettings = LibrarySettings()
    bus: BusSettings = BusSettings()
    serve: ServeSettings = ServeSettings()
    worker: WorkerSettings = WorkerSettings()
    tamiyo: TamiyoSettings = TamiyoSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    logging: LoggingSettings = LoggingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment over what is given, which is what the file says."""
        return env_settings, init_settings


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def setting_fields(
    model: type[BaseModel] = Settings, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted name, sections themselves left out."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from setting_fields(section, f"{prefix}{name}.")


def variable_of(name: str) -> str:
    """The environment variable of a setting: `library.s3.region` is ESPER_LIBRARY__S3__REGION."""
    return PREFIX + name.upper().replace(".", "__")


VARIABLES = {variable_of(name): name for name, _ in setting_fields()}
"""Every variable that is a setting, and the setting's name."""
