"""Why serving can't start, as exit statuses and sentences."""

from __future__ import annotations

EXIT_CONFIG = 2  # the configuration is wrong (also click's status for wrong usage)
EXIT_RESOURCE = 3  # an address, folder, file or memory that is needed isn't to be had
EXIT_MODELS = 4  # the model bundle is refused
EXIT_ARENA = 5  # the arena was cut short while serving


class StartupError(Exception):
    """Serving can't start. The text names what is wrong and the remedy; `status` is the exit status."""

    def __init__(self, message: str, status: int = EXIT_RESOURCE) -> None:
        super().__init__(message)
        self.status = status
