"""`hf-lsam doctor`: what a launch would do, found out by launching."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import click
import psutil
from packaging.requirements import Requirement
from rich.console import Console

from ..record import usable_cores
from .doctor_ray import ray_findings
from .finding import Finding, worker_count

VECTORS_OF_SNAPSHOTS = 6  # in addition to those of the exchange; a vector has a float32 per trained parameter
DEFAULT_PORT = 29500
MARKS = {"ok": "green", "note": "yellow", "wrong": "red"}
# Options that say what kind of script follows: true of the user's, not of the probe.
NOT_OF_THE_PROBE = ("-m", "--module", "--no_python", "--no-python")


@dataclass(frozen=True)
class Launch:
    """A launch as accelerate understands it.

    Args:
        options: the options of `accelerate launch`, without the script and what follows it.
        asked: processes that the command line or the configuration file asks for, or None.
        multi_gpu: whether torch's elastic launcher is to start them.
        machines: how many machines there are.
        machine: the number of this one.
        port: at which the workers meet, or None for the default.
        config: the configuration file that supplies what the command line leaves out, or None.
    """

    options: list[str]
    asked: int | None
    multi_gpu: bool
    machines: int
    machine: int
    port: int | None
    config: str | None


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--trainable", type=click.FloatRange(min=1), help="How many parameters will be trained, as in 7e9.")
@click.option(
    "--wait", type=click.FloatRange(min=1), default=90.0, show_default=True, help="Seconds that the launch may take."
)
@click.option("--ray", is_flag=True, help="Look at a Ray cluster: the options are those of python -m hf_lsam.ray.")
@click.argument("launch_options", nargs=-1, type=click.UNPROCESSED)
def doctor(trainable: float | None, wait: float, ray: bool, launch_options: tuple[str, ...]) -> None:
    """Says what `accelerate launch LAUNCH_OPTIONS` would do, by launching a script that only reports who it is.

    Give it the options of your launch; a script and its arguments may follow and are not started. The doctor's own
    options come first. With several machines, run it on each of them at the same time. The exit code is 1 when the
    launch would not do what was asked.
    """
    console = Console(highlight=False, soft_wrap=True)
    versions = list(version_findings())
    if any(finding.mark == "wrong" for finding in versions):
        tell(console, versions)  # what follows needs them
        return
    if ray:
        tell(console, [*ray_findings(launch_options), *memory_findings(False, trainable), *versions])
        return
    launch = understand(list(launch_options))
    findings = [*config_findings(launch), *port_findings(launch)]
    with console.status("starting the launch ...") if console.is_terminal else contextlib.nullcontext():
        reports, code, output = start(launch, wait)
    findings = [*launch_findings(launch, reports, code, output, wait), *findings]
    workers = reports[0]["world_size"] if reports else launch.asked or 1
    findings += [*thread_findings(reports), *memory_findings(workers == 1, trainable)]
    if workers > 1:
        findings += shared_memory_findings(len(reports) or workers // launch.machines, trainable)
    tell(console, [*findings, *versions])


def tell(console: Console, findings: Sequence[Finding]) -> None:
    """Prints the findings, the worst first.

    Raises:
        SystemExit: with code 1, if anything is wrong.
    """
    for finding in sorted(findings, key=lambda each: list(MARKS)[::-1].index(each.mark)):
        console.print(f"{finding.mark:6}", end="", style=MARKS[finding.mark])
        console.print(finding.text, markup=False)
        if finding.remedy:
            console.print(f"{'':6}-> {finding.remedy}", markup=False)
    if any(finding.mark == "wrong" for finding in findings):
        raise SystemExit(1)


# --- the launch ---


def understand(arguments: list[str]) -> Launch:
    """Reads the options with accelerate's own parser and its configuration file.

    Raises:
        click.ClickException: if accelerate would not accept them.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args: argparse.Namespace = launch_command_parser().parse_args([*arguments, "probe"])
    except SystemExit as error:
        if error.code in (0, None):
            raise
        reason = said.getvalue().strip().splitlines()[-1]
        raise click.ClickException(f"accelerate launch does not take these options: {reason}") from error
    words = [*arguments, "probe"]
    options = words[: len(words) - len(args.training_script_args) - 1]
    # As accelerate does: it reads the file that is named, or else the default one, unless --cpu is given.
    config = args.config_file or (default_config_file if Path(default_config_file).is_file() and not args.cpu else None)
    try:
        defaults = load_config_from_file(config) if config else None
    except (OSError, ValueError) as error:
        raise click.ClickException(f"accelerate launch cannot read its configuration file: {error}") from error

    def given(name: str, otherwise: Any = None) -> Any:
        value = getattr(args, name, None)
        value = getattr(defaults, name, None) if value is None else value
        return otherwise if value is None else value

    from_config = defaults is not None and str(getattr(defaults.distributed_type, "value", "")).startswith("MULTI_")
    return Launch(
        [word for word in options if word not in NOT_OF_THE_PROBE],
        given("num_processes"),
        bool(args.multi_gpu or from_config),
        int(given("num_machines", 1)),
        int(given("machine_rank", 0)),
        given("main_process_port"),
        config,
    )


