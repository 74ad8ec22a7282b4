"""What is on disk of a run; standard library only."""
