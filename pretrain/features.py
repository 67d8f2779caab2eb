"""Sound to log-mel on the training device, with the numbers of the exported feature extractor.

`log_mel` follows transformers' `Gemma4AudioFeatureExtractor` step by step (semicausal padding, periodic Hann window,
magnitude spectrum, HTK mel filters, log with a floor), batched in torch; tests hold the two together. `augment_mel` is
SpecAugment (Park et al., 2019) and vocal tract length perturbation (Jaitly and Hinton, 2013), drawn per sample.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from data_pipelines.config import AudioConfig, AugmentConfig
from pretrain.counter_random import uniform

MEL_FLOOR = 1e-3
FRAME_MULTIPLE = 16
"""Spectrograms are padded to this many frames: few shapes, so that kernels are made once and memory is found again."""
_WARP, _TIME, _FREQUENCY = 101, 102, 103


def frame_length(audio: AudioConfig) -> int:
    """Samples an analysis window."""
    return round(audio.sampling_rate * audio.frame_ms / 1000)


def hop_length(audio: AudioConfig) -> int:
    """Samples between two windows."""
    return round(audio.sampling_rate * audio.hop_ms / 1000)


def num_frames(num_samples: Tensor, audio: AudioConfig) -> Tensor:
    """Whole frames in a sound. int64 [B] samples -> int64 [B] frames."""
    frame, hop = frame_length(audio), hop_length(audio)
    return torch.clamp((num_samples + frame // 2 - frame - 1) // hop + 1, min=0)


@functools.lru_cache(maxsize=8)
def _constants(
    sampling_rate: int, frame: int, mel_bins: int, low: float, high: float, device: str
) -> tuple[Tensor, Tensor, int]:
    import warnings

    from transformers.audio_utils import mel_filter_bank, window_function

    fft_length = 2 ** math.ceil(math.log2(frame))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an all-zero top filter is harmless and expected
        filters = mel_filter_bank(
            num_frequency_bins=fft_length // 2 + 1,
            num_mel_filters=mel_bins,
            min_frequency=low,
            max_frequency=high,
            sampling_rate=sampling_rate,
            norm=None,
            mel_scale="htk",
        )
    window = torch.tensor(window_function(frame), dtype=torch.float32, device=device)
    return window, torch.tensor(filters, dtype=torch.float32, device=device), fft_length


@torch.no_grad()
def log_mel(samples: Tensor, length: Tensor, audio: AudioConfig) -> tuple[Tensor, Tensor]:
    """Log-mel spectrogram of a padded batch.

    Args:
        samples: int16 [B, T], zero padded.
        length: int64 [B], valid samples of each row.
        audio: rates and filters.

    Returns:
        float32 [B, F, mel_bins], zero in invalid frames, and bool [B, F], true where the whole window is sound.
        F is a multiple of FRAME_MULTIPLE, and at least that.
    """
    frame, hop = frame_length(audio), hop_length(audio)
    window, filters, fft_length = _constants(
        audio.sampling_rate, frame, audio.mel_bins, audio.min_frequency, audio.top_frequency, str(samples.device)
    )
    longest = int(num_frames(length, audio).max()) if length.numel() else 0
    frames_needed = max(1, -(-longest // FRAME_MULTIPLE)) * FRAME_MULTIPLE
    wanted = (frames_needed - 1) * hop + frame + 1
    waveform = samples.to(torch.float32) / 32768.0
    waveform = torch.nn.functional.pad(waveform, (frame // 2, max(0, wanted - frame // 2 - waveform.shape[1])))
    frames = waveform[:, :wanted].unfold(1, frame + 1, hop)[..., :-1] * window
    mel = torch.log(torch.fft.rfft(frames, n=fft_length).abs() @ filters + MEL_FLOOR)
    mel = (mel - audio.mel_mean) / audio.mel_std
    mask = torch.arange(mel.shape[1], device=mel.device)[None, :] < num_frames(length, audio)[:, None]
    return mel * mask[..., None], mask


@torch.no_grad()
def augment_mel(mel: Tensor, mask: Tensor, seed: Tensor, augment: AugmentConfig) -> Tensor:
    """Warp the mel axis and blank bands and spans.

    Args:
        mel: float32 [B, F, M]; mask: bool [B, F]; seed: int64 [B].

    Returns:
        float32 [B, F, M]; a blank is 0, the mean of the normalised spectrogram.
    """
    batch, frames, bins = mel.shape
    if augment.mel_warp > 0:
        factor = 1 + (2 * uniform(seed, _WARP, 1) - 1) * augment.mel_warp
        place = (torch.arange(bins, device=mel.device)[None, :] * factor).clamp(max=bins - 1)
        low = place.floor().long()
        share = (place - low)[:, None, :]
        high = (low + 1).clamp(max=bins - 1)
        take = lambda index: torch.gather(mel, 2, index[:, None, :].expand(batch, frames, bins))  # noqa: E731
        mel = take(low) * (1 - share) + take(high) * share
    if augment.mel_time_masks:
        valid = mask.sum(1, keepdim=True)
        draw = uniform(seed, _TIME, 2 * augment.mel_time_masks)
        mel = mel * ~_spans(draw, valid, augment.mel_time_mask_share, frames)[:, :, None]
    if augment.mel_frequency_masks:
        draw = uniform(seed, _FREQUENCY, 2 * augment.mel_frequency_masks)
        total = torch.full((batch, 1), bins, device=mel.device)
        mel = mel * ~_spans(draw, total, augment.mel_frequency_mask_share, bins)[:, None, :]
    return mel * mask[..., None]


def _spans(draw: Tensor, extent: Tensor, share: float, size: int) -> Tensor:
    """Union of random spans: draw float [B, 2n] (widths, then starts), extent int [B, 1] -> bool [B, size]."""
    width, start = draw.chunk(2, dim=1)
    width = width * share * extent
    start = start * (extent - width)
    at = torch.arange(size, device=draw.device)[None, None, :]
    return ((at >= start[..., None]) & (at < (start + width)[..., None])).any(1)
