"""How does a test get a network of its own?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kit.network import Network, why_no_network


@pytest.fixture
def network() -> Iterator[Network]:
    """A network namespace of the test's own; the test is skipped where there can be none."""
    if why_not := why_no_network():
        pytest.skip(f"no network fault is injected: {why_not}")
    with Network() as network:
        yield network
