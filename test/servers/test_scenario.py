"""Does the demo's scenario hold on real SGLang servers, from a client's request to each metric on /metrics?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
from kit.paths import CHECKOUT

from demo import scenario, servers, tiny_model
from tools import environment

OURS = "sglang:failed_session"
# Two pairs of servers import for a minute each; making their environment has a deadline of its own.
pytestmark = pytest.mark.timeout(900)


class Silent:
    """A Report that nobody reads."""

    def event(self, who: str, what: str) -> None:
        """Nothing."""

    def status(self, what: str) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True)
class Story:
    """The scenario on a pair of servers, and /metrics of prefill before and after it."""

    outcome: scenario.Outcome
    before: dict[str, float]
    after: dict[str, float]

    def names(self) -> set[str]:
        """The metrics that are no metrics of ours."""
        names = {series.partition("{")[0] for series in self.after}
        return {name for name in names if not name.startswith(OURS)}


@pytest.fixture(scope="module", params=[environment.SHARED_RELEASE, "0.5.12.post1"])
def play(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Story]:
    """Plays the scenario on a release, with the feature or without it."""
    folder = tmp_path_factory.mktemp("servers")
    name = f"sglang-{request.param}"
    wheel = environment.built_wheel("engines", CHECKOUT, folder / "wheel")
    python = environment.with_wheel(name, wheel, folder / "venv")
    tiny_model.write(folder / "model")

    def play(feature: bool) -> Story:
        for attempt in range(2):  # a machine that stands still for seconds spoils one of two, a defect both
            logs = folder / f"logs-{feature}-{attempt}"
            with servers.running(python, request.param, feature, folder / "model", logs, Silent()) as pair:
                before = pair.metrics()
                story = Story(scenario.play(pair, feature, Silent()), before, settled(pair))
            if not story.outcome.problems():
                break
        return story

    return play


@pytest.fixture(scope="module")
def with_us(play: Callable[[bool], Story]) -> Story:
    """With the feature."""
    return play(True)


@pytest.fixture(scope="module")
def without(play: Callable[[bool], Story]) -> Story:
    """Without the feature."""
    return play(False)


newest = pytest.mark.parametrize("play", [environment.SHARED_RELEASE], indirect=True, scope="module")


def settled(pair: servers.ServerPair) -> dict[str, float]:
    """/metrics when no probe is under way any more, where that is told."""
    deadline = time.monotonic() + 10
    while (seen := pair.metrics()).get(f"{OURS}_probes_in_flight") and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen


def test_a_request_is_served_again_soon_after_the_decode_scheduler_goes_on(with_us: Story) -> None:
    seen = with_us.outcome
    assert seen.problems() == []
    assert seen.served_after_s is not None
    assert seen.served_after_s < 10


def test_every_metric_is_there_from_the_start_and_tells_of_the_fault(with_us: Story) -> None:
    before, after = with_us.before, with_us.after
    ours = {series for series in after if series.startswith(OURS)}
    assert ours == {series for series in before if series.startswith(OURS)}, "an alert on it has no data until a fault"
    assert {series for series in ours if before[series]} == {f"{OURS}_probes_limit"}
    told = {series.removeprefix(OURS): after[series] for series in ours if "_bucket" not in series}
    answered = told['_probes_total{result="answered"}']
    assert answered >= 3, "two probes and the reads after the second let it in"
    assert (
        2 <= told["_probe_duration_seconds_count"] < sum(count for series, count in told.items() if "result=" in series)
    )
    assert 1 < told["_outage_duration_seconds_sum"] < 60
    assert {name: told[name] for name in EXPECTED} == EXPECTED


EXPECTED = {
    "_blacklistings_total": 1,
    "_recoveries_total": 1,
    "_drops_total": 0,
    "_relapses_total": 0,
    "_unproven_recoveries_total": 0,
    "s_blacklisted": 0,
    "_probes_in_flight": 0,
    "_outage_duration_seconds_count": 1,
    '_probes_total{result="error"}': 0,
    '_probes_total{result="unavailable"}': 0,
}


@newest
def test_sglangs_own_metrics_are_those_that_it_has_without_us(with_us: Story, without: Story) -> None:
    assert without.names() >= {"sglang:num_requests_total", "sglang:num_running_reqs"}, "SGLang tells nothing here"
    assert with_us.names() == without.names()


@newest
def test_without_the_feature_there_is_no_metric_of_ours(without: Story) -> None:
    ours = {series.partition("{")[0] for series in without.after if series.startswith(OURS)}
    assert ours <= {scenario.COUNTER}, "only SGLang's own"
