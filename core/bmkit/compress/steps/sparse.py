"""Set the smallest weights to zero."""

from __future__ import annotations

from bmkit import model
from bmkit.compress import layerwise
from bmkit.compress.options.sparse import Magnitude
from bmkit.compress.work import Metrics, Work, scope
from bmkit.errors import InputError
from bmkit.report import task


def run(work: Work, step: Magnitude) -> Metrics:
    """Prune all linear layers by magnitude, tensor by tensor."""
    job, source = work.job, work.source
    found = scope(source, step.exclude_modules)
    headers, chosen = found.headers, found.chosen
    writer = model.ShardWriter(work.out)
    zeros = total = 0
    with task(job.reporter, step.method, len(headers.tensors), "tensors") as bar:
        for name, tensor in model.tensors(headers):
            if name in chosen:
                try:
                    tensor = layerwise.smallest_gone(step, tensor.to(work.shared.device)).cpu()
                except ValueError as exc:
                    raise InputError(f"{source}: layer {name}: {exc}") from None
                zeros += int((tensor == 0).sum())
                total += tensor.numel()
            writer.add(name, tensor)
            bar.advance()
    writer.close()
    model.copy_side_files(source, work.out)
    return {"layers": len(chosen), "sparsity": round(zeros / total, 6)}
