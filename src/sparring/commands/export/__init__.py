"""`sparring export`: a model that other tools load, or preference pairs, and the upload of either to the Hub."""

from sparring.commands.export.model import export_model
from sparring.commands.export.pairs import export_pairs
from sparring.commands.export.push import push_folder

__all__ = ["export_model", "export_pairs", "push_folder"]
