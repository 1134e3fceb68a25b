"""Log lines of a start, of every supported version: phases, durations, and the timeline made of them."""

import pytest

from loraport.clients.engine_phases import DURATIONS, LORA, PHASES, Timeline, durations, phase_of
from tests.fake_engine import STARTS, start_lines


@pytest.mark.parametrize("version", ["0.25", "0.32"])
def test_every_line_begins_its_phase(version: str) -> None:
    for phase, line in start_lines(version):
        index = phase_of(line)
        assert index is not None and PHASES[index][0] == phase, line


def test_lines_that_begin_nothing() -> None:
    for line in ("", "INFO:     Application startup complete.", "WARNING [cpu.py:224] Triton is not installed."):
        assert phase_of(line) is None


def timeline_of(version: str, has_lora: bool) -> Timeline:
    """A start whose lines come a second apart; one comes again and again."""
    timeline = Timeline(has_lora)
    for at, (_, line) in enumerate(start_lines(version), start=1):
        timeline.see(float(at), line)
        timeline.see(float(at), "INFO [model.py:1] Resolved architecture: again")
    timeline.finish(20.0)
    return timeline


def test_a_timeline_adds_up_and_never_goes_back() -> None:
    timeline = timeline_of("0.25", has_lora=True)
    assert sum(timeline.seconds.values()) == 20.0
    assert list(timeline.seconds) == [name for name, _ in PHASES]
    timeline.see_end("verification", 23.0)
    assert timeline.seconds["verification"] == 3.0


@pytest.mark.parametrize("version", ["0.25", "0.32"])
def test_without_lora_there_are_no_slots_to_wait_for(version: str) -> None:
    slotted, plain = (timeline_of(version, has_lora).seconds for has_lora in (True, False))
    assert LORA in slotted and LORA not in plain
    assert plain["weights"] == slotted["weights"] + slotted[LORA] and sum(plain.values()) == sum(slotted.values())


def test_durations_of_both_wordings() -> None:
    assert list(found := durations(STARTS["0.25"])) == [name for name, _ in DURATIONS]
    assert (found["weights"], found["model loading"], found["graph capture"]) == (2.59, 3.6, 34.0)
    assert durations(STARTS["0.32"]) == {"weights": 0.01, "engine in all": 5.91}
    assert durations("Loading weights took 1.5 seconds\nLoading weights took 2.5 seconds") == {"weights": 2.5}
