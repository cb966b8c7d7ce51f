"""Ship configs/ inside the wheel as bmkit/configs; a checkout reads it where it is."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShipConfigs(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["configs"] = "bmkit/configs"
