"""Checks of the machine: packages, left-over locks, ports, limits, memory, GPUs."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from packaging.version import Version

from data_pipelines.errors import BadInput
from launch.doctor.finding import Finding, error, ok, size, warning
from pretrain.config import Config

# Lowest version that has what we call (pyproject.toml says why), and the one that the tests ran with.
TESTED = {
    "torch": ("2.10", "2.13.0"),
    "deepspeed": ("0.18", "0.19.8"),
    "accelerate": ("1.10", "1.15.0"),
    "transformers": ("5.3", "5.23.0"),
}
_NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "cifs", "smb", "beegfs", "ceph", "fuse", "9p", "wekafs", "pvfs")
_OLD_LOCK_SECONDS = 3600.0
# Less than the smallest batches take; Docker's default is 64 MB.
_SMALLEST_SHM_BYTES = 8 << 20
_PARAMETERS = {"tiny": 1.6e6, "base": 280e6, "large": 1.6e9}


def num_parameters(config: Config) -> float:
    """Parameters of the preset, about; overrides of single sizes are not counted."""
    return _PARAMETERS[config.model.preset]


def versions() -> Finding:
    """Packages between the oldest that works and the one that was tested."""
    wrong, newer, found = [], [], []
    for name, (lowest, tested) in TESTED.items():
        try:
            have = Version(version(name))
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        found.append(f"{name} {have}")
        if have < Version(lowest):
            wrong.append(f"{name} {have} is older than {lowest}")
        elif have.release[:2] > Version(tested).release[:2]:
            newer.append(f"{name} {have} is newer than the tested {tested}")
    advice = "install with --constraint constraints.txt"
    if wrong:
        return error("versions", "; ".join(wrong), advice)
    return warning("versions", "; ".join(newer), advice) if newer else ok("versions", ", ".join(found))


def jit_locks() -> Finding:
    """Locks that killed builds of torch extensions left: every later build there would wait on them for ever."""
    cleared, held = [], []
    for lock in _extension_locks():
        try:
            if _is_open(lock) or (_on_network(lock) and time.time() - lock.stat().st_mtime < _OLD_LOCK_SECONDS):
                held.append(lock)
                continue
            lock.unlink()
            cleared.append(lock)
        except FileNotFoundError:
            # A build that ended just now.
            continue
        except OSError as refused:
            return warning(
                "JIT locks", f"{lock}, which nobody holds, cannot be removed ({refused.strerror})", "have it removed"
            )
    if held:
        return warning(
            "JIT locks",
            f"{held[0]} is held, or may be by another host",
            "wait for that build; if there is none, remove the file",
        )
    return ok(
        "JIT locks", f"cleared {', '.join(map(str, cleared))}, which nobody held" if cleared else "none left over"
    )


def port() -> Finding:
    """A port for the ranks to meet at, and a name of this host that resolves."""
    wanted = os.environ.get("MASTER_PORT", "")
    try:
        check_port(int(wanted) if wanted.isdigit() else 0)
        socket.getaddrinfo(socket.gethostname(), None)
    except BadInput as refused:
        return error("port", str(refused), "see there")
    except OSError:
        advice = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface to use"
        return warning("port", f"the host's own name {socket.gethostname()} does not resolve", advice)
    return ok("port", f"MASTER_PORT {wanted} is free" if wanted.isdigit() else "a free one can be had")


def check_port(number: int) -> None:
    """Raise `BadInput` when a port of this machine, at which the ranks are to meet, is in use. 0 is any free one."""
    if number > 65535:
        raise BadInput(f"port {number}, at which the ranks are to meet, is none: the highest is 65535")
    with socket.socket() as probe:
        # As torch's own store does: one that was closed a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
            probe.listen(1)
        except OSError as refused:
            raise BadInput(
                f"port {number}, at which the ranks are to meet, cannot be had ({refused.strerror}): "
                "end what holds it (`ss -ltnp`), or use another port"
            ) from None


def open_files() -> Finding:
    """Loader workers take a file descriptor a batch, ranks several for each other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return warning("open files", f"at most {soft} a process", f"ulimit -n {min(4096, hard) if hard > 0 else 4096}")
    return ok("open files", f"at most {'any number' if soft == resource.RLIM_INFINITY else soft} a process")


def time_limits(config: Config | None) -> Finding:
    """A limit on processor time kills without a warning; one of the job is told, to those who listen."""
    seconds, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if seconds != resource.RLIM_INFINITY:
        return warning("time limits", f"a process is killed after {seconds} s of processor time", "ulimit -t unlimited")
    if "SLURM_JOB_END_TIME" in os.environ and config is not None and config.run.stop_before is None:
        return warning("time limits", "the job has one and run.stop_before is not set", "run.stop_before: 5m")
    return ok("time limits", "none on processes")


