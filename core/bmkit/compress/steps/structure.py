"""Leave parts of a model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmkit import model, plan
from bmkit.compress import frequent, layers
from bmkit.compress.options.structure import DropLayers, FrequentTokens
from bmkit.compress.work import Metrics, Work, copy, write_config
from bmkit.errors import InputError, RecipeError
from bmkit.nn import walk
from bmkit.runtime import experts
from bmkit.runtime.frequent import write as write_frequent


def drop_layers(work: Work, step: DropLayers) -> Metrics:
    """Leave whole layers out."""
    headers = plan.read_headers(work.source)
    skeleton = model.empty_model(work.source)
    stack, count = walk.stack(skeleton)
    kept = layers.spread(count, step.keep) if isinstance(step.keep, int) else step.keep
    if (step.keep if isinstance(step.keep, int) else kept[-1] + 1) > count:
        raise RecipeError(f"keep: {work.source} has {count} layers")
    names = model.load_config(work.source).attribute_map
    key = names.get("num_hidden_layers", "num_hidden_layers")
    if headers.config.get(key) != count:
        raise InputError(f"{work.source}/config.json says no `{key}: {count}`, as the model has it")
    write_config(work.out, layers.fewer(headers.config, key, count, kept))
    require_alike(work, kept)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    stored = {t.name for t in headers.tensors}
    if not any(name.startswith(f"{stack}.") for name in stored):
        stack = stack.removeprefix(prefix)
    writer = model.ShardWriter(work.out)
    parameters = 0
    for name, tensor in model.tensors(headers):
        new = layers.renamed(name, stack, kept)
        if new is not None:
            writer.add(new, tensor)
            parameters += tensor.numel()
    writer.close()
    model.copy_side_files(work.source, work.out)
    write_config(work.out, layers.fewer(headers.config, key, count, kept))
    if (divided := experts.read(work.source)) is not None:
        experts.write(work.out, divided.of(kept))
    return {"layers": len(kept), "parameters": parameters}


def require_alike(work: Work, kept: Sequence[int]) -> None:
    """Raise RecipeError if the model of the config in `work.out` wants other blocks than `kept`.

    As where the first block alone has dense layers, or what the others share.
    """
    old, new = (model.empty_model(path) for path in (work.source, work.out))
    stacks: list[Any] = [one.get_submodule(walk.stack(one)[0]) for one in (old, new)]
    for i, block in enumerate(stacks[1]):
        wanted, found = (
            {name for name, _ in b.named_parameters()} for b in (block, stacks[0][kept[i]])
        )
        if wanted != found:
            odd = min(wanted ^ found)
            raise RecipeError(
                f"{work.source}: block {kept[i]} can't stand at place {i}, it "
                f"{'lacks' if odd in wanted else 'has'} {odd}",
                hint="keep the first layers, or cut something else",
            )


def frequent_tokens(work: Work, step: FrequentTokens) -> Metrics:
    """Note which tokens are said most."""
    config = model.load_config(work.source).get_text_config()
    texts = work.shared.texts
    said = [t.ids[t.first :] for t in texts]
    tokens = frequent.ranked(said, min(step.tokens, config.vocab_size), config.vocab_size)
    copy(work.source, work.out)
    write_frequent(work.out, tokens)
    return {"covered": round(frequent.covered(said, tokens), 6)}
