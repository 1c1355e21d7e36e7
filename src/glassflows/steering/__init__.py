"""Who goes on: strategies over the particles of a run, and the steerer that puts all together."""

from .best_of_n import BestOfN
from .calibration import Calibration
from .comparison import Comparison, compare
from .feynman_kac import FeynmanKac
from .feynman_kac_steerer import FeynmanKacSteerer
from .proposals import Twist
from .result import SteeringResult
from .rollouts import Rollouts
from .samples import Samples
from .search import BeamSearch, Halving
from .steerer import Steerer
from .strategy import Decision, Outcome, Strategy
from .trajectory import Trajectories

__all__ = [
    "BeamSearch",
    "BestOfN",
    "Calibration",
    "Comparison",
    "Decision",
    "FeynmanKac",
    "FeynmanKacSteerer",
    "Halving",
    "Outcome",
    "Rollouts",
    "Samples",
    "Steerer",
    "SteeringResult",
    "Strategy",
    "Trajectories",
    "Twist",
    "compare",
]
