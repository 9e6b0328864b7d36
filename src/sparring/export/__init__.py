"""Out of the run directory: a model that others can load, and the rounds as preference data."""

from sparring.export.model import export_model
from sparring.export.pairs import export_pairs
from sparring.export.push import push

__all__ = ["export_model", "export_pairs", "push"]
