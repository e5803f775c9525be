"""The engines that a draft is exported for. Loads without torch: the command line names them."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

StoredDtype = Literal["float32", "bfloat16", "float16"]


class ServingEngine(StrEnum):
    """What an export is for."""

    VLLM = "vllm"
    SGLANG = "sglang"


ARCHITECTURES = {ServingEngine.VLLM: "LlamaForCausalLM", ServingEngine.SGLANG: "LlamaForCausalLMEagle"}
