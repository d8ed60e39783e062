"""What an answer is worth, and the sandbox in which verifiers meet a model's text."""
