"""What answers are worth, before they are trained on."""

import json

import numpy as np

from dsjax.config_files import load_run_config
from dsjax.config_grpo import GrpoRunConfig
from dsjax.posttraining.rollout_rewards import weigh
from dsjax.rewards.score import Score


def test_a_control_deals_out_anew_who_is_right_and_nothing_else() -> None:
    form = {"name": "python", "path": "form.py", "weight": 0.3}
    rewards = f"rewards={json.dumps([{'name': 'exact'}, form])}"
    config = load_run_config("r1/cpu-comparison", ["grpo.shuffled_rewards=true", rewards])
    assert isinstance(config, GrpoRunConfig)
    own = config.rewards[1].weight
    draw = np.random.default_rng(0)
    right, formed = draw.integers(0, 2, (64, 4)), draw.uniform(0, 1, (64, 4))
    scores = [
        [
            Score(float(r + own * f), {"exact": float(r), "python": float(f)}, {})
            for r, f in zip(*group, strict=True)
        ]
        for group in zip(right, formed, strict=True)
    ]
    rollout = weigh([[] for _ in scores], scores, config, [3, 0])
    # Dr. GRPO's advantage is the reward less its group's mean: the form's share is known.
    dealt = rollout.advantages - own * (formed - formed.mean(1, keepdims=True))
    whole = np.isclose(dealt - dealt.min(1, keepdims=True), np.round(dealt - dealt.min(1)[:, None]))
    assert whole.all()
    correlation = np.corrcoef((right - right.mean(1, keepdims=True)).ravel(), dealt.ravel())[0, 1]
    assert abs(correlation) < 0.2
    again = weigh([[] for _ in scores], scores, config, [3, 0])
    np.testing.assert_array_equal(rollout.advantages, again.advantages)