def start(launch: Launch, wait: float) -> tuple[list[dict[str, Any]], int | None, str]:
    """Launches the probe.

    Returns:
        the reports of the processes on this machine, in the order of ranks; the exit code, or None if `wait` seconds
        were not enough; the launcher's output.
    """
    with tempfile.TemporaryDirectory(prefix="hf_lsam-doctor-") as folder:
        command = [sys.executable, "-P", "-m", "accelerate.commands.launch", *launch.options]
        command += ["--module", "hf_lsam.cli.probe", folder, str(wait / 2)]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            try:
                code = process.wait(timeout=wait)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            output.seek(0)
            said = output.read().decode(errors="replace")
        reports = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return sorted(reports, key=lambda report: report["rank"]), code, said


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a launcher that still runs, and everything that it started, which is in sessions of its own."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


# --- findings ---


def launch_findings(
    launch: Launch, reports: list[dict[str, Any]], code: int | None, output: str, wait: float
) -> Iterator[Finding]:
    """Which processes were started, where, and whether that is what was asked for."""
    started = reports[0]["world_size"] if reports else 0
    devices = Counter(report["device"] for report in reports if not report["error"])
    if launch.asked is not None and 0 < started < launch.asked:
        asked = f"{launch.asked} processes were asked for, and {started} {'is' if started == 1 else 'are'} started: "
        if launch.multi_gpu:
            yield Finding(
                "wrong",
                f"{asked}each of {launch.machines} machines starts as many as the other.",
                "Make --num_processes, which counts those of all machines, a multiple of --num_machines.",
            )
        else:
            without = ", without --cpu" if "--cpu" in launch.options else ""
            yield Finding(
                "wrong",
                f"{asked}without --multi_gpu, `accelerate launch` starts one process on a machine without GPUs, "
                "whatever --num_processes says.",
                f"accelerate launch --multi_gpu --num_processes {launch.asked} ...{without}; on CPU also use_cpu=True "
                "in the arguments of the script.",
            )
        return
    if code is None:
        here = f"{len(reports)} of {launch.asked or '?'} processes had said who they are"
        remedy = "Give it longer with --wait, or look at what keeps the processes from starting."
        if launch.machines > 1:
            remedy = (
                f"Run hf-lsam doctor on all {launch.machines} machines at the same time, with the --machine_rank of "
                "each, and see that --main_process_ip and the port can be reached from all."
            )
        yield Finding("wrong", f"the launch was not through after {wait:g} s: {here}.", remedy)
    errors = {report["error"] for report in reports if report["error"]}
    for error in sorted(errors):
        yield Finding("wrong", f"a script with LSAM ends at its beginning: {error}")
    if code and not errors:
        last = [line for line in output.strip().splitlines() if line.strip()][-3:]
        yield Finding(
            "wrong",
            f"`accelerate launch` ends with code {code}: {' / '.join(line.strip() for line in last)}",
            "Name --num_processes, and with several of them --multi_gpu; `accelerate env` shows the rest."
            if not reports
            else None,
        )
    if code == 0 and not errors:
        where = ", ".join(f"{count} on {device}" for device, count in devices.items())
        here = "here " if launch.machines > 1 else ""
        server = "a server process a machine" if launch.machines > 1 else "a server process"
        server = server if started > 1 else "no server process: the worker is alone with its anchor"
        yield Finding("ok", f"{worker_count(started)} would train ({here}{where}), with {server}.")
        for report in reports:
            name = f", {report['device_name']}" if report["device_name"] else ""
            yield Finding("ok", f"worker {report['rank']}: {report['device']}{name}, host {report['host']}")
    for device, count in devices.items():
        if count > 1 and device.startswith("cuda"):
            yield Finding(
                "note",
                f"{count} workers share {device}: each waits for the others' kernels.",
                "As many workers as GPUs train faster; share one to try things out.",
            )
    if devices.get("cpu") and _gpus_of_the_machine():
        yield Finding(
            "note",
            "the machine has an NVIDIA GPU, and the workers train on CPU.",
            "Install a torch with CUDA, and look at CUDA_VISIBLE_DEVICES and ACCELERATE_USE_CPU.",
        )


def config_findings(launch: Launch) -> Iterator[Finding]:
    """Where the values that are not on the command line come from."""
    if launch.config:
        yield Finding(
            "note",
            f"what the options leave out comes from {launch.config}.",
            "--config_file names another; delete it to have accelerate's own defaults.",
        )


def port_findings(launch: Launch) -> Iterator[Finding]:
    """Whether the port of the launch is free; with several machines, which ports must be open."""
    port = DEFAULT_PORT if launch.port is None else int(launch.port)
    if not launch.multi_gpu:
        return
    here = launch.machine == 0
    taken = port and here and _is_taken(port)
    if here and not taken:
        yield Finding("ok", f"port {port} is free." if port else "a free port will be chosen.")
    if taken and launch.machines == 1:
        yield Finding(
            "note",
            f"port {port} is taken: accelerate looks for another one by itself.",
            "--main_process_port 0 does so without a warning.",
        )
    elif taken:
        yield Finding(
            "wrong",
            f"port {port} is taken, and the other machines look for this launch there.",
            "Name a free one with --main_process_port, the same on all machines.",
        )
    if launch.machines > 1:
        yield Finding(
            "note",
            f"two ports of machine 0 must be reached by the others: {port}, and the one that its server chooses.",
            "server_port=... names the second. What servers exchange is encrypted; the launcher's own port is not.",
        )


