"""The daemon: edge gateway, regional hub, hub."""

from typing import Final

__version__: Final = "0.1.0"
