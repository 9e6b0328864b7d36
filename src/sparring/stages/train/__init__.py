"""The train stage."""

from sparring.stages.train.loop import train

__all__ = ["train"]
