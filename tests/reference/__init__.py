"""What the tests compare with: written from the papers, sharing nothing with the model."""
