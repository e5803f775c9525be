"""vLLM beside our own arms: one child process an engine, kept warm between its turns and stopped during all others'.

vLLM pins other versions of our libraries, so it lives in an environment of its own (`make vllm-venv`) and is spoken to
in lines of JSON (farm/bench/vllm_child.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from farm.config import UserError
from farm.evaluate.bench import PromptIds
from farm.sections import TargetSpec
from farm.store import local_copy

ENVIRONMENT = Path(".vllm-venv")  # in the working directory, where make puts it
CHILD = Path(__file__).with_name("vllm_child.py")
CONTROLS = ("off", "ngram")
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
DTYPES = ("float32", "bfloat16")
GIB = 2**30
TRIALS, TRIAL_TOKENS = 3, 32  # runs in each dtype to find the one in which vLLM is faster


@dataclass(frozen=True)
class VllmSettings:
    """Of one engine; `max_length` in positions of one request, `slots` in requests side by side."""

    model: str
    dtype: str
    max_length: int
    slots: int
    speculative: Mapping[str, Any] | None = None  # vLLM's speculative config
    counts: bool = False  # keep its counters of drafts, which cost it a little


@dataclass(frozen=True)
class VllmAnswer:
    """Tokens of each prompt, seconds without those of the pipe between us, and vLLM's counters if it keeps them."""

    tokens: list[list[int]]
    seconds: float
    drafts: int  # rounds that verified a draft
    accepted: int  # drafted tokens, those behind a request's end included

    @property
    def tau(self) -> float:
        """Tokens of a verification, the target's own included; nan where nothing was drafted."""
        return 1 + self.accepted / self.drafts if self.drafts else float("nan")


class VllmEngine:
    """A child process with one engine. It runs only while it is asked: its process group is stopped in between."""

    def __init__(self, settings: VllmSettings, kv_bytes: int, python: Path) -> None:
        """Raises UserError with the end of the child's output when it cannot build the engine."""
        self.settings = settings
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._child = subprocess.Popen(
            [str(python), "-P", str(CHILD)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, bufsize=1, process_group=0, env={**os.environ, **environment(python, kv_bytes)},
        )  # fmt: skip
        self._ask(asdict(settings))

    def generate(self, prompts: Sequence[PromptIds], num_new: Sequence[int], slots: int) -> VllmAnswer:
        """Greedy tokens of each prompt, exactly `num_new` of them, `slots` requests side by side."""
        task = {"prompts": [list(ids) for ids in prompts], "num_new": list(num_new), "slots": slots}
        return VllmAnswer(**self._ask(task))

    def close(self) -> None:
        """Ends the process, stopped or not."""
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            _open(stream).close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        answer = ""
        try:
            os.killpg(self._child.pid, signal.SIGCONT)
            _open(self._child.stdin).write(json.dumps(message) + "\n")
            answer = _open(self._child.stdout).readline()
            if answer:
                os.killpg(self._child.pid, signal.SIGSTOP)
        except OSError:  # it has ended: what it wrote says why
            answer = ""
        if not answer:
            said = self._last_words()
            self.close()
            raise UserError(f"{self.settings.model}: vLLM failed in {self.settings.dtype}: {said}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return " | ".join(errors[-3:] or lines[-3:])


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def environment(python: Path, kv_bytes: int) -> dict[str, str]:
    """Variables of the child: as many threads as here, one process, Intel's OpenMP as vLLM recommends it."""
    iomp = python.parent.parent / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(iomp.absolute())} if iomp.exists() else {}
    return (
        preload
        | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            # Binding would leave a core to the scheduler's process; with everything in one process there is none, which
            # is about twice as fast on a few cores.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-kv_bytes // GIB))),  # in GiB, whole ones
            "KMP_BLOCKTIME": "5",  # milliseconds that an idle thread spins, and the next line: as vLLM sets them itself
            "KMP_TPAUSE": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": "",
        }
    )


def find_python(folder: Path = ENVIRONMENT) -> Path:
    """The Python of vLLM's environment; UserError when it was not built."""
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists() or not python.exists():
        raise UserError(
            f"{folder}: is no environment with vLLM; run `make vllm-venv` first, from the checkout"
        )
    return python


def check_loadable(spec: TargetSpec) -> None:
    """vLLM opens a whole checkpoint in a folder; UserError for a GGUF file or a LoRA."""
    if spec.lora is not None or not local_copy(spec.model).is_dir():
        raise UserError(
            f"{spec.name}: vLLM is compared on a full checkpoint in a folder only; leave it out with --target, "
            "or leave out --engine vllm"
        )


def kv_bytes(config: Any, positions: int) -> int:
    """Keys and values of so many positions in float32, half as many again for what blocks leave unused."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(1.5 * 4 * 2 * config.num_hidden_layers * heads * head_dim * positions)


@contextmanager
def vllm_engines(
    spec: TargetSpec,
    config: Any,
    sizes: tuple[int, int],
    prompt: PromptIds,
    dtypes: Sequence[str] = DTYPES,
) -> Iterator[dict[str, VllmEngine]]:
    """An engine for each of CONTROLS, in that of `dtypes` in which plain vLLM answers `prompt` fastest.

    `sizes` are the positions of the longest request and the most requests side by side. Raises UserError where vLLM
    is not installed or cannot open the target.
    """
    python = find_python()
    check_loadable(spec)
    max_length, slots = sizes
    space = kv_bytes(config, max_length * slots)
    with ExitStack() as stack:

        def start(dtype: str, speculative: Mapping[str, Any] | None = None) -> VllmEngine:
            engine = VllmEngine(
                VllmSettings(str(local_copy(spec.model)), dtype, max_length, slots, speculative),
                space,
                python,
            )
            stack.callback(engine.close)
            return engine

        plain = {dtype: start(dtype) for dtype in dtypes}
        seconds = {dtype: _trial(engine, prompt) for dtype, engine in plain.items()}
        chosen = min(plain, key=lambda dtype: seconds[dtype])
        for dtype in plain.keys() - {chosen}:
            plain[dtype].close()
        yield {"off": plain[chosen], "ngram": start(chosen, NGRAM)}


def _trial(engine: VllmEngine, prompt: PromptIds) -> float:
    room = min(TRIAL_TOKENS, engine.settings.max_length - len(prompt))
    return min(engine.generate([prompt], [room], 1).seconds for _ in range(TRIALS))
