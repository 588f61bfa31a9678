"""The machines of a run, as far as predictions need to know them: a preset or a YAML file of one's own."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farspan.parallel.timeline import Link, Network


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LinkSection(_Section):
    gigabytes_per_second: float = Field(gt=0)
    """What large messages reach, each way at once, for each GPU (1e9 bytes)."""
    latency_microseconds: float = Field(0, ge=0)
    """What a message takes beyond its bytes."""

    @property
    def link(self) -> Link:
        return Link(1e9 * self.gigabytes_per_second, 1e-6 * self.latency_microseconds)


class Cluster(_Section):
    """Nodes that are all alike."""

    gpu: str
    """Name of the GPU, for reports."""
    compute_capability: tuple[int, int]
    """Such as [9, 0]: which table of attention rates is read, and which kernels can run."""
    gpus_per_node: int = Field(gt=0)
    """GPUs that the inner link connects."""
    memory_gib: float = Field(gt=0)
    """Memory of one GPU, as CUDA sees it."""
    matrix_tflops: float = Field(gt=0)
    """What large bf16 matrix products reach."""
    memory_gigabytes_per_second: float = Field(gt=0)
    """What passes over large tensors reach (1e9 bytes)."""
    inner: LinkSection
    """Between GPUs of one node (NVLink)."""
    outer: LinkSection
    """Between nodes (InfiniBand), for each GPU."""

    def network(self, tensor: int) -> Network:
        """As context ranks see it, each of which is `tensor` GPUs."""
        return Network(self.inner.link, self.outer.link, max(1, self.gpus_per_node // tensor))


def cluster_names() -> list[str]:
    files = resources.files("farspan.configs.clusters").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_cluster(name: str) -> Cluster:
    """`configs/clusters/NAME.yaml`, or the YAML file at a path, which ends in .yaml or .yml.

    ValueError, in one line, when there is no such cluster, or something is wrong in its file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text()
        except OSError as error:
            raise ValueError(f"cluster is the path {path}, which cannot be read: {error.strerror}") from error
    elif name in cluster_names():
        text = resources.files("farspan.configs.clusters").joinpath(f"{name}.yaml").read_text()
    else:
        near = get_close_matches(name, cluster_names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"there is no cluster {name!r}; {hint}possible are {', '.join(cluster_names())}, or the path of a .yaml"
        )
    try:
        tree: Any = yaml.safe_load(text)
        return Cluster.model_validate(tree)
    except yaml.YAMLError as error:
        raise ValueError(f"cluster {name} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())
        raise ValueError(f"cluster {name}: {'; '.join(problems)}") from error
