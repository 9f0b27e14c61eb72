from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph.dispatch import Decision, DispatchPolicy, GraphKey, Mode, Reason, dispatch

BUCKETS = (1, 2, 4, 8, 13)
VARIANT = (("greedy", True),)


def test_every_case_of_a_small_policy() -> None:
    """All sizes, all switches, all states of the key: the decision is the one that the rules give."""
    for size, enabled, ratio, first_use, state in product(
        range(1, 16), (True, False), (None, 0.0, 0.3, 1.0), (True, False), ("captured", "failed", "new")
    ):
        policy = DispatchPolicy({"decode": BUCKETS}, enabled, ratio, first_use)
        bucket = next((bucket for bucket in BUCKETS if bucket >= size), None)
        key = GraphKey("decode", bucket, VARIANT) if bucket else None
        captured = {key: object()} if state == "captured" else {}
        failed = {key: Reason.UNSUPPORTED_OP} if state == "failed" else {}
        if not enabled:
            expected = Decision(Mode.EAGER, None, 0, Reason.DISABLED)
        elif bucket is None:
            expected = Decision(Mode.EAGER, None, 0, Reason.ABOVE_THRESHOLD)
        elif ratio is not None and (bucket - size) / bucket > ratio:
            expected = Decision(Mode.EAGER, key, 0, Reason.PADDING_RATIO)
        elif state == "captured":
            expected = Decision(Mode.REPLAY, key, bucket - size, None)
        elif state == "failed":
            expected = Decision(Mode.EAGER, key, 0, Reason.UNSUPPORTED_OP)
        elif first_use:
            expected = Decision(Mode.CAPTURE, key, bucket - size, Reason.NOT_CAPTURED_YET)
        else:
            expected = Decision(Mode.EAGER, key, 0, Reason.NOT_CAPTURED_YET)
        assert dispatch(size, policy, captured, failed, "decode", VARIANT) == expected


@given(st.sets(st.integers(1, 500), min_size=1), st.integers(1, 600), st.floats(0, 1) | st.none())
def test_the_smallest_bucket_that_holds_the_step_serves_it(sizes: set[int], size: int, ratio: float | None) -> None:
    policy = DispatchPolicy({"f": tuple(sorted(sizes))}, max_padding_ratio=ratio)
    keys = {GraphKey("f", bucket): None for bucket in sizes}
    decision = dispatch(size, policy, keys, {}, "f")
    if decision.mode is Mode.REPLAY:
        assert decision.key is not None
        assert decision.key.size == min(bucket for bucket in sizes if bucket >= size)
        assert decision.padding == decision.key.size - size
        assert decision.reason is None
        assert ratio is None or decision.padding <= ratio * decision.key.size
    else:
        assert decision.padding == 0
        assert decision.reason is not None
        assert size > max(sizes) or ratio is not None


def test_a_family_without_buckets_runs_eagerly() -> None:
    policy = DispatchPolicy({"a": (4,), "b": ()})
    assert dispatch(1, policy, {}, {}, "b") == Decision(Mode.EAGER, None, 0, Reason.DISABLED)


def test_families_and_variants_do_not_serve_each_other() -> None:
    policy = DispatchPolicy({"a": (4,), "b": (4,)}, capture_on_first_use=False)
    captured = {GraphKey("a", 4, (("x", 1),)): None}
    assert dispatch(3, policy, captured, {}, "a", (("x", 1),)).mode is Mode.REPLAY
    assert dispatch(3, policy, captured, {}, "a", (("x", 2),)).reason is Reason.NOT_CAPTURED_YET
    assert dispatch(3, policy, captured, {}, "b", (("x", 1),)).reason is Reason.NOT_CAPTURED_YET


@given(st.sets(st.integers(1, 60), min_size=1), st.data())
def test_a_bucket_that_the_device_has_no_room_for_is_passed_over(sizes: set[int], data: st.DataObject) -> None:
    """The step goes to the next larger one that is there; where there is none, it runs eagerly and says why."""
    captured = data.draw(st.sets(st.sampled_from(sorted(sizes))))
    size = data.draw(st.integers(1, max(sizes)))
    keys = {GraphKey("f", bucket): None for bucket in captured}
    failed = {GraphKey("f", bucket): Reason.OUT_OF_GRAPHS for bucket in sizes - captured}
    decision = dispatch(size, DispatchPolicy({"f": tuple(sorted(sizes))}), keys, failed, "f")
    larger = [bucket for bucket in captured if bucket >= size]
    if larger:
        assert decision == Decision(Mode.REPLAY, GraphKey("f", min(larger)), min(larger) - size, None)
    else:
        nearest = GraphKey("f", min(bucket for bucket in sizes if bucket >= size))
        assert decision == Decision(Mode.EAGER, nearest, 0, Reason.OUT_OF_GRAPHS)
