"""Several deltas on one model, of the same or of different types, also on the same layers.

Each is put into the model beside the others, works with them or alone, and is saved as a PEFT
directory that plain PEFT loads without the others. A model with deltas is the base itself, or a
PeftModel around it where one of them needs that: prompt learning, or a method that shares weights
between layers (VeRA).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from bmkit.deltas import folders as saved
from bmkit.deltas import own, ranks
from bmkit.deltas.grown import grow
from bmkit.deltas.held import Held, base_of, held_by, is_prompt, switches
from bmkit.deltas.residual import as_plain, takes_part
from bmkit.deltas.tuners.beside import Beside
from bmkit.errors import InputError, RecipeError, first_line

_COPIES = {"ln_tuning_layers", "modules_to_save"}
"""Where PEFT keeps copies of modules."""
_INSIDE = {"down", "up", "left", "right", "rule", "weight", "bias", "base_layer", "shared"}
"""Parts of the names of deltas' own parameters."""
_SAFE = re.compile(r"[A-Za-z0-9_-]+")


def attach(model: Any, configs: Mapping[str, PeftConfig]) -> Any:
    """Put new deltas into `model` by their names, all active and trainable; nothing else is.

    Deltas that it has already go on working, and aren't trained. They are put in as given, but norm
    tuning first and prompt learning last: on a layer that several change, each works on what those
    before it give. Returns the model to use, which is `model` unless a delta has to wrap it. Raises
    RecipeError for a config that doesn't fit the model or the others.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for name in sorted(configs, key=lambda n: _rank(configs[n])):
        config = copy.deepcopy(configs[name])
        config.inference_mode = False
        held = {id(p) for p in trained}
        model = _insert(model, name, config)
        trained += [p for p in model.parameters() if p.requires_grad and id(p) not in held]
        if takes_part(config):
            tensors = {n: t.detach().clone() for n, t in _held(model, name).tensors().items()}
            base_of(model).__dict__.setdefault("bmkit_begun", {})[name] = tensors
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def load(model: Any, folders: Mapping[str, Path]) -> Any:
    """Put saved deltas into `model` by their names, in the order of `attach`, all active, frozen.

    It gets rows for tokens that were added, if there are some. Raises InputError for a folder that
    holds no delta, one of an unknown type, a damaged file, and tensors that are missing or have no
    place in the model.
    """
    configs = {name: saved.config(folder) for name, folder in folders.items()}
    tensors = {name: saved.tensors(folder) for name, folder in folders.items()}
    grow(base_of(model), configs.values())
    hint = "was it trained on another base?"
    for name in sorted(configs, key=lambda n: _rank(configs[n])):
        where = f"{folders[name]} doesn't fit this model"
        try:
            model = _insert(model, name, configs[name])
        except RecipeError as exc:
            said = str(exc).removeprefix(f"deltas: `{name}` doesn't fit the model: ")
            raise InputError(f"{where}: {said}", hint=exc.hint or hint) from None
        if said := _held(model, name).put(tensors[name]):
            raise InputError(f"{where}: {said}", hint=hint)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def save(model: Any, name: str, folder: Path) -> None:
    """Write a delta as a PEFT directory that plain PEFT loads, alone, onto the plain base.

    One that has begun with a part of the weights (PiSSA, OLoRA) is written as plain LoRA of twice
    the rank, if it was put in by `attach`.
    Embeddings of the model are not among its weights, unless the delta trains them. Raises
    InputError for a name that no delta has.
    """
    held = _held(model, name)
    saved.write(folder, held.config_alone(), held.tensors(), held.base)
    begun = held.base.__dict__.get("bmkit_begun", {}).get(name)
    if begun is not None:
        as_plain(folder, begun)


def swap(model: Any, name: str, folder: Path) -> None:
    """Give a delta the weights of a saved one of the same kind and sizes, in place.

    Raises InputError, with nothing changed, for a name that no delta has, and for a folder whose
    delta would compute something else than weights can tell.
    """
    held, given = _held(model, name), saved.tensors(folder)
    said = saved.differ(saved.config(folder), held.config)
    if not said and _shapes(given) != _shapes(held.tensors()):
        said = "its tensors are others"
    said = said or held.put(given)
    if said:
        raise InputError(f"{folder} can't take the place of `{name}`: {said}")


@contextmanager
def active(model: Any, names: Collection[str] | None) -> Iterator[None]:
    """Let only the deltas `names` work while the block runs; without one the base is as it was.

    They work in the order in which they were put in. What is trainable stays so. Raises InputError
    for a name that no delta has.
    """
    base, wanted = base_of(model), {_inner(model, name) for name in names or ()}
    chosen = [inner for inner in _known(base).values() if inner in wanted]
    before = [(m, m._active_adapter, m._disable_adapters) for m in switches(base)]
    with ExitStack() as stack:
        if is_prompt(model) and model.active_adapter not in chosen:
            stack.enter_context(model.disable_adapter())
        try:
            _use(base, chosen)
            yield
        finally:
            for module, adapters, disabled in before:
                module._active_adapter, module._disable_adapters = adapters, disabled


def tuners(model: Any) -> list[Any]:
    """Return PEFT's tuners that have something to do at each step: those of AdaLoRAs."""
    return list(ranks.tuners_of(base_of(model)).values())


