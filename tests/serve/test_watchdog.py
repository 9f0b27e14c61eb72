"""When the engine counts as standing still, and how often it is started again."""

from graphmode.serve.messages import Alive
from graphmode.serve.watchdog import LONGEST_STEP, START_SECONDS, Restarts, Watchdog

TICK = 0.25


def seconds_until_stalled(watchdog: Watchdog, beats: object, most: float = 1000.0) -> float | None:
    """Let time pass with a sign of life a tick, as ``beats(tick)`` gives them; return when it counts as stalled."""
    for tick in range(int(most / TICK)):
        if (alive := beats(tick)) is not None:  # type: ignore[operator]
            watchdog.heard(alive)
        if watchdog.passed(TICK) is not None:
            return (tick + 1) * TICK
    return None


def test_silence_is_a_standstill_at_work_and_at_rest() -> None:
    for busy in (True, False):
        watchdog = Watchdog(5.0, ready=True)
        watchdog.heard(Alive(1, 1, busy))
        assert seconds_until_stalled(watchdog, lambda tick: None) == 5.0


def test_an_engine_that_steps_is_well_and_so_is_one_at_rest() -> None:
    assert seconds_until_stalled(Watchdog(5.0, ready=True), lambda tick: Alive(tick, 0, True)) is None
    assert seconds_until_stalled(Watchdog(5.0, ready=True), lambda tick: Alive(7, 0, False)) is None


def test_a_thread_that_does_not_move_in_a_step_stands_still() -> None:
    assert seconds_until_stalled(Watchdog(5.0, ready=True), lambda tick: Alive(7, 3, True)) == 5.0


def test_a_long_step_that_moves_is_no_standstill_until_it_is_much_too_long() -> None:
    seconds = seconds_until_stalled(Watchdog(5.0, ready=True), lambda tick: Alive(7, tick // 8, True))
    assert seconds == 5.0 * LONGEST_STEP


def test_rest_between_two_steps_does_not_count_for_the_second() -> None:
    watchdog = Watchdog(5.0, ready=True)
    assert seconds_until_stalled(watchdog, lambda tick: Alive(7, 3, False), most=100) is None
    assert seconds_until_stalled(watchdog, lambda tick: Alive(7, 3, True)) == 5.0


def test_a_start_may_wait_for_weights_but_not_be_silent_nor_hang_in_a_capture() -> None:
    assert seconds_until_stalled(Watchdog(5.0), lambda tick: Alive(0, 0, True)) is None
    assert seconds_until_stalled(Watchdog(5.0), lambda tick: None) == START_SECONDS
    assert seconds_until_stalled(Watchdog(5.0, capturing=True), lambda tick: Alive(0, 0, True)) == START_SECONDS


def test_time_in_which_this_process_itself_did_not_run_is_not_counted() -> None:
    watchdog = Watchdog(5.0, ready=True)
    watchdog.heard(Alive(1, 1, True))
    assert watchdog.passed(3600.0) is None
    watchdog.heard(Alive(2, 1, True))
    assert watchdog.passed(TICK) is None


def test_restarts_wait_longer_each_time_and_are_bounded_within_a_time() -> None:
    restarts = Restarts(most=3, seconds=100.0, first_wait=1.0)
    assert [restarts.next_wait(now) for now in (0.0, 10.0, 20.0, 30.0)] == [1.0, 2.0, 4.0, None]
    assert restarts.next_wait(105.0) == 4.0  # that of 0.0 is long ago
    assert Restarts(most=0).next_wait(0.0) is None
