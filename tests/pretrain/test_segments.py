"""Packed rows: every segment whole, whatever its length."""

from __future__ import annotations

import numpy as np
import torch

from pretrain.model.segments import SpecialTokens, build_rows

SPECIAL = SpecialTokens(bos=1, eos=2, image=3, boi=4, eoi=5, audio=6, boa=7, eoa=8)


def test_a_segment_longer_than_a_row_makes_the_rows_longer() -> None:
    """A long sound in one sample: its row is as long as it is, and no target is lost."""
    text, length = torch.full((3, 4), 9), torch.tensor([4, 2, 0])
    sounds, none = np.array([500, 10, 0]), np.zeros(3, dtype=np.int64)
    show = np.ones(3, dtype=bool)
    rows = build_rows(text, length, none, sounds, show, show, SPECIAL, 64)
    assert rows.ids.shape[1] % 16 == 0 and rows.ids.shape[1] >= 500 + 8
    assert len(rows.audio_slots) == 510 and (rows.ids.reshape(-1)[rows.audio_slots] == SPECIAL.audio).all()
    assert len(rows.targets) == 2 * (5 + 3) and rows.readout_sample.tolist() == [0, 1]
