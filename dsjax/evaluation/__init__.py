"""What a model is worth: tasks, R1's protocol, and lm-evaluation-harness."""
