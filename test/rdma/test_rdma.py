"""Is a decode node used again over RDMA, first time right, when its fault is over?

The machines are emulated: what takes seconds can be compared. Judged with room; docs/rdma.md has the figures.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from machines import HANDSHAKE, Pair
from trial import BEFORE, LIMIT, NATIVE, THIS_PATCH, Contender, Trial, nodes, play

Record = Callable[..., None]
SERVED_WITHIN_S = 5.0
GIVEN_UP_S = 60.0
# For so long Mooncake itself leaves a device alone whose cable was out.
DEVICE_RESTS_S = 30.0

pytestmark = pytest.mark.timeout(900)


def check(trial: Trial, within_s: float = SERVED_WITHIN_S) -> None:
    """Fails if a session was served late, or a request lost, though the fault was over."""
    assert trial.worst_s() <= within_s, f"a healed decode node was refused for long: {trial}"
    assert trial.lost_after_heal() == 0, f"a request was lost to a session that was let in too soon: {trial}"


def test_a_decode_node_whose_packets_were_dropped_is_used_again(pair: Pair, record: Record) -> None:
    with nodes(pair) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(*pair.rdma), 8, GIVEN_UP_S)
    record("packets dropped, 8 s", THIS_PATCH, 5, trial)
    assert "is blacklisted" in trial.said, f"the fault did no harm: {trial}"
    check(trial)


# Contender, seconds, MC_TRANSFER_TIMEOUT.
DROPPED = [
    *((THIS_PATCH, *row) for row in [(8, 30), (40, 5), (40, 30), (65, 5), (65, 30), (120, 5), (120, 30)]),
    *((other, *row) for other in (LIMIT, BEFORE, NATIVE) for row in [(8, 5), (40, 5), (65, 30)]),
    (LIMIT, 120, 5),
]


@pytest.mark.in_full
@pytest.mark.parametrize(("contender", "seconds", "timeout_s"), DROPPED, ids=str)
def test_a_decode_node_is_used_again_however_long_its_packets_were_dropped(
    pair: Pair, contender: Contender, seconds: int, timeout_s: int, record: Record
) -> None:
    with nodes(pair, contender, timeout_s=timeout_s) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(*pair.rdma), seconds, GIVEN_UP_S)
    record(f"packets dropped, {seconds} s", contender, timeout_s, trial)
    if contender is THIS_PATCH:
        check(trial)


@pytest.mark.in_full
@pytest.mark.parametrize("direction", ["to", "back"])
def test_a_decode_node_is_used_again_whose_packets_were_dropped_one_way(
    pair: Pair, direction: str, record: Record
) -> None:
    with nodes(pair) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(*pair.rdma, direction=direction), 20, GIVEN_UP_S)
    way = {"to": "only those to the decode node", "back": "only those from the decode node"}[direction]
    record(f"packets dropped, 20 s, {way}", THIS_PATCH, 5, trial)
    check(trial)


# Contender, whose cables, seconds.
UNPLUGGED = [
    *((THIS_PATCH, *row) for row in [("decode", 8), ("decode", 40), ("prefill", 8), ("prefill", 40), ("both", 8)]),
    *((LIMIT, *row) for row in [("decode", 8), ("prefill", 8), ("both", 8)]),
    *((BEFORE, *row) for row in [("decode", 8), ("prefill", 8)]),
]


@pytest.mark.in_full
@pytest.mark.parametrize(("contender", "side", "seconds"), UNPLUGGED, ids=str)
def test_a_decode_node_is_used_again_when_a_cable_was_out(
    pair: Pair, contender: Contender, side: str, seconds: int, record: Record
) -> None:
    machines = {"decode": [pair.decode], "prefill": [pair.prefill], "both": [pair.prefill, pair.decode]}[side]

    @contextlib.contextmanager
    def unplugged() -> Iterator[None]:
        with contextlib.ExitStack() as plug_in:
            for machine in machines:
                plug_in.enter_context(machine.unplugged(*pair.rdma))
            yield

    with nodes(pair, contender) as (prefill, decodes):
        trial = play(prefill, decodes, unplugged, seconds, DEVICE_RESTS_S + GIVEN_UP_S)
    whose = "on both sides" if side == "both" else f"on the {side}'s side"
    record(f"cable out {whose}, {seconds} s", contender, 5, trial)
    if contender is THIS_PATCH:
        assert trial.worst_s() <= DEVICE_RESTS_S + SERVED_WITHIN_S, f"refused for long: {trial}"
        lost = trial.lost_before_heal() + trial.lost_after_heal()
        assert lost == 0, f"requests were let through in vain while Mooncake leaves the device alone: {trial}"


@pytest.mark.in_full
def test_a_decode_node_is_used_again_when_all_its_networks_were_dead(pair: Pair, record: Record) -> None:
    with nodes(pair) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(HANDSHAKE, *pair.rdma), 40, GIVEN_UP_S)
    record("packets dropped, 40 s, handshakes' too", THIS_PATCH, 5, trial)
    check(trial)


@pytest.mark.in_full
def test_a_dead_handshake_network_costs_no_request(pair: Pair, record: Record) -> None:
    with nodes(pair) as (prefill, decodes):
        trial = play(prefill, decodes, lambda: pair.dropped(HANDSHAKE), 40, GIVEN_UP_S)
    record("handshakes dropped, 40 s", THIS_PATCH, 5, trial)
    assert "is blacklisted" not in trial.said, f"a request was lost though RDMA went on: {trial}"
    check(trial)


@pytest.mark.in_full
def test_a_decode_process_that_stands_still_costs_no_request(pair: Pair, record: Record) -> None:
    with nodes(pair) as (prefill, decodes):
        trial = play(prefill, decodes, decodes[0].stopped, 40, GIVEN_UP_S)
    record("decode process stopped, 40 s", THIS_PATCH, 5, trial)
    assert "is blacklisted" not in trial.said, f"a request was lost though RDMA went on: {trial}"
    check(trial)


# How long it is back already when it registers. After 30 s it would be let in unverified.
@pytest.mark.in_full
@pytest.mark.parametrize("unregistered_s", [1, 20])
def test_a_decode_node_that_restarts_is_let_in_when_it_registers_and_not_before(
    pair: Pair, unregistered_s: float, record: Record
) -> None:
    with nodes(pair, sessions=2) as (prefill, decodes):
        restarts, stays = decodes

        @contextlib.contextmanager
        def killed() -> Iterator[None]:
            restarts.kill()
            yield
            restarts.restart()
            time.sleep(unregistered_s)
            prefill.register(restarts)

        trial = play(prefill, decodes, killed, 5, GIVEN_UP_S)
    record(f"decode process killed, back, registers {unregistered_s} s later", THIS_PATCH, 5, trial)
    assert f"{restarts.session} is blacklisted" in trial.said, f"no request noticed that it was gone: {trial}"
    restarted, stayed = trial.sessions
    assert restarted.lost_before_heal == 0, f"let in before it registered, and its memory is another now: {trial}"
    check(trial, within_s=1.0)
    assert f"{stays.session} is blacklisted" not in trial.said, (
        f"another decode node's connection was torn down: {trial}"
    )
    assert stayed.served_after_s is not None


@pytest.mark.in_full
def test_a_decode_node_that_restarts_and_does_not_register_is_not_let_in(pair: Pair, record: Record) -> None:
    with nodes(pair) as (prefill, decodes):

        @contextlib.contextmanager
        def killed() -> Iterator[None]:
            decodes[0].kill()
            yield
            decodes[0].restart()

        trial = play(prefill, decodes, killed, 5, served_within_s=20)
    record("decode process killed, back, does not register", THIS_PATCH, 5, trial)
    (session,) = trial.sessions
    lost = session.lost_before_heal + session.lost_after_heal
    assert lost == 0, f"let in because it answers, though its memory is another now: {trial}"
    assert session.served_after_s is None, f"writes reach the memory of a process that is gone: {trial}"
