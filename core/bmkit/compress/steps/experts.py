"""Divide feed-forwards into experts."""

from __future__ import annotations

from bmkit import model, plan
from bmkit.compress import moefy
from bmkit.compress.options.experts import Moefy
from bmkit.compress.work import Metrics, Work
from bmkit.errors import InputError
from bmkit.runtime import experts


def run(work: Work, step: Moefy) -> Metrics:
    """Put neurons in an order in which experts are slices, and write who computes which."""
    shared, source = work.shared, work.source
    if (source / experts.FILE).is_file():
        raise InputError(
            f"{source} is divided into experts already", hint="take the model it was made from"
        )
    moved, found, figures = moefy.walk_blocks(
        source,
        step,
        shared.rows,
        work.folder,
        seed=shared.recipe.seed,
        device=shared.device,
        reporter=work.job.reporter,
    )
    writer = model.ShardWriter(work.out)
    for name, tensor in model.tensors(plan.read_headers(source)):
        dim, order = moved.get(name, (0, None))
        writer.add(name, tensor if order is None else tensor.index_select(dim, order))
    writer.close()
    model.copy_side_files(source, work.out)
    experts.write(work.out, found)
    return {
        "layers": figures.blocks,
        "active": round(figures.active, 6),
        "energy": round(figures.energy, 6),
        "router_recall": round(figures.recall, 6),
    }
