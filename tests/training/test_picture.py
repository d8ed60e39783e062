"""The picture of a run."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import font_manager

from dsjax.training.picture import draw_run


@pytest.mark.parametrize("spread", [0.0, 0.05, 2.0])
def test_a_picture_needs_no_font_but_one(spread, tmp_path, monkeypatch, caplog):
    """A machine's cache of fonts may be old or lack some; that is nothing to tell a user."""
    one = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", one)
    font_manager.fontManager._findfont_cached.cache_clear()
    norms = np.exp(np.random.default_rng(0).normal(size=20) * spread)
    records = [
        {
            "step": step,
            "tokens": step * 1000,
            "loss": 5 - step / 100,
            "mtp_loss": [5.5 - step / 100],
            "max_violation": [0.3, 0.4],
            "learning_rate": 1e-3,
            "tokens_per_second": 1000.0,
            "grad_norm": float(norm),
        }
        for step, norm in enumerate(norms, start=1)
    ]
    records.append({"tokens": 20_000, "held_out_loss": 4.2, "held_out_load": [[0.25] * 4] * 2})
    draw_run(records, tmp_path / "training.png", "a run")
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert not caplog.records
