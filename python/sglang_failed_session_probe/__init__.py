"""How does the patch get into a running SGLang? Imported at interpreter start, so it costs nothing when it is off."""

import os

SWITCH = "SGLANG_ENABLE_FAILED_SESSION_PROBE"
# SGLang itself knows fewer words than we allow; it reads 1 and 0.
ON_WORDS = ("true", "1", "yes", "y", "on")
OFF_WORDS = ("false", "0", "no", "n", "off")


def activate() -> None:
    """Patches SGLang if the switch is on: at once where SGLang is imported already, else when it is.

    The plugin entry point and the .pth file both call this. May be called again. Never imports SGLang.
    """
    value = os.environ.get(SWITCH, "").strip().lower()
    if value in ON_WORDS:
        os.environ[SWITCH] = "1"
    elif value in OFF_WORDS:
        os.environ[SWITCH] = "0"
    # With any other value the prefill node stops with a sentence when it makes its manager.
    if value and value not in OFF_WORDS:
        from sglang_failed_session_probe import patch

        patch.install()


def deactivate() -> None:
    """Takes every change of SGLang back. Managers that were made before keep their probe."""
    from sglang_failed_session_probe import patch

    patch.uninstall()
