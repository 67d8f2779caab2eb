"""Random changes to training samples.

Everything is drawn from one generator that is keyed by (run seed, epoch, sample), so that a sample is changed in the
same way whichever rank or worker decodes it. The draws for the settings are made first and always: switching one
setting on or off does not move the others. Changes in the mel domain are made where the mel is, on the training device.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import soxr
from PIL import Image

from data_pipelines.config import AugmentConfig

Wave = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]


IMAGE_STREAM, AUDIO_STREAM = 0, 1
_EQUALIZER_POINTS = 6


def generator(seed: int, stream: int) -> np.random.Generator:
    """The random generator of one modality of one sample: a sound is changed alike with and without a picture."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


class ImageAugment:
    """One draw of the image settings: `crop_box` for the resize, then `apply` on what came out of it."""

    def __init__(self, config: AugmentConfig, random: np.random.Generator) -> None:
        self._config = config
        self._random = random
        self._draws = random.random(8)

    @staticmethod
    def is_active(config: AugmentConfig) -> bool:
        """Whether any setting changes images."""
        return (
            any((config.image_shift, config.image_scale, config.image_rotate, config.image_flip, config.image_noise))
            or config.image_crop < 1
        )

    def crop_box(self, width: int, height: int) -> Box | None:
        """Part of the image to keep, as (left, top, right, bottom) in pixels, of the same shape; None keeps all."""
        if self._config.image_crop >= 1:
            return None
        share, x, y = self._draws[0:3].tolist()
        side = math.sqrt(self._config.image_crop + (1 - self._config.image_crop) * share)
        left, top = x * (1 - side) * width, y * (1 - side) * height
        return left, top, min(width, left + side * width), min(height, top + side * height)

    def apply(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Flip, shift, scale and rotate in one affine transform (bilinear), then add noise: uint8 [H, W, 3]."""
        config = self._config
        shift_x, shift_y, scale, angle, flip = self._draws[3:8].tolist()
        mirrored = flip < config.image_flip
        if mirrored and not (config.image_shift or config.image_scale or config.image_rotate):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        elif config.image_shift or config.image_scale or config.image_rotate:
            image = self._affine(image, 2 * shift_x - 1, 2 * shift_y - 1, 2 * scale - 1, 2 * angle - 1, mirrored)
        pixels = np.asarray(image)
        if config.image_noise:
            deviation = 255 * config.image_noise * self._random.random(dtype=np.float32)
            noisy = pixels + deviation * self._random.standard_normal(pixels.shape, dtype=np.float32)
            pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        return pixels

    def _affine(
        self, image: Image.Image, shift_x: float, shift_y: float, scale: float, angle: float, mirrored: bool
    ) -> Image.Image:
        config, (width, height) = self._config, image.size
        turn = math.radians(angle * config.image_rotate)
        factor = 1 / max(0.05, 1 + scale * config.image_scale)
        cosine, sine = factor * math.cos(turn), factor * math.sin(turn)
        flip = -1.0 if mirrored else 1.0
        # Pillow wants the map from output to input; it turns about the middle.
        middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
        to_x = middle_x + shift_x * config.image_shift * width
        to_y = middle_y + shift_y * config.image_shift * height
        matrix = (
            flip * cosine,
            flip * sine,
            middle_x - flip * (cosine * to_x + sine * to_y),
            -sine,
            cosine,
            middle_y - (cosine * to_y - sine * to_x),
        )
        # What comes in from outside takes the colour of the corners, so that a white page does not get black edges.
        corners = [image.getpixel((x, y)) for x in (0, width - 1) for y in (0, height - 1)]
        fill = tuple(round(sum(band) / 4) for band in zip(*corners, strict=True))
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


def changes_audio(config: AugmentConfig) -> bool:
    """Whether any setting changes waves."""
    return any(
        (
            config.audio_speed,
            config.audio_shift_seconds,
            config.audio_gain_db,
            config.audio_noise,
            config.audio_tilt_db,
            config.audio_equalizer_db,
        )
    )


def augment_audio(wave: Wave, rate: int, config: AugmentConfig, random: np.random.Generator) -> Wave:
    """Speed, colour, gain, silence before, and noise, in this order: float32 [T] at `rate` Hz in, [T'] out."""
    draws = 2 * random.random(5 + _EQUALIZER_POINTS) - 1
    speed, tilt, gain, shift, noise = draws[:5].tolist()
    if config.audio_speed:
        wave = _change_speed(wave, rate, 1 + speed * config.audio_speed)
    if config.audio_tilt_db or config.audio_equalizer_db:
        slope = np.linspace(-0.5, 0.5, _EQUALIZER_POINTS) * tilt * config.audio_tilt_db
        wave = _colour(wave, rate, slope, draws[5:] * config.audio_equalizer_db)
    if config.audio_gain_db:
        wave = wave * np.float32(10 ** (gain * config.audio_gain_db / 20))
    rms = math.sqrt(float(np.dot(wave, wave)) / len(wave))
    if config.audio_shift_seconds:
        silence = round((shift + 1) / 2 * config.audio_shift_seconds * rate)
        wave = np.concatenate([np.zeros(silence, dtype=np.float32), wave])
    if config.audio_noise:
        level = np.float32((noise + 1) / 2 * config.audio_noise * rms)
        wave = wave + level * random.standard_normal(len(wave), dtype=np.float32)
    return wave


def augmented_samples(num_samples: int, rate: int, config: AugmentConfig, random: np.random.Generator) -> int:
    """Length of what `augment_audio` makes of so many samples, to one or two, without the sound."""
    draws = 2 * random.random(5 + _EQUALIZER_POINTS) - 1
    speed, _, _, shift, _ = draws[:5].tolist()
    silence: int = round((shift + 1) / 2 * config.audio_shift_seconds * rate)
    changed: int = round(num_samples / max(0.1, 1 + speed * config.audio_speed))
    return max(1, changed) + silence


def _change_speed(wave: Wave, rate: int, factor: float) -> Wave:
    changed: Wave = soxr.resample(wave, rate * max(0.1, factor), rate, quality="MQ")
    return changed if len(changed) else wave


def _colour(wave: Wave, rate: int, slope: npt.NDArray[np.float64], gains: npt.NDArray[np.float64]) -> Wave:
    """Change the spectrum by `slope`, in dB at equal steps in Hz, and by `gains`, in dB at equal steps in mel."""
    spectrum = np.fft.rfft(wave)
    hertz = np.linspace(0, rate / 2, len(spectrum))
    mel = np.log1p(hertz / 700)
    decibels = np.interp(hertz, np.linspace(0, rate / 2, len(slope)), slope)
    decibels += np.interp(mel, np.linspace(0, mel[-1], len(gains)), gains)
    return np.fft.irfft(spectrum * 10 ** (decibels / 20), len(wave)).astype(np.float32)
