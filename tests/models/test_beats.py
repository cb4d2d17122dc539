from __future__ import annotations

import torch
from intertitle.models.beats import AudioBranch, relative_buckets
from intertitle.models.config import AudioConfig


def test_buckets_by_hand():
    """half 160, exact below 80, then 80 + floor(80 * log10(d / 80)) up to 159; keys after the query at +160."""
    buckets = relative_buckets(1496, 320, 800)
    assert buckets.shape == (2 * 1496 - 1,)
    by_hand = {0: 0, -1: 1, 1: 161, -79: 79, 79: 239, -80: 80, 80: 240, -100: 87, 100: 247, -252: 119, -253: 120}
    by_hand |= {-777: 158, 777: 318, -780: 159, 800: 319, -1495: 159, 1495: 319}
    assert {at: int(buckets[at + 1495]) for at in by_hand} == by_hand


def test_bias_is_toeplitz_with_keys_minus_queries():
    config = AudioConfig(8, 12, 16, 1, 3, conv_pos=4, conv_pos_groups=2, num_frames=64, num_mel_bins=128, out_size=8)
    encoder = AudioBranch(config).tower.encoder
    table, bias = encoder.relative_attention_bias.weight, encoder.position_bias()
    assert bias.shape == (3, 32, 32)
    for query, key, bucket in [(0, 0, 0), (0, 5, 165), (5, 0, 5), (31, 30, 1), (2, 31, 189)]:
        assert torch.equal(bias[:, query, key], table[bucket])


def test_parameters_of_the_released_tower():
    """docs/facts.md 1.4: 90.717 M, of which the unused predictor is 768 * 527 + 527; the gain and the gate are folded
    here."""
    with torch.device("meta"):
        branch = AudioBranch(AudioConfig())
    count = sum(p.numel() for p in branch.tower.parameters())
    folded = 128 + 12 * 6 * (64 + 1)
    assert round((count + folded + 768 * 527 + 527) / 1e6, 3) == 90.717
    assert sum(p.numel() for p in branch.projector.parameters()) == 768 * 3584 + 3584 + 3584 * 3584 + 3584


def test_batch_rows_are_independent(opened, expected):
    branch = opened("av-qwen2").load("audio")
    fbank = torch.from_numpy(expected("av-qwen2")["fbank_video_policy"])
    other = torch.from_numpy(expected("av-qwen2")["fbank_audio_policy"])
    both = branch(torch.stack((fbank, other)))
    assert both.shape == (2, 1496, 128)
    torch.testing.assert_close(both[1:], branch(other[None]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2)
