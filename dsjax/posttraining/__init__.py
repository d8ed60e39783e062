"""What makes a base model reason: reinforcement learning, and what it learns from."""
