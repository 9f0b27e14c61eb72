"""Names that users bring from vLLM and xLLM: what they are called here, and why some cannot be honoured.

One table for sampling parameters, engine options, calls and prompts. The documentation speaks of our own names alone.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from graphmode.engine.checks import flag, shown, unfit
from graphmode.errors import InputError


@dataclass(frozen=True)
class Alias:
    """Another name of an option.

    Attributes:
        name: ours, which takes the same value; or
        options: what a value says in our options, by name. It raises InputError for a value that it does not know.
    """

    name: str = ""
    options: Callable[[Any], Mapping[str, Any]] | None = None

    def read(self, value: Any) -> Mapping[str, Any]:
        """Return our options for a value."""
        return {self.name: value} if self.options is None else self.options(value)


@dataclass(frozen=True)
class Refusal:
    """An option that cannot be honoured.

    Attributes:
        reason: a sentence: why not, and what to do instead.
        harmless: values that ask for nothing, which are accepted.
    """

    reason: str
    harmless: tuple[Any, ...] = (None,)


Names = Mapping[str, Alias | Refusal]


def _guided(name: str) -> Alias:
    """Return the alias for one of vLLM's older names, which each say one way."""
    return Alias(options=lambda value: {} if value is None else {"structured_outputs": {name: value}})


def _response_format(value: Any) -> Mapping[str, Any]:
    """Read OpenAI's response_format."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"structured_outputs": {"json": True}}
    described = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(described, Mapping) or "schema" not in described:
        allowed = "{'type': 'json_object'} or {'type': 'json_schema', 'json_schema': {'schema': ...}}"
        raise unfit("response_format", value, allowed)
    return {"structured_outputs": {"json": described["schema"]}}


_BEAMS = Refusal("there is no beam search; n gives several sampled answers", harmless=(None, False, 1))

SAMPLING: Names = {
    "max_new_tokens": Alias("max_tokens"),
    "max_completion_tokens": Alias("max_tokens"),
    "num_return_sequences": Alias("n"),
    "guided_decoding": Alias("structured_outputs"),
    **{f"guided_{name}": _guided(name) for name in ("json", "regex", "choice", "grammar")},
    "response_format": Alias(options=_response_format),
    "logits_processors": Refusal(
        "a graph cannot run Python code at each token; logit_bias, allowed_token_ids, bad_words and the penalties are "
        "computed inside the graph",
        harmless=(None, [], ()),
    ),
    "output_kind": Refusal("generate returns final outputs, and stream all that there is so far after every token"),
    "best_of": Refusal(
        "answers are not ranked; ask for n with logprobs and choose by cumulative_logprob", harmless=(None, 1)
    ),
    **dict.fromkeys(("use_beam_search", "num_beams"), _BEAMS),
    "length_penalty": Refusal("there is no beam search, whose scores it would change", harmless=(None, 1.0)),
    "early_stopping": Refusal("there is no beam search, which it would end", harmless=(None, False)),
    "flat_logprobs": Refusal(
        "log-probabilities come as one mapping for each token; leave it out", harmless=(None, False)
    ),
    "extra_args": Refusal("nothing here would read them; leave them out", harmless=(None, {})),
    "thinking_token_budget": Refusal("thinking is not told apart from the answer; max_tokens bounds both"),
    "repetition_detection": Refusal("an answer that repeats itself is not ended; repetition_penalty makes it rarer"),
    "spaces_between_special_tokens": Refusal(
        "special tokens have the spaces that the tokenizer gives them; transformers knows no other way",
        harmless=(None, True),
    ),
    "skip_clone": Refusal("parameters are never changed, so nothing is copied; leave it out", harmless=(None, False)),
}


_COMPILED_BY = Refusal("llguidance compiles all grammars, with spaces and line breaks as it has them; leave it out")

STRUCTURED: Names = {
    "json_object": Alias(options=lambda value: {"json": True} if flag("json_object", value) else {}),
    "structural_tag": Refusal("an answer is held to one grammar from its beginning; say it as grammar"),
    **dict.fromkeys(
        ("disable_any_whitespace", "disable_additional_properties", "disable_fallback"),
        replace(_COMPILED_BY, harmless=(None, False)),
    ),
    **dict.fromkeys(("whitespace_pattern", "backend"), _COMPILED_BY),
}
"""Of vLLM's StructuredOutputsParams."""