def threads(num_processes: int) -> Finding:
    """More threads than cores fight for them."""
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) * num_processes > cores:
        found = f"OMP_NUM_THREADS {asked} in {num_processes} processes on {cores} cores"
        return warning("threads", found, f"OMP_NUM_THREADS={max(1, cores // num_processes)}, or leave it unset")
    return ok("threads", f"{cores} cores for {num_processes} processes")


def gpus() -> Finding:
    """GPUs, their driver, and a torch that was built for them."""
    driver = _nvidia_driver()
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, driver {driver or 'unknown'}"
        return ok("GPUs", f"{found}, CUDA {torch.version.cuda}")
    if driver is None:
        return ok("GPUs", "none; ranks run on the CPU, over gloo")
    if torch.version.cuda is None:
        return error(
            "GPUs", f"driver {driver}, but torch {torch.__version__} is built for CPUs", "install torch for CUDA"
        )
    advice = "see nvidia-smi; the driver may be older than this CUDA, or CUDA_VISIBLE_DEVICES hides the GPUs"
    return error("GPUs", f"driver {driver}, but torch (CUDA {torch.version.cuda}) sees no GPU", advice)


def token(config: Config | None) -> Finding:
    """Whether there is a token of the Hugging Face Hub. It is not shown."""
    from huggingface_hub import get_token

    if get_token():
        return ok("Hub token", "there is one (not shown)")
    sources = [*config.data.train_sources, *config.data.eval_sources] if config else []
    if any(source.path.startswith("hf://") for source in sources):
        return warning("Hub token", "none, and data lie on the Hub", "`hf auth login`, unless they are public")
    return ok("Hub token", "none; only private repositories and pushing need one")


def shared_memory(config: Config, num_processes: int) -> Finding:
    """Worker processes stack batches in /dev/shm; where it is full they die of SIGBUS."""
    data = config.data
    if not data.num_workers or data.worker_type == "thread":
        return ok("/dev/shm", "not used: batches are made in the training process")
    batch = data.global_batch / num_processes * _sample_bytes(config)
    batches = num_processes * (data.num_workers * data.prefetch + 1)
    free = shutil.disk_usage("/dev/shm").free
    found = f"{size(free)} free, up to {size(batch * batches)} wanted for {batches} batches"
    advice = "docker run --shm-size or --ipc=host; or data.worker_type thread, or a lower data.prefetch"
    if free < _SMALLEST_SHM_BYTES:
        return error("/dev/shm", found, advice)
    # An upper bound: sounds and texts are seldom as long as they may be.
    return warning("/dev/shm", found, advice) if free < batches * batch else ok("/dev/shm", found)


def memory(config: Config, num_processes: int) -> Finding:
    """Host memory for weights, gradients and optimizer, where ranks run on the CPU or offload to it."""
    available = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()))
    on_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    needs = num_parameters(config) * (16 + (0 if on_gpu else 8 * num_processes))
    if on_gpu and not (config.engine.offload_optimizer or config.engine.offload_parameters):
        return ok("memory", f"{size(available)} available; weights and optimizer lie on the GPUs")
    found = f"{size(available)} available, about {size(needs)} wanted for weights, gradients and optimizer"
    advice = "a smaller model, fewer processes, or a machine with more memory"
    return warning("memory", found, advice) if available < needs else ok("memory", found)


def _sample_bytes(config: Config) -> float:
    """A sample in a batch, at most: patches of uint8, int16 sound, int64 tokens."""
    image, audio, text = config.data.image, config.data.audio, config.data.text
    pixels = image.max_patches * (3 * image.patch_size**2 + 16)
    return pixels + 2 * audio.sampling_rate * audio.max_seconds + 8 * text.max_tokens


def _extension_locks() -> Iterator[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    # Below the default folder there is one for each Python and CUDA first.
    for pattern in ("*/lock", "*/*/lock"):
        yield from folder.glob(pattern)


def _is_open(path: Path) -> bool:
    """Whether a process of this host has a file open; torch's builds do as long as they hold the lock."""
    wanted = os.stat(path)
    for process in psutil.process_iter():
        try:
            descriptors = os.listdir(f"/proc/{process.pid}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            link = f"/proc/{process.pid}/fd/{descriptor}"
            try:
                # The name first, since to look at a file whose server does not answer takes for ever.
                if Path(os.readlink(link)).name != path.name:
                    continue
                there = os.stat(link)
            except OSError:
                # Closed meanwhile; what else the process has open counts all the same.
                continue
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _on_network(path: Path) -> bool:
    """Whether a file may be used by other hosts as well."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind.startswith(_NETWORK_FILE_SYSTEMS)


def _nvidia_driver() -> str | None:
    """Version of NVIDIA's driver; None where there is no GPU of theirs."""
    if not shutil.which("nvidia-smi"):
        return "unknown" if any(Path("/dev").glob("nvidia[0-9]*")) else None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None
