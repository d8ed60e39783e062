"""What a run will need and take on chips that are not there: memory, time, and where it goes."""
