"""Is an export what it says it is? Its files, and the model that a stranger would load from them.

A fresh, isolated interpreter in which triptych cannot be imported loads the folder with transformers alone and answers
the probes of `eval/reference.json`; the answers must be those that the run's own weights gave when they were exported.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_pipelines.dataset import Dataset
from data_pipelines.decode import load_audio, load_image, to_int16
from data_pipelines.errors import BadInput
from pretrain.config import load_config
from pretrain.folders import (
    EXPORT_MANIFEST,
    FORMAT_VERSION,
    PROBE_AUDIO,
    PROBE_IMAGE,
    REFERENCE,
    TRAINING_CONFIG,
)

TOLERANCE = 1e-3
"""Largest difference of a loss in nats, and of a logit relative to the largest one."""
_CHILD_SECONDS = 900
# What a download from the Hub adds to a folder.
_FOREIGN = (".gitattributes", ".git", ".cache", ".huggingface")


@dataclass
class Verification:
    """The outcome: `problems` is empty exactly when the export is verified."""

    problems: list[str] = field(default_factory=list)
    num_files: int = 0
    num_probes: int = 0
    num_parameters: int = 0
    largest_logit_difference: float = 0.0
    largest_loss_difference: float = 0.0
    generated: list[str] = field(default_factory=list)
    same_captions: bool = True
    seconds: float = 0.0

    @property
    def verified(self) -> bool:
        """Whether everything was as it should be."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """For `--json` and `results.json`."""
        finite = {name: None if value == math.inf else value for name, value in vars(self).items()}
        return {"verified": self.verified, **finite}


def verify_export(folder: Path, dataset: Dataset | None = None) -> Verification:
    """Check an export.

    Args:
        folder: the export.
        dataset: the data that its reference has samples of; they are compared too. None compares the probes that
            travel with the export.

    Raises:
        BadInput: the folder is no export of ours, or `dataset` is not the one of the reference.
    """
    start = time.monotonic()
    reference = _read_reference(folder)
    result = Verification()
    result.problems += _check_files(folder, result)
    if not result.problems:
        with tempfile.TemporaryDirectory(prefix="triptych-verify-") as work:
            expected, probes = _probes(folder, reference, dataset, Path(work))
            found = _ask(folder, probes, Path(work), result)
        if found is not None:
            _compare(expected, found, result)
    result.seconds = round(time.monotonic() - start, 3)
    return result


def write_manifest(folder: Path) -> None:
    """Write `MANIFEST.json`: size and SHA-256 of every file in the folder."""
    files = {name: _entry(folder / name) for name in _files(folder)}
    content = json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1, sort_keys=True)
    (folder / EXPORT_MANIFEST).write_text(content + "\n")


def _files(folder: Path) -> list[str]:
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(
        name.as_posix() for name in names if name.parts[0] not in _FOREIGN and name.as_posix() != EXPORT_MANIFEST
    )


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_reference(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    try:
        reference = json.loads((folder / REFERENCE).read_text())
    except OSError as error:
        raise BadInput(f"{folder}: not an export of ours (no {REFERENCE}); make one with `triptych export`") from error
    except ValueError as error:
        raise BadInput(f"{folder / REFERENCE}: is not JSON ({error}); export again") from error
    if not isinstance(reference, dict) or reference.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{folder / REFERENCE}: not of format version {FORMAT_VERSION}; export again")
    return reference


def _check_files(folder: Path, result: Verification) -> list[str]:
    try:
        listed = json.loads((folder / EXPORT_MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{EXPORT_MANIFEST} is missing or cannot be read"]
    there = _files(folder)
    result.num_files = len(there)
    problems = [f"{name} is missing" for name in sorted(set(listed) - set(there))]
    problems += [f"{name} is not in {EXPORT_MANIFEST}" for name in sorted(set(there) - set(listed))]
    for name in sorted(set(there) & set(listed)):
        if _entry(folder / name) != listed[name]:
            problems.append(f"{name} is not the file that was exported (its size or SHA-256 differs)")
    return problems


def _probes(
    folder: Path, reference: dict[str, Any], dataset: Dataset | None, work: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The expected measures, and the same probes as the other process wants them, with paths to their files."""
    expected, probes = [], []
    for probe in reference["probes"]:
        image = str((folder / PROBE_IMAGE).resolve()) if "num_image_tokens" in probe else None
        audio = str((folder / PROBE_AUDIO).resolve()) if "num_audio_tokens" in probe else None
        expected.append(probe)
        probes.append(_question(probe, image, audio))
    if dataset is None:
        return expected, probes
    recorded = reference["data"]
    if recorded is None:
        raise BadInput("--data: the export has no reference values of any dataset; verify without it")
    if recorded["fingerprint"] != dataset.fingerprint:
        raise BadInput(
            f"--data {dataset.location}: not the data of the export's reference, {recorded['name']} "
            f"(fingerprint {recorded['fingerprint'][:12]}, here {dataset.fingerprint[:12]})"
        )
    data = load_config(folder / TRAINING_CONFIG).data
    wanted = {probe["key"]: probe for probe in recorded["probes"]}
    for i, key in enumerate(dataset.keys(np.arange(len(dataset)))):
        if key not in wanted:
            continue
        sample, image, audio = dataset[i], None, None
        # Decoded here, as plain PNG and WAV there: what is compared is what happens from the pixels and the wave on.
        if sample.image is not None and "num_image_tokens" in wanted[key]:
            image = str(work / f"{i}.png")
            load_image(sample.image, data.image.max_pixels).save(image)
        if sample.audio is not None and "num_audio_tokens" in wanted[key]:
            audio = str(work / f"{i}.wav")
            wave = to_int16(load_audio(sample.audio, data.audio))
            soundfile.write(audio, wave, data.audio.sampling_rate, subtype="PCM_16")
        expected.append(wanted[key])
        probes.append(_question(wanted[key], image, audio))
    return expected, probes