def unplug(model: Any, name: str) -> Any:
    """Take a delta out of `model`, and return the model to use, which is as if it never had it.

    Raises InputError for a name that no delta has.
    """
    held, base = _held(model, name), base_of(model)
    inner = held.name
    trained = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which adapter is active now
        for module in list(switches(base)):
            if inner in held_by(module):
                _drop(module, inner)
    _unwrap(base)
    del _known(base)[name]
    there = (held.owner.peft_config, base.__dict__.get("peft_config", {}), ranks.tuners_of(base))
    for configs in there:
        configs.pop(inner, None)
    _use(base, list(_known(base).values()))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    if not _known(base):
        forget(base)
    return model if held.owner is base else base


def parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a delta by their names in `model`, trained modules included."""
    held = _held(model, name)
    inner = held.name
    if is_prompt(held.owner):
        return dict(
            held.owner.prompt_encoder[inner].named_parameters(prefix=f"prompt_encoder.{inner}")
        )
    tagged = re.compile(rf"\.{re.escape(inner)}(\.|$)")
    return {n: p for n, p in model.named_parameters() if tagged.search(n)}


def names(model: Any) -> list[str]:
    """Return the names of a model's deltas, in the order in which they were put in."""
    return list(_known(base_of(model)))


def _insert(model: Any, name: str, config: PeftConfig) -> Any:
    """Put a delta in, and let it work with those that are there."""
    own.register()
    base = base_of(model)
    known: dict[str, str] = base.__dict__.setdefault("bmkit_deltas", {})
    if name in known:
        raise RecipeError(f"deltas: there are two of the name `{name}`")
    if _wraps(config) and model is not base:
        raise RecipeError(
            f"deltas: `{name}` can't be beside another one of its kind",
            hint="one prefix, prompt, p-tuning or VeRA-like delta fits, beside any others",
        )
    if known and any(
        _changes_base(c) for c in (config, *base.__dict__.get("peft_config", {}).values())
    ):
        raise RecipeError(
            f"deltas: `{name}` can't be beside the others",
            hint="PiSSA, OLoRA, CorDA and LoftQ begin by changing the base: one goes alone",
        )
    inner = _safe(base, name)
    try:
        if _wraps(config):
            model = _wrapped(base, config, inner)
        else:
            _injected(base, config, inner)
    except (ValueError, TypeError) as exc:
        absent = _absent(base, config)
        said = f"it has no module `{absent[0]}`" if absent else first_line(exc)
        raise RecipeError(f"deltas: `{name}` doesn't fit the model: {said}") from None
    known[name] = inner
    if isinstance(model, PeftModel) and not is_prompt(model):
        model.base_model.peft_config.update(base.peft_config)
    for module in base.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and len(module._adapters) > 1:
            raise RecipeError(
                "deltas: two of them train the same module whole",
                hint="name it in modules_to_save of one only",
            )
    _look_for_copies(base, name)
    _use(base, list(known.values()))
    return model


def _absent(base: nn.Module, config: PeftConfig) -> list[str]:
    """Return those of a delta's modules that the model doesn't have, sorted."""
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):  # a regular expression, or PEFT's word for all
        return []
    there = [f".{name}" for name, _ in base.named_modules()]
    return sorted(t for t in targets if not any(name.endswith(f".{t}") for name in there))


