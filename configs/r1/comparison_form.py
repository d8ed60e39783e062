"""Texts from which a model learns the form of an answer, and nothing else: the sign is random.

python configs/r1/comparison_form.py     writes runs/comparison-data/form.jsonl
"""

import json
import random
from pathlib import Path

COUNT = 30_000
PATH = Path("runs/comparison-data/form.jsonl")


def main() -> None:
    """Write them, the same every time."""
    draw = random.Random(0)
    texts = (
        f"{draw.randrange(1000):03}?{draw.randrange(1000):03}:{draw.choice('<>')}"
        for _ in range(COUNT)
    )
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
