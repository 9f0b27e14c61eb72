"""What the HTTP process and the engine process tell each other: msgpack, and no pickle, so nothing runs by being read.

Each message is an array whose first element says which it is. Steps are the many: a list of
:class:`~graphmode.engine.outputs.NewTokens`, which is encoded as it is, some 20 bytes a token.
"""

from __future__ import annotations

from array import array
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from msgspec import Struct
from msgspec.msgpack import Decoder, Encoder

from graphmode.engine.config import EngineOptions
from graphmode.engine.outputs import FinishReason, NewTokens
from graphmode.engine.requests import Request
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import InputError

if TYPE_CHECKING:  # which loads transformers' models
    from graphmode.engine.multimodal import VisionPrompt

STEP_BOUNDS = (
    *(0.0001, 0.0002, 0.0003, 0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.007, 0.01, 0.015, 0.02),
    *(0.03, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""Upper bounds of the counts in :attr:`EngineSnapshot.step_seconds`."""


class Start(Struct, frozen=True, array_like=True, tag=True):
    """To the engine, the first message: load this.

    Attributes:
        model: a folder, a file or a hub name.
        options: what was chosen of :class:`~graphmode.engine.config.EngineOptions`, by name.
        log_level: of the engine's log.
    """

    model: str
    options: dict[str, Any]
    log_level: int


class Array(Struct, frozen=True, array_like=True):
    """A tensor: the name of its dtype, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray


class Item(Struct, frozen=True, array_like=True):
    """An image or a video, as :class:`~graphmode.engine.multimodal.VisionItem` has it."""

    kind: Literal["image", "video"]
    pixels: Array
    grid: tuple[int, int, int]
    seconds_per_grid: float | None


class Vision(Struct, frozen=True, array_like=True):
    """The images and videos of a prompt.

    Attributes:
        items: each once.
        spans: start, end, the number of the item, first unit.
        positions: int64 ``[prompt tokens, 3]``.
    """

    items: list[Item]
    spans: list[tuple[int, int, int, int]]
    positions: Array


class Submit(Struct, frozen=True, array_like=True, tag=True):
    """To the engine: run a request.

    Attributes:
        request_id: its name.
        prompt: its tokens, an int32 array.
        params: what was chosen of its sampling parameters, by name; encoded, since most requests choose what others do.
        priority: of the request.
        vision: its images and videos; None where it has none.
    """

    request_id: str
    prompt: bytes
    params: bytes
    priority: int
    vision: Vision | None


class Abort(Struct, frozen=True, array_like=True, tag=True):
    """To the engine: end a request, or one of its answers, for this reason."""

    request_id: str
    index: int | None
    reason: FinishReason


class Stop(Struct, frozen=True, array_like=True, tag=True):
    """To the engine: exit."""


ToEngine = Start | Submit | Abort | Stop


class Capturing(Struct, frozen=True, array_like=True, tag=True):
    """From the engine, while it starts: so many graphs of so many are captured."""

    done: int
    total: int


class ModelInfo(Struct, frozen=True):
    """What the HTTP process must know of the model that runs.

    Attributes:
        model: as it was named.
        dtype: of the weights.
        device: where it runs.
        max_model_len: tokens of a sequence, prompt and answer together.
        max_num_seqs: sequences in a step.
        max_num_batched_tokens: tokens in a step.
        vocab_size: of the model.
        eos_token_ids: tokens that end a text.
        num_blocks: KV blocks of each cache group.
        block_sizes: tokens of a block of each.
        graph_mode: as of the options, after defaults.
        buckets: sizes of the graphs, by family; empty where steps run eagerly.
    """

    model: str
    dtype: str
    device: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    eos_token_ids: list[int]
    num_blocks: list[int]
    block_sizes: list[int]
    graph_mode: str
    buckets: dict[str, list[int]]


class Ready(Struct, frozen=True, array_like=True, tag=True):
    """From the engine: it takes requests."""

    info: ModelInfo


class Step(Struct, frozen=True, array_like=True, tag=True):
    """From the engine: what a step made for all answers."""

    answers: list[NewTokens]


class Refused(Struct, frozen=True, array_like=True, tag=True):
    """From the engine: a request does not run. ``of_input`` says whether the request is at fault."""

    request_id: str
    cause: str
    of_input: bool


class StepFailed(Struct, frozen=True, array_like=True, tag=True):
    """From the engine: a step raised, and these requests ended with it."""

    request_ids: list[str]
    cause: str


class Alive(Struct, frozen=True, array_like=True, tag=True):
    """From the engine several times a second, by a thread of its own.

    Attributes:
        steps: steps launched so far.
        moves: how often the thread that steps was seen elsewhere in the code than before.
        busy: whether that thread has anything to do.
    """

    steps: int
    moves: int
    busy: bool


class EngineSnapshot(Struct, frozen=True, array_like=True, tag=True):
    """From the engine some four times a second while it runs, and when it comes to rest.

    Attributes:
        stats: what else :class:`~graphmode.engine.stats.EngineStats` has, as plain values.
        running: answers that hold blocks.
        waiting: answers that do not yet.
        kv_blocks_used: of each cache group, blocks that sequences hold.
        kv_blocks_total: of each cache group, all blocks.
        prefix_queries: tokens of the prompts that began.
        prefix_hits: those of them whose keys and values were cached.
        failed_steps: steps that raised.
        replays: steps by graph: ``"decode:8"`` is family and bucket.
        step_seconds: how many steps took up to each of :data:`STEP_BOUNDS`, and longer than any.
        step_seconds_sum: of all steps.
    """

    stats: dict[str, Any]
    running: int
    waiting: int
    kv_blocks_used: list[int]
    kv_blocks_total: list[int]
    prefix_queries: int
    prefix_hits: int
    failed_steps: int
    replays: dict[str, int]
    step_seconds: list[int]
    step_seconds_sum: float


FromEngine = Capturing | Ready | Step | Refused | StepFailed | Alive | EngineSnapshot


_encoder = Encoder()
_to_engine: Decoder[ToEngine] = Decoder(ToEngine)
_from_engine: Decoder[FromEngine] = Decoder(FromEngine)
_decode_params = Decoder(dict[str, Any]).decode


def encode(message: ToEngine | FromEngine) -> bytes:
    """Return a message as bytes."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Return what was sent to the engine."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Return what the engine sent."""
    return _from_engine.decode(data)


def start_message(model: str | Path, options: EngineOptions, log_level: int) -> Start:
    """Return what an engine process starts from.

    Raises:
        InputError: an option that is an object of this process.
    """
    given = _chosen(options)
    for name, value in given.items():
        if isinstance(value, (Path, torch.device)):
            given[name] = str(value)
            continue
        try:
            _encoder.encode(value)
        except TypeError:
            raise InputError(
                f"{name} is {value!r}, an object of this process; the engine runs in another. Give a plain value"
            ) from None
    return Start(str(model), given, log_level)


def _chosen(options: EngineOptions | SamplingParams) -> dict[str, Any]:
    """Return the options that are not what they are by default, by name."""
    values = {each.name: (getattr(options, each.name), each.default) for each in fields(options)}
    return {name: value for name, (value, default) in values.items() if value != default}


def submission(request_id: str, request: Request) -> Submit:
    """Return a request as it travels.

    Raises:
        InputError: a token that no model has.
    """
    try:
        prompt = array("i", request.prompt_token_ids).tobytes()
    except (OverflowError, TypeError):
        raise InputError("the prompt holds a token id that is no integer below 2**31; give ids of the model") from None
    vision = None if request.vision is None else _as_vision(request.vision)
    return Submit(request_id, prompt, _encoder.encode(_chosen(request.params)), request.priority, vision)


def submitted(message: Submit) -> Request:
    """Return the request that a submission holds."""
    vision = None if message.vision is None else _as_vision_prompt(message.vision)
    return Request(
        array("i", message.prompt),
        _params(message.params),
        vision=vision,
        request_id=message.request_id,
        priority=message.priority,
    )


@lru_cache(256)
def _params(encoded: bytes) -> SamplingParams:
    """Return sampling parameters, whose checks take longer than all else that a request needs here."""
    return SamplingParams(**_decode_params(encoded))


def _as_vision(prompt: VisionPrompt) -> Vision:
    numbers: dict[int, int] = {}
    items: list[Item] = []
    for span in prompt.spans:
        if id(span.item) not in numbers:
            numbers[id(span.item)] = len(items)
            item = span.item
            items.append(Item(item.kind, _as_array(item.pixels), item.grid, item.seconds_per_grid))
    spans = [(span.start, span.end, numbers[id(span.item)], span.first_unit) for span in prompt.spans]
    return Vision(items, spans, _as_array(prompt.positions))


def _as_vision_prompt(vision: Vision) -> VisionPrompt:
    from graphmode.engine.multimodal import Span, VisionItem, VisionPrompt

    items = [VisionItem(each.kind, _as_tensor(each.pixels), each.grid, each.seconds_per_grid) for each in vision.items]
    spans = (Span(start, end, items[number], first_unit) for start, end, number, first_unit in vision.spans)
    return VisionPrompt(tuple(spans), _as_tensor(vision.positions))


def _as_array(tensor: torch.Tensor) -> Array:
    data = bytearray(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def _as_tensor(array: Array) -> torch.Tensor:
    dtype = getattr(torch, array.dtype)
    if not array.data:
        return torch.empty(array.shape, dtype=dtype)
    return torch.frombuffer(array.data, dtype=dtype).view(array.shape)
