"""bmkit's own delta methods in PEFT: importing this module makes PEFT know them.

PEFT has no entry points, and takes a method only if its closed enum `PeftType` names it. So a
process that loads such a delta with plain PEFT says once, before it does:

    import bmkit.deltas.own
    model = PeftModel.from_pretrained(base, folder)

`import bmkit` alone doesn't do it, since that loads neither torch nor PEFT.
"""

from __future__ import annotations

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from bmkit.deltas.tuners.adapter import AdapterConfig, AdapterTuner
from bmkit.deltas.tuners.bitfit import BitFitConfig, BitFitTuner
from bmkit.deltas.tuners.parallel_adapter import ParallelAdapterConfig, ParallelAdapterTuner
from bmkit.errors import ResourceError

__all__ = ["METHODS", "AdapterConfig", "BitFitConfig", "ParallelAdapterConfig", "register"]

METHODS = {
    "bmkit_adapter": (AdapterConfig, AdapterTuner),
    "bmkit_parallel_adapter": (ParallelAdapterConfig, ParallelAdapterTuner),
    "bmkit_bitfit": (BitFitConfig, BitFitTuner),
}
"""PEFT's name of each method (in `adapter_config.json` in upper case), its config and its tuner."""


def register() -> None:
    """Make PEFT know bmkit's methods; a second call does nothing.

    Raises ResourceError if this version of PEFT takes no methods of others.
    """
    for name, (config, tuner) in METHODS.items():
        if _member(name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
            register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=tuner.prefix)


def _member(value: str) -> PeftType:
    """Return the member of PEFT's closed enum with that name and value, putting it in if need be.

    The steps are those of the interpreter's own EnumType, which has no public way to do it.
    """
    if value in PeftType.__members__:
        return PeftType[value]
    try:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
        type.__setattr__(PeftType, value, member)
        fits = PeftType(value) is PeftType[value] is getattr(PeftType, value) is list(PeftType)[-1]
    except (AttributeError, TypeError, ValueError, KeyError):
        fits = False
    if not fits:
        raise ResourceError(
            f"peft {peft.__version__} takes no delta methods of others",
            hint="install peft 0.21",
        )
    return member


register()
