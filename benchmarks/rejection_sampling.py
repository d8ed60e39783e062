"""What filtering is worth: a student of filtered samples beside the same of unfiltered ones.

    python train.py r1/cpu-comparison run_dir=runs/comparison-teacher training.max_steps=40 \\
        grpo.kl_weight=0.02
    python benchmarks/rejection_sampling.py

The teacher, r1/cpu-comparison after its cold start, is stopped while it still errs.

For each seed, `dsjax sample` draws answers of the teacher to questions that are not held out. The
filtered student learns from one right answer to each prompt that has one; the unfiltered student
from the first answer to each of the same prompts, right or wrong. Both begin at the teacher, and
take the same steps over the same prompts and as many tokens. Then each answers held-out ones, four
times each. Prints a line a seed, the mean difference with its 95% interval (Student's t, paired by
seed), and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy import stats

from dsjax.config_files import load_sample_config
from dsjax.posttraining.prompts import open_questions

SAMPLE, STUDENT = "r1/cpu-comparison-sample", "r1/cpu-comparison-student"
HELD_OUT = 1000


def main() -> None:
    """Draw, train and measure, seed by seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", default="runs/comparison-teacher")
    parser.add_argument("--output", type=Path, default=Path("runs/rejection-sampling"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    questions = write_held_out(args.output / "held-out.jsonl")
    teacher = pass_at_1(args.teacher, questions, args.output / "teacher-answers")
    print(f"teacher: pass@1 {teacher:.3f} on {HELD_OUT:,} held-out questions")
    rows = [one_seed(args.teacher, questions, args.output, seed) for seed in range(args.seeds)]
    differences = [row["filtered"] - row["unfiltered"] for row in rows]
    low, high = interval(differences)
    mean = statistics.mean(differences)
    print(f"filtered better by {mean:.3f}, 95% interval {low:.3f} to {high:.3f}")
    found = {"teacher": teacher, "seeds": rows, "difference": mean, "interval": [low, high]}
    print(json.dumps(found))


def one_seed(teacher: str, questions: Path, output: Path, seed: int) -> dict[str, Any]:
    """Both students of one seed, and what they are worth."""
    folder = output / f"seed-{seed}"
    drawn = [f"checkpoint={teacher}", f"seed={seed}"]
    run("-m", "dsjax", "sample", SAMPLE, *drawn, f"output={folder / 'filtered-data'}")
    first = ["filters=[]", "sampling.k=1", f"output={folder / 'first-data'}"]
    run("-m", "dsjax", "sample", SAMPLE, *drawn, *first)
    filtered = read_lines(folder / "filtered-data/sft.jsonl")
    prompts = {row["provenance"]["prompt"] for row in filtered}
    everything = read_lines(folder / "first-data/sft.jsonl")
    unfiltered = [row for row in everything if row["provenance"]["prompt"] in prompts]
    assert len(filtered) == len(unfiltered) == len(prompts)
    found: dict[str, Any] = {"prompts": len(prompts)}
    for name, rows in (("filtered", filtered), ("unfiltered", unfiltered)):
        data, student = folder / f"{name}.jsonl", folder / name
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = [f"init={teacher}", f"seed={seed}", f"run_dir={student}"]
        run("train.py", STUDENT, *settings, f"data.paths.0={data}")
        found[f"{name}_characters"] = sum(len(r["prompt"] + r["completion"]) for r in rows)
        found[f"{name}_steps"] = read_lines(student / "metrics.jsonl")[-1]["step"]
        found[name] = pass_at_1(str(student), questions, folder / f"{name}-answers")
    print(
        f"seed {seed}: {len(prompts):,} prompts, {found['filtered_steps']} and "
        f"{found['unfiltered_steps']} steps; filtered {found['filtered']:.3f}, "
        f"unfiltered {found['unfiltered']:.3f}"
    )
    return found


def write_held_out(path: Path) -> Path:
    """Sums that neither the teacher nor a student was trained on."""
    config = load_sample_config(SAMPLE)
    questions = open_questions(config.prompts, lambda record, where: None, seed=0)
    held_out = questions.held_out(HELD_OUT)
    path.write_text("".join(json.dumps(dict(record)) + "\n" for record in held_out))
    return path


def pass_at_1(checkpoint: str, questions: Path, output: Path) -> float:
    """Mean over four answers to each question."""
    settings = [f"checkpoint={checkpoint}", f"prompts.path={questions}", f"output={output}"]
    every = ["prompts.held_out_fraction=0", "limit=null", "filters=[]", "sampling.k=4"]
    run("-m", "dsjax", "sample", SAMPLE, *settings, *every)
    return float(json.loads((output / "summary.json").read_text())["pass@1"])


def interval(values: list[float]) -> tuple[float, float]:
    """Student's, at 95%."""
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - reach, mean + reach


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*command: str) -> None:
    """A command of ours; its output is shown where it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
