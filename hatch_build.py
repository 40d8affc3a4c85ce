"""What goes into the wheel beside the package: the files for SGLang's modules, and the .pth door."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PTH = "sglang_failed_session_probe.pth"


class Layout(BuildHookInterface):
    """An editable install runs the files where they are in the checkout and gets the .pth door alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; ``version`` is "standard" or "editable"."""
        door = {f"python/{PTH}": PTH}
        build_data["force_include_editable"] = door
        build_data["force_include"] = {"python/sglang": "sglang_failed_session_probe/python/sglang", **door}
