"""What `hf-lsam doctor --ray` finds: how `python -m hf_lsam.ray` would use a Ray cluster."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..version import __version__
from .finding import Finding, worker_count


def ray_findings(words: Sequence[str]) -> Iterator[Finding]:
    """Joins the cluster, and examines each node from a process on it.

    Args:
        words: the options of `python -m hf_lsam.ray`, none of which is required here; a script may follow `--`.
    """
    try:
        import ray

        from ..ray import cluster
        from ..ray.__main__ import parse
    except ImportError as error:
        yield Finding("wrong", str(error))
        return
    options, _ = parse(words)
    try:
        joined = cluster.connect(options["address"])
    except RuntimeError as error:
        yield Finding("wrong", str(error))
        return
    try:
        needs = cluster.Needs(options["cpus_per_worker"], options["gpus_per_worker"])
        nodes = cluster.nodes()
        yield from _room(nodes, needs, options["num_workers"], options["min_workers"])
        yield from _nodes(nodes, options["run_dir"], options["shared_memory_dir"])
        yield from _trust(cluster)
    finally:
        if joined:
            ray.shutdown()


def _room(nodes: Sequence[Any], needs: Any, asked: int | None, least: int) -> Iterator[Finding]:
    """How many workers would train, and where."""
    places = {node: node.places(needs) for node in nodes}
    for node, workers in places.items():
        has = f"{node.cpus:g} CPUs and {node.gpus:g} GPUs"
        with_relay = ", with a relay" if workers else ""
        yield Finding("ok", f"node {node.address}: {has}, room for {worker_count(workers)}{with_relay}.")
    room = sum(places.values())
    if not room and needs.gpus and not any(node.gpus for node in nodes):
        yield Finding(
            "wrong",
            "the cluster has no GPU, and each worker asks for one.",
            "--gpus_per_worker 0 trains on CPU, with use_cpu=True in the arguments of the script.",
        )
    elif room < least:
        yield Finding(
            "wrong",
            f"there is room for {worker_count(room)} of {needs} each, and none begins before there is room for "
            f"{least}.",
            "Add nodes, or lower --min_workers.",
        )
    elif asked is not None:
        some = f"{asked - room} would wait for nodes that come" if room < asked else "all that are asked for"
        train = f"{worker_count(min(room, asked))} would train"
        yield Finding("ok", f"{train}: {some}. One of the nodes has the root as well.")


def _nodes(nodes: Sequence[Any], run_dir: Path | None, shared_memory_dir: Path) -> Iterator[Finding]:
    """Whether hf_lsam runs on each node, and sees the run's folder there."""
    from ..ray.cluster import look_at

    with contextlib.ExitStack() as stack:
        probe = None
        if run_dir is not None:
            there = next(each for each in (run_dir.absolute(), *run_dir.absolute().parents) if each.is_dir())
            probe = Path(stack.enter_context(tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-")).name)
        seen = look_at(nodes, probe, shared_memory_dir)
    for node, found in zip(nodes, seen, strict=True):
        if isinstance(found, Exception):
            last = str(found).strip().splitlines()[-1]
            yield Finding(
                "wrong",
                f"nothing of hf_lsam runs on node {node.address}: {last}",
                "Install there what is installed here: in a checkout, pip install -e '.[ray]'",
            )
            continue
        if (found["hf_lsam"], found["python"]) != (__version__, platform.python_version()):
            has = f"hf_lsam {found['hf_lsam']} and Python {found['python']}"
            yield Finding("wrong", f"node {node.address} has {has}, and this machine another.", "Install the same.")
        if probe is not None and not found["sees"]:
            yield Finding(
                "wrong",
                f"node {node.address} does not see {run_dir}.",
                "--run_dir is a folder that all nodes share: no root could go on elsewhere, and nothing be resumed.",
            )
        yield Finding("ok", f"node {node.address}: {found['free'] / 2**30:.1f} GiB are free in {shared_memory_dir}.")


def _trust(cluster: Any) -> Iterator[Finding]:
    """What the cluster asks its users to trust."""
    ports = "Ray's ports listen on all interfaces, and whoever may use them runs code on every node"
    if cluster.asks_for_a_token():
        yield Finding("note", f"{ports}: the token of this cluster is as good as a login.", "Keep it as one.")
    else:
        yield Finding(
            "note",
            f"{ports}; this process knows of no token that they ask for.",
            "Use a private network, and RAY_AUTH_MODE=token on every node and driver.",
        )
    if not cluster.encrypts():
        yield Finding(
            "note",
            "what Ray's processes say is not encrypted (RAY_USE_TLS=0). What hf-lsam exchanges is, and does "
            "not pass through Ray.",
            "Use a private network or a tunnel.",
        )