def _question(probe: dict[str, Any], image: str | None, audio: str | None) -> dict[str, Any]:
    asked = ("prompt", "prompt_ids", "caption_ids", "vocabulary", "max_new_tokens")
    return {name: probe[name] for name in asked} | {"image": image, "audio": audio}


def _ask(folder: Path, probes: list[dict[str, Any]], work: Path, result: Verification) -> dict[str, Any] | None:
    questions, answers = work / "probes.json", work / "answers.json"
    questions.write_text(json.dumps(probes))
    script = Path(__file__).with_name("reload_export.py")
    command = [sys.executable, "-I", str(script), str(folder.resolve()), str(questions), str(answers)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_SECONDS, cwd=work)
    except subprocess.TimeoutExpired:
        result.problems.append(f"loading and asking the export took more than {_CHILD_SECONDS} seconds")
        return None
    if done.returncode != 0 or not answers.is_file():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        result.problems.append(f"transformers cannot load or run it: {lines[-1] if lines else done.returncode}")
        return None
    return dict(json.loads(answers.read_text()))


def _compare(expected: list[dict[str, Any]], found: dict[str, Any], result: Verification) -> None:
    result.num_parameters = found["num_parameters"]
    result.num_probes = len(expected)
    if found["triptych_imported"]:
        result.problems.append("loading the export imported triptych")
    for name, keys in found["loading_problems"].items():
        result.problems.append(f"transformers reports {name}: {', '.join(map(str, keys[:3]))}")
    for want, have in zip(expected, found["probes"], strict=True):
        result.problems += [f"{want['key']}: {problem}" for problem in _differences(want, have, result)]
        result.generated.append(have.get("generated", ""))
        result.same_captions &= want["generated_ids"] == have.get("generated_ids")


def _differences(want: dict[str, Any], have: dict[str, Any], result: Verification) -> list[str]:
    problems = []
    for name in ("prompt_ids", "num_image_tokens", "num_audio_tokens", "pixels_sha256"):
        if want.get(name) != have.get(name):
            problems.append(f"{name} is {_short(have.get(name))} instead of {_short(want.get(name))}")
    for name in ("mel_mean", "mel_std"):
        if name in want and not math.isclose(want[name], have.get(name, math.nan), abs_tol=1e-3):
            problems.append(f"{name} is {have.get(name)} instead of {want[name]}")
    if "logits" not in have:
        return problems
    flat = [value for row in want["logits"] for value in row] + want["logsumexp"]
    answer = [value for row in have["logits"] for value in row] + have["logsumexp"]
    scale = max(1.0, max(map(abs, flat)))
    logit_difference = _largest(flat, answer) / scale
    loss_difference = _largest([want["loss"]], [have["loss"]])
    result.largest_logit_difference = max(result.largest_logit_difference, logit_difference)
    result.largest_loss_difference = max(result.largest_loss_difference, loss_difference)
    if not logit_difference <= TOLERANCE:
        problems.append(f"logits differ by {logit_difference:.2g} of the largest (more than {TOLERANCE})")
    if not loss_difference <= TOLERANCE:
        problems.append(f"the caption loss is {have['loss']:.6f} instead of {want['loss']:.6f} nats a token")
    return problems


def _largest(want: list[float], have: list[float]) -> float:
    """Largest absolute difference; infinite where the lengths differ or a value is not a number."""
    if len(want) != len(have):
        return math.inf
    differences = [abs(a - b) for a, b in zip(want, have, strict=True)]
    return math.inf if any(math.isnan(d) for d in differences) else max(differences, default=0.0)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
