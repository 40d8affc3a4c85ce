"""How does the patch get into a running SGLang? Imported at interpreter start, so it costs nothing when it is off."""

import os

SWITCH = "SGLANG_ENABLE_FAILED_SESSION_PROBE"
# SGLang itself knows fewer words than we allow; it reads 1 and 0.
ON_WORDS = ("true", "1", "yes", "y", "on")
OFF_WORDS = ("false", "0", "no", "n", "off")


def activate() -> None:
    """Puts the patch into SGLang if the switch is on: now where SGLang is imported already, else when it is.

    Both doors call this: the plugin entry point and the .pth file. May be called again. Imports SGLang never.
    """
    value = os.environ.get(SWITCH, "").strip().lower()
    if value in ON_WORDS:
        os.environ[SWITCH] = "1"
    elif value in OFF_WORDS:
        os.environ[SWITCH] = "0"
    # Any other value goes on, and stops the prefill node with a sentence when its manager is made.
    if value and value not in OFF_WORDS:
        from sglang_failed_session_probe import patch

        patch.install()


def deactivate() -> None:
    """Gives SGLang its own classes back. Managers that were made meanwhile keep their probe."""
    from sglang_failed_session_probe import patch

    patch.uninstall()
