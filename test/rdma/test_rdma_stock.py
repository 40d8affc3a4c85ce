"""Is a decode node used again over RDMA on stock SGLang, with our wheel installed and the switch on?"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

import pytest
from kit.releases import environment, environment_with, wheel  # noqa: F401
from kit.stock_node import ENABLE, Sent, hand_over, is_blacklisted, is_served, send
from machines import Pair
from remote_stock_node import RemoteStockNode
from test_rdma import GIVEN_UP_S, SERVED_WITHIN_S
from trial import THIS_PATCH, Session, Trial

pytestmark = [pytest.mark.timeout(2400), pytest.mark.in_full]
DROPPED_S = 20.0


@pytest.mark.parametrize("release", ["0.5.23", "0.5.12.post1"])
def test_a_decode_node_of_a_stock_release_is_used_again_whose_packets_were_dropped(
    pair: Pair,
    release: str,
    wheel: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
    record: Callable[..., None],
) -> None:
    python = environment.with_wheel(environment_with(release), wheel, tmp_path / "venv")
    settings = {ENABLE: "1", "MC_TRANSFER_TIMEOUT": "5"}
    with (
        RemoteStockNode(pair.prefill, python, "prefill", **settings) as prefill,
        RemoteStockNode(pair.decode, python, "decode", **settings) as decode,
    ):
        prefill.make()
        decode.make()
        assert is_served(prefill, decode), f"no transfer between healthy nodes: {prefill.said()[-3000:]}"
        with pair.dropped(*pair.rdma):
            meanwhile = _requests(prefill, decode, DROPPED_S, until_served=False)
        healed_at = time.monotonic()
        is_out = is_blacklisted(prefill, decode.session)
        afterwards = _requests(prefill, decode, GIVEN_UP_S, until_served=True)
        served_after_s = time.monotonic() - healed_at if afterwards[-1].status == "Success" else None
        prefill.wait_for_record(f"Session {decode.session} recovered via probe")
        recoveries = prefill.ask("counter")["value"]
        is_right = is_served(prefill, decode)
        said, mooncake = "\n".join(prefill.records("ession")), prefill.said()
    lost, lost_after_heal = (sum(map(_was_let_through, sent)) for sent in (meanwhile, afterwards))
    session = Session(max(0, lost - 1), lost_after_heal, served_after_s, [])
    trial = Trial([session], DROPPED_S, said, mooncake)
    record(f"packets dropped, {DROPPED_S:.0f} s, stock managers of SGLang {release}", THIS_PATCH, 5, trial)
    assert lost, f"the fault did no harm: {trial}"
    assert is_out, f"it was let in while its packets were dropped: {trial}"
    assert trial.worst_s() <= SERVED_WITHIN_S, f"a healed decode node was refused for long: {trial}"
    assert lost_after_heal == 0, f"a request was lost to a session that was let in too soon: {trial}"
    assert recoveries == 1
    assert is_right, f"the bytes of a request did not arrive after the recovery: {trial}"


def _requests(prefill: RemoteStockNode, decode: RemoteStockNode, seconds: float, until_served: bool) -> list[Sent]:
    """How one request after another ended, for so long or until one is served."""
    sent: list[Sent] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (until_served and sent and sent[-1].status == "Success"):
        sent.append(send(prefill, hand_over(prefill, decode)))
    return sent


def _was_let_through(sent: Sent) -> bool:
    """It failed, and not because its session was refused."""
    return sent.status != "Success" and "is not alive" not in sent.reason
