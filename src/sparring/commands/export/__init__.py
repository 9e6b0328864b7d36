"""Out of the run directory: a model that others can load, and the rounds as preference data."""

from sparring.commands.export.model import export_model
from sparring.commands.export.pairs import export_pairs
from sparring.commands.export.push import push_folder

__all__ = ["export_model", "export_pairs", "push_folder"]
