"""The recipe: its settings, reading and writing it."""
