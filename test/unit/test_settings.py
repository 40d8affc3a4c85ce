"""Which values of the settings are allowed, and what is an operator told about the others?"""

from __future__ import annotations

import pytest
from sglang.srt.environ import FailedSessionProbeSettings
from virtual_prober import Peer, VirtualProber

ENABLE = "SGLANG_ENABLE_FAILED_SESSION_PROBE"
INTERVAL = "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S"
MAX_INTERVAL = "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S"
IDLE_TIMEOUT = "SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S"
SETTLE = "SGLANG_FAILED_SESSION_PROBE_SETTLE_S"
VERIFY = "SGLANG_FAILED_SESSION_PROBE_VERIFY"
CONCURRENCY = "SGLANG_FAILED_SESSION_PROBE_CONCURRENCY"

FLAGS = [ENABLE, VERIFY]
DURATIONS = [INTERVAL, MAX_INTERVAL, IDLE_TIMEOUT, SETTLE]


def read(**environment: str) -> FailedSessionProbeSettings:
    return FailedSessionProbeSettings.from_environment(environment)


def test_without_a_variable_the_feature_is_off_and_the_defaults_are_those_of_the_readme() -> None:
    assert read() == FailedSessionProbeSettings(
        enabled=False,
        interval_s=30.0,
        max_interval_s=300.0,
        idle_timeout_s=600.0,
        settle_s=1.0,
        verify=True,
        concurrency=16,
    )


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_value_counts_as_unset(empty: str) -> None:
    assert read(**dict.fromkeys([*FLAGS, *DURATIONS, CONCURRENCY], empty)) == read()


@pytest.mark.parametrize("word", ["true", "1", "yes", "y", "on", "TRUE", "True", "Yes", "Y", "ON", " on "])
def test_words_that_switch_on(word: str) -> None:
    settings = read(**{ENABLE: word, VERIFY: word})
    assert (settings.enabled, settings.verify) == (True, True)


@pytest.mark.parametrize("word", ["false", "0", "no", "n", "off", "FALSE", "False", "No", "N", "OFF", " off "])
def test_words_that_switch_off(word: str) -> None:
    settings = read(**{ENABLE: word, VERIFY: word})
    assert (settings.enabled, settings.verify) == (False, False)


def test_every_value_arrives_where_it_belongs() -> None:
    values = {INTERVAL: "2.5", MAX_INTERVAL: "1e2", IDLE_TIMEOUT: "60", SETTLE: "0", CONCURRENCY: "4"}
    settings = read(**values, **{ENABLE: "1", VERIFY: "0"})
    assert settings == FailedSessionProbeSettings(True, 2.5, 100.0, 60.0, 0.0, False, 4)
    assert str(settings) == "interval=2.5s max_interval=100s idle_timeout=60s settle=0s verify=off concurrency=4"


def test_interval_may_be_as_long_as_max_interval() -> None:
    assert read(**{INTERVAL: "300"}).interval_s == 300.0


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *((name, value, "true/1/yes/y/on or false/0/no/n/off") for name in FLAGS for value in ["maybe", "2", "-1"]),
        *(
            (name, value, "finite")
            for name in DURATIONS
            for value in [
                "nan",
                "inf",
                "Infinity",
                "-inf",
                "-1",
                "+1",
                "abc",
                "1e999",
                "9" * 250 + "e99",
                "3s",
                "1_0",
                "0x10",
                "1,5",
            ]
        ),
        *(
            (name, value, "such as 2.5")
            for name in DURATIONS
            for value in [
                "\u0663",
                "\uff11",
                "1\u00a02",
                "1 2",
                "1e",
                "e1",
                ".",
                "1.2.3",
                "-0.0",
                "1\n2",
                "\x1b[31m",
                "\udcff",
            ]
        ),
        *((name, value, "greater than 0") for name in DURATIONS[:3] for value in ["0", "-0.0"]),
        *((name, "1e-320", "1e-300 at least") for name in DURATIONS[:3]),
        (SETTLE, "-0.5", "0 or more"),
        *((CONCURRENCY, value, "whole number greater than 0") for value in ["0", "-1", "1.5", "abc", "nan", "\u0664"]),
        *(
            (CONCURRENCY, value, "10000 at most")
            for value in ["00", "+1", "1_0", "1e3", "0x10", "\u00b2", "10001", "9" * 200]
        ),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence_with_the_name_the_value_and_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    with pytest.raises(ValueError, match="is not allowed") as refused:
        read(**{name: value})
    sentence = str(refused.value)
    assert sentence.startswith(f"{name}={value!r} ")
    assert allowed in sentence
    assert_one_sentence(sentence)


@pytest.mark.parametrize("name", [*FLAGS, *DURATIONS, CONCURRENCY])
@pytest.mark.parametrize("value", ["9" * 5000, "x\n" * 5000, "-" + "1" * 5000])
def test_a_long_value_is_cut_in_the_sentence(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="is not allowed") as refused:
        read(**{name: value})
    sentence = str(refused.value)
    assert sentence.startswith(f"{name}={repr(value)[:300]}[...] ")
    assert len(sentence) < 800
    assert_one_sentence(sentence)


def test_whatever_is_allowed_is_a_number_that_can_be_used() -> None:
    values = {
        INTERVAL: "1e-300",
        MAX_INTERVAL: "1e308",
        IDLE_TIMEOUT: " .5\n",
        SETTLE: "1E-2",
        CONCURRENCY: "0" * 5000 + "7",
    }
    settings = read(**values)
    assert (settings.idle_timeout_s, settings.settle_s, settings.concurrency) == (0.5, 0.01, 7)
    assert read(**{CONCURRENCY: "10000", SETTLE: "5.", IDLE_TIMEOUT: "2e+2"}).concurrency == 10000


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["1e-300", "1e-200"])
def test_the_shortest_interval_works(interval: str) -> None:
    prober = VirtualProber(interval_s=read(**{INTERVAL: interval}).interval_s)
    sessions = [f"decode:{port}" for port in range(1, 1001)]
    prober.fail(*sessions, peer=Peer(answers=False))
    prober.run(0.01)
    for session in sessions:
        prober.becomes(session, Peer())
    prober.run(5.0)
    assert not prober.sessions


@pytest.mark.parametrize(
    "values",
    [{INTERVAL: "301"}, {MAX_INTERVAL: "29"}, {INTERVAL: "7", MAX_INTERVAL: "6.5"}, {INTERVAL: "300.000001"}],
)
def test_interval_over_max_interval_is_refused_with_both_values(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must not be greater") as refused:
        read(**values)
    sentence = str(refused.value)
    assert f"{INTERVAL}={values.get(INTERVAL, '30')} " in sentence
    assert f"{MAX_INTERVAL}={values.get(MAX_INTERVAL, '300')}" in sentence
    assert_one_sentence(sentence)


def assert_one_sentence(text: str) -> None:
    assert "\n" not in text
    assert text.count(". ") == 0
    assert text.endswith(".")
