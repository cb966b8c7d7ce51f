"""What happens between two who may speak at once: a function each, laying slices on a scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bmkit.duplex.interactions.correction import late_correction
from bmkit.duplex.interactions.interrupted import back_on_topic, regeneration, reset, termination
from bmkit.duplex.interactions.ordinary import basic, interweave
from bmkit.duplex.interactions.overlap import backchannel, noise
from bmkit.duplex.interactions.silence import late_answer, pause
from bmkit.duplex.scene import Scene

INTERACTIONS: Mapping[str, Callable[[Scene], None]] = {
    "basic": basic,
    "interweave": interweave,
    "termination": termination,
    "regeneration": regeneration,
    "reset": reset,
    "back_on_topic": back_on_topic,
    "pause": pause,
    "backchannel": backchannel,
    "noise": noise,
    "late_answer": late_answer,
    "late_correction": late_correction,
}
"""By the names of a recipe's `mix`."""