_CUDA_GRAPH_MODES = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


def _cuda_graph_mode(value: Any) -> Mapping[str, Any]:
    """Read vLLM's names, in any case, or its enum."""
    name = getattr(value, "name", value)
    if not isinstance(name, str) or name.upper() not in _CUDA_GRAPH_MODES:
        raise unfit("cudagraph_mode", value, f"one of {', '.join(_CUDA_GRAPH_MODES)}")
    return {"graph_mode": name.lower()}


_COMPILER = Refusal(
    "it is for vLLM's compiler; here fuse='compile' has layers compiled by Inductor that are not fused by hand",
    harmless=(None, 0, False, "", "eager", "NONE", [], {}),
)

COMPILATION: Names = {
    "cudagraph_mode": Alias(options=_cuda_graph_mode),
    "cudagraph_capture_sizes": Alias("graph_sizes"),
    "max_cudagraph_capture_size": Alias("max_graph_tokens"),
    "max_capture_size": Alias("max_graph_tokens"),
    "cudagraph_num_of_warmups": Alias("warmup_iterations"),
    "use_cudagraph": Alias("enable_graph"),
    "full_cuda_graph": Alias(
        options=lambda value: {"graph_mode": "full" if flag("full_cuda_graph", value) else "piecewise"}
    ),
    "cudagraph_copy_inputs": Refusal(
        "inputs are always copied to where the graphs read them; leave it out", harmless=(None, True, False)
    ),
    **dict.fromkeys(("level", "mode", "backend", "custom_ops", "splitting_ops", "use_inductor"), _COMPILER),
    **dict.fromkeys(("compile_sizes", "inductor_compile_config", "inductor_passes", "pass_config"), _COMPILER),
    **dict.fromkeys(("debug_dump_path", "cache_dir"), _COMPILER),
}
"""What vLLM's compilation_config holds."""


