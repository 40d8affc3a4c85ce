"""How does the patch get into a running SGLang? Imported at interpreter start, so it costs nothing when it is off."""

import os
import sys

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
        try:
            from sglang_failed_session_probe import patch
        except ImportError:
            if "sglang" in sys.modules:
                raise
            # Python reads the .pth files of a venv, or a user's, before the system's folder is on the path, where wrapt
            # may lie.
            if _WithSGLang not in sys.meta_path:
                sys.meta_path.insert(0, _WithSGLang)
        else:
            patch.install()


class _WithSGLang:
    """Finds no module. It patches SGLang when that is looked for, where it could not be done before."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "sglang":
            return
        try:
            from sglang_failed_session_probe import patch

            patch.install()
        except Exception:
            import logging

            logging.getLogger(__name__).error(
                "Failed-session probe is NOT active: it cannot be loaded. SGLang runs on unpatched; "
                "sglang-failed-session-probe doctor says what is missing",
                exc_info=True,
            )


def deactivate() -> None:
    """Takes every change of SGLang back. Managers that were made before keep their probe."""
    if _WithSGLang in sys.meta_path:
        sys.meta_path.remove(_WithSGLang)
    from sglang_failed_session_probe import patch

    patch.uninstall()
