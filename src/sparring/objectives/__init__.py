"""The games. To add one: a file like these, a line here, a page in docs/objectives/."""

from sparring.objectives.sft import Sft
from sparring.objectives.space import Space
from sparring.objectives.spin import Spin
from sparring.objectives.tspin import Tspin

OBJECTIVES = {"sft": Sft, "spin": Spin, "tspin": Tspin, "space": Space}

__all__ = ["OBJECTIVES", "Sft", "Space", "Spin", "Tspin"]