def _compilation_config(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise unfit(
            "compilation_config",
            value,
            "a dict such as {'cudagraph_mode': 'FULL'}; levels of vLLM's compiler have no counterpart, but "
            "fuse='compile' has layers compiled by Inductor",
        )
    return named("compilation_config", value, [], COMPILATION)


def _limit_mm_per_prompt(value: Any) -> Mapping[str, Any]:
    allowed = "a dict such as {'image': 4, 'video': 1}"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise unfit("limit_mm_per_prompt", value, allowed)
    limits = {}
    for kind, limit in value.items():
        count = limit.get("count") if isinstance(limit, Mapping) else limit
        if kind in ("image", "video"):
            limits[f"max_{kind}s_per_prompt"] = count
        elif count != 0:
            raise unfit("limit_mm_per_prompt", value, f"{allowed}; prompts hold nothing else")
    return limits


_ONE_DEVICE = Refusal("an engine runs on one device, and several are to come; leave it out", harmless=(None, 1))
_SPECULATION = Refusal("there is no speculative decoding yet; leave it out", harmless=(None, 0))
_LORA = Refusal(
    "LoRA adapters are not applied yet; merge the adapter into the model's weights and load those",
)
_OFFLOAD = Refusal(
    "weights and KV blocks stay on the device, and a sequence that gives up its blocks is computed again; leave it out",
    harmless=(None, 0, 0.0),
)
_TEXT_ALONE = Refusal(
    "an engine generates text; there are no embeddings or scores", harmless=(None, "auto", "generate", "none")
)
_TOKENIZER = Refusal("the tokenizer is the one in the model's folder; put another one there")
_REVISION = Refusal("the newest revision is taken; download another one, and give its folder as the model")
_CONFIG_FILE = Refusal("a model's configuration is its config.json; change it there", harmless=(None, {}))
_AHEAD = Refusal("steps are always scheduled one ahead of the device", harmless=(None, True))
_NOTHING_TO_SET = Refusal("it changes nothing here; leave it out", harmless=(None, True, False))

ENGINE: Names = {
    # The same by another name.
    "kv_cache_memory_bytes": Alias("kv_cache_memory"),
    "gpu_memory_utilization": Alias("memory_share"),
    "max_memory_utilization": Alias("memory_share"),
    "max_cache_size": Alias("kv_cache_memory"),
    "max_seqs_per_batch": Alias("max_num_seqs"),
    "max_tokens_per_batch": Alias("max_num_batched_tokens"),
    "enable_prefix_cache": Alias("enable_prefix_caching"),
    "devices": Alias("device"),
    "num_scheduler_steps": Alias("decode_steps"),
    "enable_aclgraph": Alias("enable_graph"),
    "cudagraph_capture_sizes": Alias("graph_sizes"),
    "cuda_graph_sizes": Alias("graph_sizes"),
    "max_cudagraph_capture_size": Alias("max_graph_tokens"),
    "max_tokens_for_graph_mode": Alias("max_graph_tokens"),
    "cudagraph_mode": Alias(options=_cuda_graph_mode),
    "compilation_config": Alias(options=_compilation_config),
    "limit_mm_per_prompt": Alias(options=_limit_mm_per_prompt),
    # What is always so, or has nothing to act on.
    "enable_chunked_prefill": Refusal(
        "prompts longer than a step are always computed in chunks; raise max_num_batched_tokens to max_model_len, and "
        "each prompt is one",
        harmless=(None, True),
    ),
    **dict.fromkeys(("async_scheduling", "enable_schedule_overlap"), _AHEAD),
    "max_logprobs": Refusal(
        "20 most likely tokens, or the whole vocabulary, may be asked for by any request; leave it out",
        harmless=(None, -1, 20),
    ),
    "max_seq_len_to_capture": Refusal(
        "graphs serve sequences of every length; leave it out. max_graph_tokens bounds a step that has one"
    ),
    "scheduling_policy": Refusal(
        "requests run by their priority, and within one in the order in which they come",
        harmless=(None, "fcfs", "priority"),
    ),
    "preemption_mode": Refusal("what is preempted is computed again", harmless=(None, "recompute")),
    **dict.fromkeys(("disable_custom_all_reduce", "disable_log_stats", "disable_log_requests"), _NOTHING_TO_SET),
    "use_v2_block_manager": _NOTHING_TO_SET,
    # What there is not.
    "quantization": Refusal(
        "quantised weights cannot be used yet; kernels for them are to come. Load a checkpoint whose weights are "
        "float32, bfloat16 or float16"
    ),
    "kv_cache_dtype": Refusal("the KV cache has the dtype of the model; leave it out", harmless=(None, "auto")),
    "calculate_kv_scales": Refusal("the KV cache has the dtype of the model; leave it out", harmless=(None, False)),
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"), _ONE_DEVICE),
    "decode_context_parallel_size": _ONE_DEVICE,
    "enable_expert_parallel": replace(_ONE_DEVICE, harmless=(None, False)),
    "distributed_executor_backend": Refusal(
        "the engine runs in the process that makes it; leave it out", harmless=(None, "uni")
    ),
    **dict.fromkeys(("speculative_config", "speculative_model", "num_speculative_tokens", "draft_model"), _SPECULATION),
    "enable_lora": replace(_LORA, harmless=(None, False)),
    **dict.fromkeys(("lora_modules", "max_loras", "max_lora_rank"), _LORA),
    **dict.fromkeys(("cpu_offload_gb", "swap_space"), _OFFLOAD),
    "block_size": Refusal("the KV cache's blocks hold as many tokens as the device's kernels read; leave it out"),
    "num_gpu_blocks_override": Refusal("give the KV cache's size in bytes, as kv_cache_memory"),
    "disable_sliding_window": Refusal("windows are the model's own; leave it out", harmless=(None, False)),
    "enable_sleep_mode": Refusal("an engine keeps its memory until it is deleted", harmless=(None, False)),
    "optimization_level": Refusal(
        "levels of vLLM's compiler have no counterpart; graph_mode chooses the graphs, and fuse='compile' has layers "
        "compiled by Inductor",
    ),
    **dict.fromkeys(("task", "runner", "convert", "pooler_config"), _TEXT_ALONE),
    "guided_decoding_backend": replace(_COMPILED_BY, harmless=(None, "auto", "guidance")),
    "structured_outputs_config": replace(_COMPILED_BY, harmless=(None, {})),
    "logits_processors": SAMPLING["logits_processors"],
    "model_impl": Refusal("models are always transformers' own", harmless=(None, "auto", "transformers")),
    "tokenizer": _TOKENIZER,
    "tokenizer_mode": replace(_TOKENIZER, harmless=(None, "auto")),
    "skip_tokenizer_init": Refusal(
        "a tokenizer that is there is loaded; prompts may be tokens all the same", harmless=(None, False)
    ),
    **dict.fromkeys(("revision", "code_revision", "tokenizer_revision"), _REVISION),
    "hf_token": Refusal("transformers takes the token that huggingface_hub keeps: log in with it, or set HF_TOKEN"),
    "download_dir": Refusal("models come to the cache of huggingface_hub; set HF_HOME to move it"),
    **dict.fromkeys(("hf_overrides", "rope_scaling", "rope_theta"), _CONFIG_FILE),
    "override_generation_config": Refusal("give SamplingParams, or a folder as generation_config", harmless=(None, {})),
    "chat_template": Refusal("give it to LLM.chat"),
    "mm_processor_kwargs": Refusal("give them with the prompt that they are for", harmless=(None, {})),
    "attention_backend": Refusal("attention is graphmode's own, chosen by the device", harmless=(None, "auto")),
    "attention_config": Refusal("attention is graphmode's own, chosen by the device", harmless=(None, {})),
    "kv_transfer_config": Refusal("the KV cache stays in this engine", harmless=(None, {})),
    "additional_config": Refusal("nothing here would read it", harmless=(None, {})),
}
"""Of vLLM's ``LLM`` and its command line, and of xLLM's flags."""

CALL: Names = {
    "use_tqdm": Alias("progress"),
    **dict.fromkeys(("lora_request", "prompt_adapter_request"), _LORA),
    "tokenization_kwargs": Refusal("give the prompt as the tokens that you want"),
    "prompt_token_ids": Refusal("tokens are prompts themselves: generate([[1, 2, 3]])"),
    "chat_template_content_format": Refusal(
        "parts of a message reach the template as they are where the model takes images, else as one text",
        harmless=(None, "auto"),
    ),
}
"""Of the calls that generate."""

PROMPT: Names = {
    "prompt_embeds": Refusal("a prompt is made of tokens; give prompt_token_ids"),
    "multi_modal_uuids": Refusal("images are told apart by their pixels; leave it out", harmless=(None, {})),
    "cache_salt": Refusal("blocks of the prefix cache are shared by all; use enable_prefix_caching=False"),
}
"""Of a prompt in parts."""


Class = TypeVar("Class")


def by_name(names: Names, *, what: str = "") -> Callable[[type[Class]], type[Class]]:
    """Make a dataclass take other names of its fields, and refuse names that it does not know with an InputError.

    Args:
        names: the other names.
        what: takes the options, for messages. Default: the class.
    """

    def decorate(made: type[Class]) -> type[Class]:
        known = [each.name for each in fields(made)]  # type: ignore[arg-type]
        init = made.__init__

        @functools.wraps(init)
        def __init__(self: Any, *values: Any, **options: Any) -> None:  # noqa: N807
            if values:
                raise InputError(f"{made.__name__} was given {shown(values[0])} without a name; give each by its name")
            init(self, **named(what or made.__name__, options, known, names))

        made.__init__ = __init__  # type: ignore[method-assign]
        return made

    return decorate


def named(what: str, given: Mapping[str, Any], known: list[str], names: Names) -> dict[str, Any]:
    """Return options by our own names.

    Args:
        what: takes them, for messages.
        given: the options, by any name.
        known: our own names.
        names: other names.

    Raises:
        InputError: an option is not known, cannot be honoured, or is given twice.
    """
    options = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        if name in known:
            continue
        other = names.get(name)
        if other is None:
            near = difflib.get_close_matches(str(name), [*known, *names], n=1)
            meant = f"did you mean {near[0]}? It" if near else "it"
            raise InputError(f"{what} has no {name}; {meant} has {', '.join(known)}")
        if isinstance(other, Refusal):
            if not any(type(value) is type(each) and value == each for each in other.harmless):
                raise InputError(f"{name}={shown(value)} cannot be honoured: {other.reason}")
            continue
        for ours, meant in other.read(value).items():
            if ours in options and options[ours] != meant:
                raise InputError(
                    f"{name}={shown(value)} and {ours}={shown(options[ours])} contradict; give one of them"
                )
            options[ours] = meant
    return options
