"""Sizes of the networks: one table a preset, read by the backbone families.

`tiny` is for tests, demos and two CPU cores; `base` and `large` are for GPUs. Parameter counts with the default image
and audio geometry and the vocabulary named stand in docs/model.md, counted by a test.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TowerSize:
    """One transformer stack."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Preset:
    """All sizes of one model."""

    text: TowerSize
    vision: TowerSize
    audio: TowerSize
    audio_conv_channels: int
    embedding_size: int


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        text=TowerSize(128, 256, 4, 4, 2),
        vision=TowerSize(128, 256, 3, 4, 4),
        audio=TowerSize(96, 384, 2, 4, 4),
        audio_conv_channels=16,
        embedding_size=64,
    ),
    "base": Preset(
        text=TowerSize(768, 2304, 16, 12, 4),
        vision=TowerSize(768, 2304, 11, 12, 12),
        audio=TowerSize(512, 2048, 8, 8, 8),
        audio_conv_channels=32,
        embedding_size=512,
    ),
    "large": Preset(
        text=TowerSize(1792, 5376, 22, 14, 7),
        vision=TowerSize(1152, 4304, 20, 18, 18),
        audio=TowerSize(1024, 4096, 8, 8, 8),
        audio_conv_channels=32,
        embedding_size=1024,
    ),
}
