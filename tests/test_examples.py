"""The examples run as the README says, and what they claim holds: replays are the function's own results."""

import runpy
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from graphmode.graph import get_backend
from graphmode.graph.trees import flatten

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def whole_floats() -> Iterator[None]:
    """On a GPU convolutions and recurrent layers compute with all bits, so that other sizes give close results."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of an example, by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module(request.param)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("policy.py", (" 1 robots", "64 robots", "11 graphs", "hit rate 1.000")),
        ("vocoder.py", ("64 frames, piecewise", "8 graphs")),
        ("demo.py", ("the same tokens", "batch 1: eager", "batch 8: eager")),
    ],
)
def test_an_example_runs_as_a_script(
    name: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    status: object = 0
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    assert not status
    printed = capsys.readouterr().out
    assert all(each in printed for each in words)


@pytest.mark.parametrize(
    ("example", "line", "graphs"),
    [
        ("denoiser", "4 images, guided", 8),
        ("encoder", "8 of up to 64 tokens", 9),
        ("ranking", "128 candidates", 12),
        ("recogniser", "16 streams", 7),
    ],
    indirect=["example"],
)
def test_an_example_prints_its_timings(
    example: ModuleType, line: str, graphs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    example.main(repeats=1)
    printed = capsys.readouterr().out
    assert line in printed
    assert f"{graphs} graphs" in printed
    assert "hit rate 1.000" in printed


def denoiser_step(example: ModuleType, rows: int, device: torch.device) -> dict[str, torch.Tensor | bool]:
    return {
        "latents": torch.randn(rows, example.TOKENS, example.PATCH, device=device),
        "done": torch.randint(example.STEPS, (rows,), device=device),
        "label": torch.randint(example.LABELS, (rows,), device=device),
        "guided": rows % 2 == 1,
    }


def sound_of(example: ModuleType, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "sound": torch.randn(rows, example.FRAMES, example.BANDS, device=device),
        "place": 1 + torch.randperm(example.STREAMS, device=device)[:rows],
        "first": torch.arange(rows, device=device) % 2 == 1,
    }


Values = Callable[[ModuleType, int, torch.device], dict[str, Any]]
PROGRAMS: dict[str, tuple[Values, Callable[..., object]]] = {
    # What a call of so many rows takes, and the plain call without a graph.
    "denoiser": (denoiser_step, lambda _, model, values: model(**clones(values))),
    "encoder": (
        lambda example, rows, device: example.sentences([5 + 4 * row for row in range(rows)], device),
        lambda _, model, values: model(**values),
    ),
    "policy": (
        lambda example, rows, _: {"observation": example.observe(rows)},
        lambda example, model, values: example.act(model, values["observation"], next(model.parameters()).device),
    ),
    "ranking": (
        lambda example, rows, device: example.request(rows, device),
        lambda _, model, values: model(**values),
    ),
    "recogniser": (
        sound_of,
        lambda example, model, values: model(
            **values,
            count=torch.tensor(len(values["place"])),
            state=example.empty_state(values["sound"].device),
        ),
    ),
    "vocoder": (
        lambda example, rows, device: {"frames": 20 * torch.randn(rows, example.BANDS, device=device)},
        lambda _, model, values: model(**values, count=torch.tensor(len(values["frames"]))),
    ),
}


def clones(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("example", PROGRAMS, indirect=True)
def test_a_program_is_proven(example: ModuleType, device: str) -> None:
    """Replays are bitwise the eager runs of their bucket, close to the plain function, and padding reaches nothing."""
    backend = get_backend(device)
    model, runner = example.build(backend)
    values_of, plain = PROGRAMS[example.__name__]
    runner.capture()
    with torch.inference_mode():
        for rows in (1, 3, 7):
            values = values_of(example, rows, backend.device)
            found = runner.verify(**values)
            assert found.ok, found
            assert found.key is not None
            before = clones(dict(runner.carried))
            eager = flatten(runner.run_eagerly(found.key, **without_static(values)))[0]
            for name, state in runner.carried.items():
                state.copy_(before[name])
            replayed = flatten(runner(**values))[0]
            for state, start in zip(runner.carried.values(), before.values(), strict=True):
                state.copy_(start)
            expected = flatten(plain(example, model, values))[0]
            for one, same, close in zip(replayed, eager, expected, strict=True):
                assert torch.equal(one, same)
                torch.testing.assert_close(one, close, rtol=1e-4, atol=1e-4)
    assert runner.stats.hit_rate == 1
    assert not runner.failed


def without_static(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, bool)}


@pytest.mark.parametrize("example", ["denoiser"], indirect=True)
@pytest.mark.parametrize("guided", [False, True])
def test_a_repeated_step_of_the_denoiser_is_the_loop(example: ModuleType, device: str, guided: bool) -> None:
    backend = get_backend(device)
    sampler, runner = example.build(backend)
    latents, label = torch.randn(3, example.TOKENS, example.PATCH), torch.tensor([0, 4, 9])
    values = {"latents": latents, "label": label, "done": torch.zeros_like(label), "guided": guided}
    images = runner(**values, repeats=example.STEPS)
    expected = example.sample(sampler, latents.to(backend.device), label.to(backend.device), guided)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(images.cpu(), latents)
    assert not values["done"].any(), "the caller's own tensors stay"


@pytest.mark.parametrize("example", ["recogniser"], indirect=True)
def test_streams_that_come_and_go_are_recognised_as_by_themselves(example: ModuleType, device: str) -> None:
    """Steps of random streams, in places that are given away again, against each stream's sound as a whole."""
    backend = get_backend(device)
    recogniser, runner = example.build(backend)
    pick = torch.Generator().manual_seed(1)
    spoken: list[list[torch.Tensor]] = []
    heard: list[list[torch.Tensor]] = []
    at_place: dict[int, int] = {}
    for step in range(12):
        rows = int(torch.randint(1, 8, (), generator=pick))
        places = (1 + torch.randperm(8, generator=pick)[:rows]).tolist()
        first = [place not in at_place or bool(torch.rand((), generator=pick) < 0.2) for place in places]
        for place, begins in zip(places, first, strict=True):
            if begins:
                at_place[place] = len(spoken)
                spoken.append([])
                heard.append([])
        sound = torch.randn(rows, example.FRAMES, example.BANDS, generator=pick)
        symbols = runner(sound=sound, place=torch.tensor(places), first=torch.tensor(first), own=True)
        for place, said, understood in zip(places, sound, symbols, strict=True):
            spoken[at_place[place]].append(said)
            heard[at_place[place]].append(understood)
        if step == 5:
            runner.capture()  # leaves the streams as they are
    assert len(spoken) > 8
    with torch.inference_mode():
        for said, understood in zip(spoken, heard, strict=True):
            sound = torch.cat([torch.zeros(example.CONTEXT, example.BANDS), *said]).to(backend.device)
            features = recogniser.convolution(sound.T[None]).relu().transpose(1, 2)
            best = recogniser.out(recogniser.gru(features)[0]).argmax(-1)[0]
            before = torch.cat([torch.zeros_like(best[:1]), best[:-1]])
            assert torch.equal(torch.cat(understood), torch.where(best == before, 0, best))
