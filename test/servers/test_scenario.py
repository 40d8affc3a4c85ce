"""Does the demo's scenario hold on real SGLang servers, from a client's request to the counter on /metrics?"""

from __future__ import annotations

import pathlib

import pytest

from demo import scenario, servers, tiny_model
from tools import environment

CHECKOUT = pathlib.Path(__file__).parents[2]


class Silent:
    """A Report that nobody reads."""

    def event(self, who: str, what: str) -> None:
        """Nothing."""

    def status(self, what: str) -> None:
        """Nothing."""


@pytest.mark.timeout(600)  # two servers import for a minute; making their environment has a deadline of its own
def test_a_request_is_served_again_soon_after_the_decode_scheduler_goes_on(tmp_path: pathlib.Path) -> None:
    release = environment.SHARED_RELEASE
    wheel = environment.built_wheel("engines", CHECKOUT, tmp_path / "wheel")
    python = environment.with_wheel(f"sglang-{release}", wheel, tmp_path / "venv")
    tiny_model.write(tmp_path / "model")
    with servers.running(python, release, True, tmp_path / "model", tmp_path / "logs", Silent()) as pair:
        seen = scenario.play(pair, True, Silent())
    assert seen.problems() == []
    assert seen.served_after_s is not None
    assert seen.served_after_s < 10
