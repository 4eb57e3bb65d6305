"""Cheap looks at latents: the matrices are those of their source, and frames come as bytes, chunk by chunk."""

import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch

from ditkit.media import to_uint8
from ditkit.models.latent_rgb import WAN21, WAN22, factors_for, preview_frames, rgb_frames
from ditkit.models.taehv import TAEHV, TAEHVConfig


@pytest.mark.parametrize(
    ("z_dim", "rows", "columns", "bias"),
    [
        (16, WAN21, (0.3887, 0.8771, 1.3152), (-0.1835, -0.0868, -0.3360)),
        (48, WAN22, (-0.5209, -0.1927, 0.9241), (0.0317, -0.0878, -0.1388)),
    ],
)
def test_official_factors(z_dim, rows, columns, bias):
    """Sums of the columns, so that a number that was mistyped or left out is seen."""
    matrix, added = factors_for(z_dim)
    assert len(matrix) == z_dim
    assert matrix == rows
    assert added == bias
    assert np.asarray(matrix).sum(0) == pytest.approx(columns, abs=1e-9)


def test_latents_of_unknown_kind_have_no_factors():
    assert factors_for(4) is None


def test_factors_cannot_be_spoilt():
    with pytest.raises(TypeError):
        factors_for(16)[0][0][0] = 9.0


def test_rgb_frames():
    """One channel at a time, in another order of sums than the function's."""
    latents = torch.randn(2, 16, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    matrix, bias = factors_for(16)
    found = rgb_frames(latents, (matrix, bias))
    assert found.shape == (2, 3, 4, 5, 3)
    assert found.dtype == np.uint8
    for r in range(3):
        level = sum(latents[:, c].double().numpy() * matrix[c][r] for c in range(16)) + bias[r]
        assert np.abs(found[..., r] - (np.clip(level, -1, 1) + 1) * 127.5).max() <= 0.51
    with pytest.raises(ValueError, match="factors for 16 channels"):
        rgb_frames(latents[:, :8], (matrix, bias))


def test_black_and_white():
    matrix = [[1.0, 1.0, 1.0]]
    found = rgb_frames(torch.tensor([-1.0, 1.0, 5.0]).view(1, 1, 1, 1, 3), (matrix, [0.0, 0.0, 0.0]))
    assert found[0, 0, 0].tolist() == [[0] * 3, [255] * 3, [255] * 3]


@pytest.mark.parametrize("chunk", [1, 2])
def test_frames_of_a_small_vae(chunk):
    taehv = tiny.randomise(TAEHV(TAEHVConfig(z_dim=4, encoder_width=4, decoder_widths=(8, 6, 6, 4))), 1)
    latents = torch.randn(2, 4, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    chunks = preview_frames(taehv, latents, chunk)
    assert next(chunks).shape == (2, 4 * chunk - 3, 16, 24, 3)
    assert not torch.is_inference_mode_enabled()
    found = np.concatenate(list(preview_frames(taehv, latents, chunk)), 1)
    with torch.no_grad():
        whole = to_uint8(torch.cat(list(taehv.decode(latents, chunk)), 2))
    assert np.array_equal(found, whole)
    assert found.shape[1] == 9


def test_factors_need_no_torch():
    code = "import sys; from ditkit.models.latent_rgb import factors_for as f; f(16); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
