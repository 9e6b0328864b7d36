"""The stages of an iteration, and where they run."""
