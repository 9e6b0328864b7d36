"""The objectives. To add one: a file like these, its class here, a page in docs/objectives/."""

from sparring.objectives.dft import Dft
from sparring.objectives.dpo import Dpo
from sparring.objectives.rft import Rft
from sparring.objectives.sdft import Sdft
from sparring.objectives.sft import Sft
from sparring.objectives.sipo import Sipo
from sparring.objectives.space import Space
from sparring.objectives.spin import Spin
from sparring.objectives.ssimpo import Ssimpo
from sparring.objectives.tspin import Tspin
from sparring.objectives.tspin_ref import TspinRef

OBJECTIVES = {
    objective.name: objective for objective in (Sft, Dft, Rft, Sdft, Spin, Tspin, Space, Sipo, Ssimpo, TspinRef, Dpo)
}

__all__ = ["OBJECTIVES", "Dft", "Dpo", "Rft", "Sdft", "Sft", "Sipo", "Space", "Spin", "Ssimpo", "Tspin", "TspinRef"]
