"""Ray tasks that look at one target: may it join the family, how good is a draft on it.

Each body is one call of `farm.evaluate`; results are artifacts, so that a rerun starts no task.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import ray
from pydantic import SecretStr
from ray.exceptions import RayError

from farm.artifacts import Artifact, Artifacts
from farm.config import Manifest
from farm.data.chat import encode_chat, read_template
from farm.data.prompts import Prompt
from farm.fleet.answers import AnswersJob
from farm.fleet.pool import cause_of
from farm.fleet.session import cpus_of_largest_node
from farm.fleet.stage_keys import CHECK, EVALUATE, PROBE
from farm.sections import Dtype, EvaluateSettings, ProbeSettings, TargetSpec
from farm.store import local_copy, open_store

if TYPE_CHECKING:
    from farm.evaluate.target import EvaluateTask


@ray.remote(num_cpus=1, max_retries=1)
def check(store: str, key: str, base: TargetSpec, target: TargetSpec) -> Artifact:
    """Load a target and compare it with the base; raises Refused when it is no member of the family."""
    from farm.evaluate.probe import check_target

    check_target(base, target)
    return Artifacts(open_store(store)).finish(CHECK, key, {"target": target.name})


@ray.remote(num_cpus=1, max_retries=1)
def check_endpoint(job: AnswersJob, key: SecretStr | None) -> None:
    """Ask the endpoint of a job for one token; raises Refused when it cannot answer the others either."""
    from farm.decode.endpoint import Endpoint, check
    from farm.target.load import load_tokenizer

    prompt, tokenizer = job.prompts[0], load_tokenizer(job.spec.model)
    ids = encode_chat(tokenizer, prompt.messages, read_template(job.spec.chat_template))
    check(Endpoint.of(job.spec, job.settings, key), tuple(ids))


@ray.remote(num_cpus=1, max_retries=1)
def probe_tau(
    store: str,
    key: str,
    target: TargetSpec,
    trunk_folder: str,
    prompts: tuple[Prompt, ...],
    settings: tuple[ProbeSettings, EvaluateSettings],
    dtype: Dtype,
) -> Artifact:
    """tau of the base draft on a few prompts, in the artifact's manifest."""
    from farm.evaluate.probe import probe

    result = probe(target, local_copy(trunk_folder), prompts, *settings, dtype)
    return Artifacts(open_store(store)).finish(PROBE, key, {"target": target.name, **asdict(result)})


def evaluate_on_cluster(manifest: Manifest, target: str, prompts: str) -> dict[str, Any]:
    """`farm.evaluate.published.evaluate_published` on a node of its own; raises UserError as it does."""
    num_gpus = manifest.resources.regenerate.num_gpus
    task = _evaluate_published.options(num_cpus=cpus_of_largest_node(num_gpus), num_gpus=num_gpus)
    try:
        measured: dict[str, Any] = ray.get(task.remote(manifest, target, prompts))
    except RayError as error:
        raise cause_of(error) from error
    return measured


@ray.remote(max_retries=1)
def _evaluate_published(manifest: Manifest, target: str, prompts: str) -> dict[str, Any]:
    from farm.evaluate.published import evaluate_published

    return evaluate_published(manifest, target, prompts)


@ray.remote(max_retries=1)
def evaluate(store: str, key: str, task: "EvaluateTask", record: Mapping[str, Any]) -> Artifact:
    """Measure base draft, live and adapted draft on the held-out prompts; asks for a whole node's CPUs."""
    from farm.evaluate.records import TargetRow
    from farm.evaluate.target import evaluate_target
    from farm.target.load import placement

    started = time.monotonic()
    threads = task.settings.threads or os.cpu_count() or 1
    task = replace(task, settings=task.settings.model_copy(update={"threads": threads}))
    # Through the record and back, so that what is stored can be read: no NaN, no unknown field.
    row = TargetRow(**evaluate_target(task), decision="kept")
    manifest = {
        **record,
        "row": row.model_dump(mode="json", exclude_unset=True, exclude={"decision"}),
        "threads": threads,
        "dtype": placement(task.dtype)[0],
        "seconds": time.monotonic() - started,
    }
    return Artifacts(open_store(store)).finish(EVALUATE, key, manifest)
