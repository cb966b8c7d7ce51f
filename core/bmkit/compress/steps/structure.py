"""Leave parts of a model out."""

from __future__ import annotations

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
    if len(kept) > count or kept[-1] >= count:
        raise RecipeError(f"keep: {work.source} has {count} layers")
    names = model.load_config(work.source).attribute_map
    key = names.get("num_hidden_layers", "num_hidden_layers")
    if headers.config.get(key) != count:
        raise InputError(f"{work.source}/config.json says no `{key}: {count}`, as the model has it")
    config = layers.fewer(headers.config, key, count, kept)
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
    write_config(work.out, config)
    if (divided := experts.read(work.source)) is not None:
        experts.write(work.out, divided.of(kept))
    return {"layers": len(kept), "parameters": parameters}


def frequent_tokens(work: Work, step: FrequentTokens) -> Metrics:
    """Note which tokens are said most."""
    config = model.load_config(work.source).get_text_config()
    texts = work.shared.texts
    said = [t.ids[t.first :] for t in texts]
    tokens = frequent.ranked(said, min(step.tokens, config.vocab_size), config.vocab_size)
    copy(work.source, work.out)
    write_frequent(work.out, tokens)
    return {"covered": round(frequent.covered(said, tokens), 6)}
