"""The main job in a minute: the bundled model continues a line of Shakespeare in graph mode, beside an eager run."""

import sys

from transformers.utils.logging import disable_progress_bar

from graphmode import LLM, SamplingParams

PROMPT = "ROMEO.\nBut soft! What light through yonder window breaks?\n"
BATCHES = (1, 8)


def milliseconds_a_step(llm: LLM, batch: int) -> float:
    """Return the mean wall time of a decode step over a run of ``batch`` requests."""
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    llm.generate([PROMPT] * batch, params)  # warm
    llm.engine.core.reset_stats()
    llm.generate([PROMPT] * batch, params)
    milliseconds = llm.stats.decode_ms_per_step
    assert milliseconds is not None
    return milliseconds


def main() -> None:
    """Continue, compare, report."""
    disable_progress_bar()
    graph = LLM(progress=sys.stderr.isatty())
    eager = LLM(enforce_eager=True)
    print(f"The bundled model on {graph.engine.core.device}, every step one replay of a captured graph:\n")
    params = SamplingParams(temperature=0.7, seed=4, max_tokens=120)
    print(PROMPT, end="")
    shown = 0
    for output in graph.stream(PROMPT, params):
        text = output.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    same = eager.generate(PROMPT, params)[0].outputs[0].token_ids == output.outputs[0].token_ids
    stats = graph.stats
    print(f"\n\n{stats.graphs} graphs captured in {stats.capture_seconds:.1f} s, {stats.graph_bytes / 2**20:.1f} MiB")
    print(f"hit rate {stats.hit_rate:.3f}; the eager run gives {'the same' if same else 'OTHER'} tokens")
    for batch in BATCHES:
        ours, theirs = milliseconds_a_step(graph, batch), milliseconds_a_step(eager, batch)
        steady = graph.stats.hit_rate
        print(f"batch {batch}: eager {theirs:.2f} ms a step, graph {ours:.2f} ms, hit rate {steady:.3f}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
