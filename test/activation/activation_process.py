"""What does our package do to SGLang's modules in a fresh interpreter? Prints the answer as JSON.

    active [plugins]     import the connector, after SGLang's plugins if so asked, and say what runs there
    engine               import the engine's module alone, and say whether the connector came with it
    undone               import the connector unpatched, activate and deactivate, and say what changed

It runs in the environment of an SGLang release, so it imports nothing of the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from typing import Any

CONN = "sglang.srt.disaggregation.mooncake.conn"
ENGINE = "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
OLD_ENGINE = "sglang.srt.disaggregation.mooncake.transfer_engine"  # to 0.5.8.post1
ENVIRON = "sglang.srt.environ"  # not before 0.5.3
MODULES = (CONN, ENGINE, OLD_ENGINE, ENVIRON)
ABSENT = object()


def active(plugins: str = "") -> dict[str, Any]:
    """Where SGLang is imported from, and where the code of the patched methods is."""
    if plugins:
        from sglang.srt.plugins import load_plugins

        load_plugins()
    conn, engine = connector_and_engine()
    return {
        "sglang": sys.modules["sglang"].__file__,
        "conn": conn.__file__,
        "pass": file_of(conn.MooncakeKVManager, "_run_one_probe_pass"),
        "send_probe": file_of(engine.MooncakeTransferEngine, "send_probe"),
        "knows_our_settings": hasattr(sys.modules[ENVIRON].envs, "SGLANG_FAILED_SESSION_PROBE_SETTLE_S"),
    }


def connector_and_engine() -> tuple[Any, Any]:
    connector = importlib.import_module(CONN)
    return connector, sys.modules.get(OLD_ENGINE) or importlib.import_module(ENGINE)


def engine() -> bool:
    """Whether importing the engine's module imports the connector, which SGLang's launcher must not do."""
    importlib.import_module(ENGINE)
    return CONN in sys.modules


def file_of(owner: type, method: str) -> str:
    value = vars(owner).get(method)
    return value.__code__.co_filename if value else ""


def undone() -> dict[str, Any]:
    """Which names have another value after activate(), after a second one, after deactivate(), and after both again."""
    connector_and_engine()
    os.environ["SGLANG_ENABLE_FAILED_SESSION_PROBE"] = "1"
    import sglang_failed_session_probe as door

    stock = names_and_values()
    owners = {owner for owner, _ in stock}

    def of_sglang(names: Names) -> Names:  # our own classes stay, for the managers that were made meanwhile
        return {key: value for key, value in attributes_in(names).items() if key[0] in owners}

    door.activate()
    activated = names_and_values()
    door.activate()
    activated_twice = names_and_values()
    door.deactivate()
    deactivated = names_and_values()
    door.activate()
    activated_again = names_and_values()
    door.deactivate()
    return {
        "globals": changed(globals_in(stock), activated),
        "attributes": changed(attributes_in(activated), stock),
        "by_a_second_activation": changed(activated_twice, activated),
        "left_after_deactivation": changed(of_sglang(deactivated), stock),
        "lost_after_deactivation": changed(attributes_in(stock), deactivated),
        "missing_after_reactivation": sorted(
            set(changed(attributes_in(activated), stock)) - set(changed(attributes_in(activated_again), stock))
        ),
        "left_at_the_end": changed(of_sglang(names_and_values()), stock),
    }


Names = dict[tuple[str, str], Any]


def names_and_values() -> Names:
    """Every global of the modules, and every attribute of their classes and of `envs`, by owner and name."""
    found: Names = {}
    for name in sys.modules.keys() & set(MODULES):
        module = sys.modules[name]
        found.update({(name, key): value for key, value in vars(module).items()})
        owners = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
        for owner in [*owners, getattr(module, "envs", None)]:
            with contextlib.suppress(TypeError):
                label = f"{name}.{getattr(owner, '__name__', 'envs')}"
                found.update({(label, key): value for key, value in vars(owner).items()})
    return found


def globals_in(names: Names) -> Names:
    return {key: value for key, value in names.items() if key[0] in MODULES}


def attributes_in(names: Names) -> Names:
    return {key: value for key, value in names.items() if key not in globals_in(names)}


def changed(names: Names, others: Names) -> list[str]:
    """The names whose value is another object, or none, among the others."""
    return sorted(".".join(key) for key, value in names.items() if others.get(key, ABSENT) is not value)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints goes to stderr
    print(json.dumps({"active": active, "engine": engine, "undone": undone}[sys.argv[1]](*sys.argv[2:])), file=answers)
