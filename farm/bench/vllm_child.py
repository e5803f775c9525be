"""One vLLM engine on standard input and output, run by the Python of vLLM's own environment; no part of farm is there.

The first line in is `{"model", "dtype", "max_length", "slots", "speculative", "counts"}`, answered by `{"ready": true}`
once the engine is built. Every further line `{"prompts", "num_new", "slots"}` is answered by `{"tokens", "seconds",
"drafts", "accepted"}`: greedy tokens, exactly as many as asked for, the time it took to generate them, and if `counts`
is set the engine's own counters of verified drafts and of accepted tokens. End of input ends the process, as does the
end of its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"


def main() -> None:
    """Serves lines until the input ends."""
    if sys.platform == "linux":  # a stopped process does not notice that its input has ended
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM and its libraries print is no answer
    settings = json.loads(sys.stdin.readline())
    engine = build(settings)
    tell(answers, {"ready": True})
    for line in sys.stdin:
        before = counted(engine) if settings["counts"] else {}
        answer = generate(engine, **json.loads(line))
        after = counted(engine) if settings["counts"] else {}
        spent = {name: after.get(name, 0) - before.get(name, 0) for name in (DRAFTS, ACCEPTED)}
        tell(answers, {**answer, "drafts": spent[DRAFTS], "accepted": spent[ACCEPTED]})


def tell(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def build(settings: dict[str, Any]) -> Any:
    """The engine that a server would run, without what would let a repeated prompt skip its prefill."""
    from vllm import LLM

    return LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["max_length"],
        max_num_seqs=settings["slots"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        speculative_config=settings["speculative"],
        disable_log_stats=not settings["counts"],
    ).llm_engine


def generate(engine: Any, prompts: list[list[int]], num_new: list[int], slots: int) -> dict[str, Any]:
    """At most `slots` requests side by side; a request that ends makes room for the next one."""
    from vllm import SamplingParams

    started = time.perf_counter()
    waiting = list(enumerate(zip(prompts, num_new, strict=True)))[::-1]
    done: dict[int, list[int]] = {}
    live = 0
    while waiting or live:
        while waiting and live < slots:
            index, (ids, count) = waiting.pop()
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            engine.add_request(str(index), {"prompt_token_ids": ids}, params)
            live += 1
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = list(output.outputs[0].token_ids)
                live -= 1
    seconds = time.perf_counter() - started
    return {"tokens": [done[index] for index in range(len(prompts))], "seconds": seconds}


def counted(engine: Any) -> dict[str, int]:
    """The engine's counters since it was built; without speculation it has none of them."""
    return {metric.name: metric.value for metric in engine.get_metrics() if metric.name in (DRAFTS, ACCEPTED)}


if __name__ == "__main__":
    main()
