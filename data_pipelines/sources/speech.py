"""Words as speech: espeak-ng's formant synthesiser, through ctypes, from the wheel `espeakng-loader`.

espeak-ng keeps the phase of its oscillators and its noise from one utterance to the next, so what it says depends on
what it said before; `espeak_Terminate` does not help. Unloading the library and loading it again does, and makes every
utterance a pure function of its arguments, for about 4 ms each (most of them espeak-ng's scan for its voices). Names of
functions and constants are those of `espeak-ng/speak_lib.h`.

espeak-ng is GPL-3 and optional: nothing but the embedded source `digits` comes here.
"""

from __future__ import annotations

import _ctypes
import ctypes
import io
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import BadInput

SAMPLING_RATE = 16_000
INSTALL = 'pip install "triptych[demo]" (or: pip install espeakng-loader scikit-learn)'

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
# Quieter than the loudest frame by this much counts as silence.
_SILENCE_DB = 40.0
_FRAME_SECONDS = 0.01
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Voice:
    """An accent (a file below espeak-ng's `lang/gmw`) and a variant (a file below `voices/!v`): one speaker."""

    accent: str
    variant: str

    def __str__(self) -> str:
        return f"{self.accent}+{self.variant}"


@dataclass(frozen=True)
class Utterance:
    """What to say and how: `speed` in words a minute, `pitch` and `pitch_range` 0..99, `peak` a share of full scale."""

    text: str
    voice: Voice
    speed: int
    pitch: int
    pitch_range: int
    peak: float


@cache
def _installed() -> tuple[str, Path]:
    """(path of the library, folder of its data). Raises `BadInput` with the command that installs them."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise BadInput(f"source `digits` needs espeak-ng for its speech: {INSTALL}") from error
    return espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())


def check_voices(voices: list[Voice]) -> None:
    """Raise `BadInput` unless espeak-ng is installed with these voices. It would replace an unknown one in silence."""
    _, data = _installed()
    for voice in voices:
        for file in (data / "lang" / "gmw" / voice.accent, data / "voices" / "!v" / voice.variant):
            if not file.is_file():
                raise BadInput(f"espeak-ng's voice {voice} is missing ({file}): install espeakng-loader 0.2 again")


def say(utterance: Utterance) -> bytes:
    """The utterance as FLAC: mono, 16 bits, `SAMPLING_RATE`, silence trimmed, the loudest sample at `peak`."""
    import soundfile
    import soxr

    raw, rate = _synthesize(utterance)
    sound = soxr.resample(raw.astype(np.float32) / 32768.0, rate, SAMPLING_RATE)
    sound = _trim(sound)
    loudest = float(np.abs(sound).max(initial=0.0))
    if not loudest:
        raise RuntimeError(f"espeak-ng said nothing for {utterance}")
    file = io.BytesIO()
    samples = np.round(sound * (utterance.peak / loudest * 32767.0)).astype(np.int16)
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _synthesize(utterance: Utterance) -> tuple[npt.NDArray[np.int16], int]:
    """int16 mono samples and their rate."""
    library_path, data = _installed()
    chunks: list[bytes] = []

    def take(samples: int | None, count: int, _events: Any) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    with _LOCK:
        library = ctypes.CDLL(library_path)
        try:
            callback = _CALLBACK(take)
            rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), _INITIALIZE_DONT_EXIT)
            if rate <= 0:
                raise BadInput(f"espeak-ng cannot read its data in {data} (its path must be shorter than 140 bytes)")
            library.espeak_SetSynthCallback(callback)
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            name = f"gmw/{utterance.voice}".encode()
            text = utterance.text.encode() + b"\0"
            status = library.espeak_SetVoiceByName(ctypes.c_char_p(name))
            for parameter, value in (
                (_RATE, utterance.speed),
                (_PITCH, utterance.pitch),
                (_RANGE, utterance.pitch_range),
            ):
                status = status or library.espeak_SetParameter(parameter, value, 0)
            status = status or library.espeak_Synth(
                ctypes.c_char_p(text), ctypes.c_size_t(len(text)), 0, 1, 0, _CHARS_UTF8, None, None
            )
            status = status or library.espeak_Synchronize()
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)
    if status:
        raise RuntimeError(f"espeak-ng returned {status} for {utterance}")
    return np.frombuffer(b"".join(chunks), dtype=np.int16), rate


def _trim(sound: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Without the silence at both ends, but for one frame each."""
    frame = round(SAMPLING_RATE * _FRAME_SECONDS)
    num_frames = len(sound) // frame
    level = np.sqrt(np.square(sound[: num_frames * frame].reshape(num_frames, frame)).mean(axis=1))
    heard = np.flatnonzero(level > level.max(initial=0.0) * 10 ** (-_SILENCE_DB / 20))
    if not len(heard):
        return sound
    return sound[max(0, heard[0] - 1) * frame : (heard[-1] + 2) * frame]