def thread_findings(reports: list[dict[str, Any]]) -> Iterator[Finding]:
    """Whether the workers that train on this machine's CPU have as many threads as it has cores."""
    threads = [report["threads"] for report in reports if report.get("device") == "cpu"]
    cores = usable_cores()
    if not threads:
        return
    each = max(1, cores // len(threads))
    if sum(threads) > cores and len(threads) > 1:
        yield Finding(
            "note",
            f"{len(threads)} workers with {max(threads)} threads each share {cores} cores: they get in each other's "
            "way.",
            f"--num_cpu_threads_per_process {each}, or fewer workers.",
        )
    elif each > max(threads):
        yield Finding(
            "note",
            f"{worker_count(len(threads))} with {max(threads)} threads each leave cores of {cores} idle.",
            f"--num_cpu_threads_per_process {each}.",
        )
    else:
        yield Finding("ok", f"{sum(threads)} threads on {cores} cores.")


def memory_findings(alone: bool, trainable: float | None) -> Iterator[Finding]:
    """What a worker keeps in its own memory; `alone` if it has no server process."""
    from ..algorithms import ServerSettings, WorkerSettings  # import torch, for which --help need not wait
    from ..memory import worker_bytes

    server = ServerSettings(sync_steps=4) if alone else None
    kept = [worker_bytes(WorkerSettings(sync_steps=4), server, accelerator) for accelerator in (False, True)]
    each = f"{kept[0]} bytes" if kept[0] == kept[1] else f"{kept[0]} bytes (on a GPU {kept[1]})"
    total = (
        ""
        if trainable is None
        else f": {' or '.join(f'{size * trainable / 2**30:.2f}' for size in sorted({*kept}))} GiB"
    )
    yield Finding("ok", f"with the default settings LSAM keeps {each} a trained parameter in each worker{total}.")


def shared_memory_findings(workers: int, trainable: float | None) -> Iterator[Finding]:
    """Whether the vectors that this machine's workers exchange fit into /dev/shm, and what killed runs have left there.

    Args:
        workers: those on this machine.
        trainable: trained parameters, or None.
    """
    from ..memory import shared_bytes
    from ..transport.ownership import dead_launches  # imports torch, too

    folder = Path("/dev/shm")
    elsewhere = "Name a folder on a local disk in shared_memory_dir; in a container, raise --shm-size."
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Finding("wrong", "there is no /dev/shm that this user may write to.", elsewhere)
        return
    free = min(shutil.disk_usage(folder).free, psutil.virtual_memory().available)
    vectors = shared_bytes(workers) // 4 + VECTORS_OF_SNAPSHOTS
    fits = free // (4 * vectors)
    takes = f"the exchange of {worker_count(workers)} takes {vectors} vectors there"
    room = f"/dev/shm has room for {free / 2**30:.1f} GiB, and {takes}"
    if trainable is None:
        yield Finding("ok", f"{room}: up to {fits / 1e6:,.0f} million trainable parameters fit.")
    elif trainable <= fits:
        yield Finding("ok", f"{room}, {4 * vectors * trainable / 2**30:.2f} GiB: they fit.")
    else:
        yield Finding("wrong", f"{room}, {4 * vectors * trainable / 2**30:.2f} GiB: they do not fit.", elsewhere)
    if left := dead_launches(folder):
        size = sum(_size(file) for path in left for file in path.glob("*"))
        yield Finding(
            "note",
            f"launches that were killed hold {size / 2**20:.1f} MiB of /dev/shm: {', '.join(map(str, left))}.",
            "The next launch removes what they have left.",
        )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # a launch that has just begun has removed it
        return 0


def version_findings() -> Iterator[Finding]:
    """Whether the packages that hf_lsam requires are installed, in the versions that it requires."""
    try:
        required = [Requirement(line) for line in requires("hf-lsam") or []]
    except PackageNotFoundError:
        yield Finding(
            "note",
            "hf-lsam is not installed as a package: its requirements are unknown.",
            "In its checkout: pip install -e .",
        )
        return
    found = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            number = version(requirement.name)
            fits = requirement.specifier.contains(number, prereleases=True)
        except PackageNotFoundError:
            number, fits = "not installed", False
        found.append(f"{requirement.name} {number}")
        if not fits:
            yield Finding(
                "wrong",
                f"{requirement.name} is {number}, and hf_lsam needs {requirement.specifier}.",
                f"pip install '{requirement}'",
            )
    yield Finding("ok", f"python {sys.version.split()[0]}, hf-lsam {version('hf-lsam')}, {', '.join(found)}")


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _gpus_of_the_machine() -> bool:
    return Path("/proc/driver/nvidia/gpus").is_dir()
