"""What each stage may take of a machine or a cluster, strict and frozen as the other sections."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from farm.sections import Positive, Strict


class RegenerateResources(Strict):
    num_gpus: float = Field(default=0, ge=0)
    num_cpus: float = Field(default=1, ge=0)
    min_actors: Positive = 1
    max_actors: Positive = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError("min_actors is above max_actors; raise max_actors")
        return self


class AdaptResources(Strict):
    workers: Positive = 1
    gpus_per_worker: float = Field(default=0, ge=0)
    parallel: Positive = 2  # runs at the same time
    # Targets that a run takes one after the other; None: many where they are small.
    pack: Positive | None = None


class ServeResources(Strict):
    replicas: Positive = 1  # of each group of targets; the least where they are scaled
    max_replicas: Positive | None = None  # more of them while requests wait; None: always `replicas`
    # Of a replica; rounded down also its torch threads, where OMP_NUM_THREADS is not set.
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)
    # Of a replica: weights, caches. None: all targets in one.
    memory_gib: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _at_least_the_least(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below replicas {self.replicas}; raise it")
        return self


class Resources(Strict):
    regenerate: RegenerateResources = RegenerateResources()
    adapt: AdaptResources = AdaptResources()
    serve: ServeResources = ServeResources()
