"""Do the rules say what they are to say of histories, by Prometheus' own tool?"""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
from kit import deployed


def promtool(programs: pathlib.Path, *arguments: str) -> None:
    done = subprocess.run(
        [programs / "promtool", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("rules", [deployed.ALERTS, deployed.RECORDING], ids=lambda path: path.stem)
def test_prometheus_takes_the_rules(programs: pathlib.Path, rules: pathlib.Path) -> None:
    promtool(programs, "check", "rules", "--lint=all", "--lint-fatal", str(rules))


@pytest.mark.parametrize("histories", deployed.RULE_TESTS, ids=lambda path: path.stem)
def test_an_alert_fires_when_it_must_and_only_then(programs: pathlib.Path, histories: pathlib.Path) -> None:
    promtool(programs, "test", "rules", str(histories))


@pytest.mark.parametrize("alert", deployed.alert_names())
def test_every_alert_has_histories_in_which_it_fires_and_in_which_it_is_silent(alert: str) -> None:
    histories = "\n".join(path.read_text() for path in deployed.RULE_TESTS)
    assert f"alertname: {alert}\n" in histories, f"no history shows what an on-call is told by {alert}"
    never = rf'count_over_time\(ALERTS{{alertname="{alert}".*exp_samples: \[\]'
    assert re.search(never, histories), f"no history shows that {alert} is silent when nothing is wrong"
