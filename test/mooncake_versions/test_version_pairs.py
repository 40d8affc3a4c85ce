"""Who recovers, and what is told, with one version of Mooncake on the prefill node and another on the decode node?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from version_pairs import FIRST_THAT_ACKNOWLEDGES, FIRST_THAT_ANSWERS, FIRST_THAT_ASKS, SERVED, VERSIONS, Seen

See = Callable[[str, str], Seen]

PAIRS = [(prefill, decode) for decode in VERSIONS for prefill in VERSIONS]  # all of a decode node's at once
# The older one closes each connection after a transfer, the newer one keeps it.
UNABLE = [("0.3.13.post1", "0.3.9"), ("0.3.14", "0.3.9")]


def since(version: str) -> list[str]:
    return VERSIONS[VERSIONS.index(version) :]


ABLE = [pair for pair in PAIRS if pair not in UNABLE]
HEALING = [(p, d) for p, d in ABLE if p in since(FIRST_THAT_ASKS) and d in since(FIRST_THAT_ANSWERS)]
UNABLE_TO_ASK = [(p, d) for p, d in ABLE if p not in since(FIRST_THAT_ASKS)]
UNANSWERED = [(p, d) for p, d in ABLE if p in since(FIRST_THAT_ASKS) and d not in since(FIRST_THAT_ANSWERS)]
ACKNOWLEDGED = [(p, d) for p, d in ABLE if {p, d} <= set(since(FIRST_THAT_ACKNOWLEDGES))]
CUT_SHORT = "takes connections but cuts every probe short"


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_a_request_is_served_unless_the_versions_cannot_transfer_at_all(see: See, prefill: str, decode: str) -> None:
    outcome = see(prefill, decode).request
    if (prefill, decode) in UNABLE:  # 0.3.14 calls some of them a success, and the bytes never arrive
        assert outcome in ("fails", "success without its bytes")
    else:
        assert outcome == SERVED


@pytest.mark.parametrize(("prefill", "decode"), HEALING)
def test_who_asks_lets_in_who_answers_and_serves_the_next_request(see: See, prefill: str, decode: str) -> None:
    seen = see(prefill, decode)
    assert (seen.while_rejected, seen.refused) == ("fails", "refused")
    assert seen.let_in_after_s is not None, "still refused though the fault is over"
    assert seen.let_in_after_s < 4
    assert seen.request_after == SERVED
    assert any("recovered via probe" in line for line in seen.said)
    assert not any(CUT_SHORT in line for line in seen.said)


@pytest.mark.parametrize(("prefill", "decode"), HEALING)
def test_no_request_is_let_through_to_a_shut_data_port_of_any_version(see: See, prefill: str, decode: str) -> None:
    seen = see(prefill, decode)
    assert seen.while_data_port_is_shut == "refused"
    assert seen.request_after_shut_data_port == SERVED


@pytest.mark.parametrize(("prefill", "decode"), UNABLE_TO_ASK)
def test_who_cannot_ask_says_so_once_and_lets_in_who_registers(see: See, prefill: str, decode: str) -> None:
    seen = see(prefill, decode)
    (warning,) = seen.said_at_start
    assert f"{prefill} cannot probe" in warning
    assert f"install Mooncake {FIRST_THAT_ASKS} or later" in warning
    assert (seen.while_rejected, seen.refused, seen.let_in_after_s) == ("fails", "refused", None)
    assert any("stays out until it registers again" in line for line in seen.said)
    assert seen.request_with_registration == SERVED


@pytest.mark.parametrize(("prefill", "decode"), [*UNANSWERED, UNABLE[0]])
def test_who_asks_in_vain_tells_which_decode_node_is_too_old(see: See, prefill: str, decode: str) -> None:
    told = [line for line in see(prefill, decode).said if CUT_SHORT in line]
    assert told, "the session stays blacklisted and nothing says why"
    assert f"before {FIRST_THAT_ANSWERS}" in told[0]


@pytest.mark.parametrize(("prefill", "decode"), UNANSWERED)
def test_who_does_not_answer_is_let_in_when_it_registers(see: See, prefill: str, decode: str) -> None:
    seen = see(prefill, decode)
    assert (seen.while_rejected, seen.refused, seen.let_in_after_s) == ("fails", "refused", None)
    assert seen.request_with_registration == SERVED


@pytest.mark.parametrize(("prefill", "decode"), ABLE)
def test_a_stopped_decode_is_noticed_only_where_both_versions_acknowledge(see: See, prefill: str, decode: str) -> None:
    seen = see(prefill, decode)
    assert seen.while_stopped == ("fails" if (prefill, decode) in ACKNOWLEDGED else "success")
    assert seen.request_after_stop == SERVED