def _look_for_copies(base: nn.Module, name: str) -> None:
    """Raise RecipeError if the delta that came last has copied a module with others beside it."""
    for where, module in base.named_modules():
        if isinstance(module, Beside) and _COPIES & set(where.split(".")):
            raise RecipeError(
                f"deltas: `{name}` copies a module that another one changes",
                hint=f"put `{name}` before the others",
            )


def _injected(base: Any, config: PeftConfig, inner: str) -> None:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    held = base.__dict__.pop("peft_config", {})  # else PEFT takes all for one tuner's
    try:
        if config.peft_type == PeftType.ADALORA:
            ranks.tuners_of(base)[inner] = tuner(base, config, inner)
        else:
            inject_adapter_in_model(config, base, inner)
    finally:
        base.peft_config = held
    base.peft_config[inner] = config
    if tuner._cast_adapter_dtype is BaseTuner._cast_adapter_dtype:
        cast_adapter_dtype(base, inner)


def _wrapped(base: Any, config: PeftConfig, inner: str) -> Any:
    held = base.__dict__.pop("peft_config", {})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT")
            model = get_peft_model(base, config, adapter_name=inner)
    finally:
        base.peft_config = held
    if not config.is_prompt_learning:
        base.peft_config[inner] = config
    return model


def _use(base: nn.Module, chosen: list[str]) -> None:
    """Let the adapters `chosen` work, each where it is, in their order."""
    for module in switches(base):
        here: list[str] | str = [n for n in chosen if n in held_by(module)]
        module._disable_adapters = not here
        if here and isinstance(module, AuxiliaryTrainingWrapper):
            here = here[0]
        module._active_adapter = here


def _drop(module: Any, inner: str) -> None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module.delete_adapter(inner, new_active_adapters=None)
    else:
        module.delete_adapter(inner)


def _unwrap(module: nn.Module) -> None:
    """Put modules back in the place of layers that hold no adapter, and that none looks at."""
    for name, child in list(module.named_children()):
        inside = child
        while (within := _idle(inside)) is not None:
            inside = within
        if isinstance(inside, Beside) and not held_by(inside):
            inside.remove()
            continue
        if inside is not child:
            setattr(module, name, inside)
        _unwrap(inside)


def _idle(module: nn.Module) -> nn.Module | None:
    """Return what a layer or wrapper that does nothing any more is around, None for any other."""
    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or held_by(module):
        return None
    beside = [m for m in module.children() if isinstance(m, Beside) and held_by(m)]
    if beside or module._forward_pre_hooks:
        return None  # it stands for the module that another delta is beside, or reads
    attribute = "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
    inside: nn.Module | None = getattr(module, attribute, None)
    return inside


def forget(base: Any) -> None:
    """Take off what says which deltas a model has, when it has none any more."""
    for attribute in ("bmkit_deltas", "bmkit_tuners", "peft_config"):
        with suppress(AttributeError):
            delattr(base, attribute)


def _held(model: Any, name: str) -> Held:
    inner, base = _inner(model, name), base_of(model)
    around = isinstance(model, PeftModel) and inner == model.active_adapter
    return Held(model if around else base, base, inner)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _known(base: Any) -> dict[str, str]:
    found: dict[str, str] = base.__dict__.get("bmkit_deltas", {})
    return found


def _inner(model: Any, name: str) -> str:
    known = _known(base_of(model))
    if name not in known:
        there = ", ".join(known) or "none"
        raise InputError(f"the model has no delta `{name}`", hint=f"there are: {there}")
    return known[name]


def _safe(base: nn.Module, name: str) -> str:
    """Return a name for PEFT: inside of no parameter's name, else it would mistake one for it."""
    names = [n for n, _ in base.named_parameters()]
    others = _known(base).values()
    parts = {part for n in names for part in n.split(".")} | _INSIDE
    mistaken = any(name in n for n in (*names, *others)) or any(n in name for n in others)
    if _SAFE.fullmatch(name) and name not in parts and not mistaken:
        return name
    free = (f"delta{chr(97 + i % 26)}{i // 26}x" for i in range(len(parts) + len(others) + 1))
    return next(n for n in free if n not in parts and n not in others)


def _rank(config: PeftConfig) -> int:
    if config.is_prompt_learning:
        return 2
    return 0 if config.peft_type == PeftType.LN_TUNING else 1


def _wraps(config: PeftConfig) -> bool:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    return bool(config.is_prompt_learning or getattr(tuner, "uses_shared_state", False))


def _changes_base(config: PeftConfig) -> bool:
    return takes_part(config)
