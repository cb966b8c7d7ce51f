"""What compressing will need, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from bmkit.compress.recipe import (
    CompressRecipe,
    Distill,
    DropLayers,
    FrequentTokens,
    Gptq,
    Magnitude,
    Quantize,
    SparseGpt,
    Wanda,
)
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers
from bmkit.runtime.budget import Sizes, block_of

SHARD_BYTES = 2 * 2**30


@dataclass
class _Model:
    """What a step finds: weights in blocks and outside of them."""

    inside: int
    outside: int
    layers: int
    width: int
    """Bytes of a weight."""

    @property
    def weights(self) -> int:
        """Return how many there are."""
        return self.inside + self.outside


def estimate(job: Job) -> Estimate:
    """Say what `compress` will do to the model, and the memory and disk it takes."""
    recipe = job.recipe
    assert isinstance(recipe, CompressRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    inside = sum(t.numel for t in headers.tensors if block_of(t.name) is not None)
    whole = sum(t.numel for t in headers.tensors)
    sizes = Sizes.of(headers.config)
    width = max(headers.bytes // max(whole, 1), 1)
    now = _Model(inside, whole - inside, sizes.layers, width)
    largest = max((t.numel for t in headers.tensors), default=0)
    device = recipe.device != "cpu"
    ram = gpu = work = 0
    written = headers.bytes
    steps = []
    for i, step in enumerate(recipe.steps):
        need = 0
        if isinstance(step, Quantize):
            text, written = _quantize(headers, step, now, first=i == 0)
            need = min(written, SHARD_BYTES) + 4 * 4 * largest
            gpu = max(gpu, 4 * 4 * largest if device else 0)
        elif isinstance(step, DropLayers):
            kept = len(step.keep) if isinstance(step.keep, list) else step.keep
            text = f"keep {kept} of {now.layers} layers"
            now.inside = now.inside * kept // max(now.layers, 1)
            now.layers = kept
            written = now.width * now.weights
            need = min(written, SHARD_BYTES) + now.width * largest
        elif isinstance(step, FrequentTokens):
            text = f"find the {step.tokens} most frequent tokens"
            need = _speaking(headers, sizes, recipe)
        elif isinstance(step, Gptq | Magnitude | Wanda | SparseGpt):
            if isinstance(step, Gptq):
                text, written = _quantize(headers, step, now, first=i == 0)
                text = f"by GPTQ, {text}"
            else:
                what = step.pattern if ":" in step.pattern else f"{step.sparsity:.0%}"
                text = f"set weights to zero by {step.method}, {what}"
            through = _through(now, sizes, recipe, largest)
            need = max(_speaking(headers, sizes, recipe), through, min(written, SHARD_BYTES))
            if isinstance(step, Magnitude):
                through = 6 * 4 * largest
                need = through + min(written, SHARD_BYTES)
            gpu = max(gpu, through if device else 0)
            work += now.width * now.inside + 64 * recipe.data.tokens
        else:
            text = f"learn from {recipe.data.tokens} tokens of the model"
            learning = _learning(step, now, sizes, recipe)
            need = max(_speaking(headers, sizes, recipe), learning)
            gpu = max(gpu, need if device else 0)
            work += 3 * 12 * now.weights + 8 * step.likeliest * recipe.data.tokens
        ram = max(ram, need)
        if i < len(recipe.steps) - 1:
            work += written
        steps.append(text)
    peak = Peak(RUNTIME_BYTES + ram, gpu, written + 2**24, work)
    return Estimate(steps, peak)


def _quantize(
    headers: Headers, step: Quantize | Gptq, now: _Model, *, first: bool
) -> tuple[str, int]:
    group = "per output channel" if step.group_size == "channel" else f"per {step.group_size}"
    if not first:  # of another checkpoint than the one that is known
        text = f"quantize linear layers to {step.bits} bits, one scale {group}"
        return text, now.inside * step.bits // 8 + now.inside // 8 + now.width * now.outside
    linear = quantizable(headers)
    packed = sum(t.numel * step.bits // 8 for t in linear)
    scales = sum(_scales(t.shape, step.group_size) * 4 for t in linear)
    kept = headers.bytes - sum(t.bytes for t in linear)
    text = f"quantize {len(linear)} linear layers to {step.bits} bits, one scale {group}"
    return text, kept + packed + scales


def _through(now: _Model, sizes: Sizes, recipe: CompressRecipe, largest: int) -> int:
    """Return what going through the blocks takes: hidden states, a block, statistics of inputs."""
    hidden = 2 * 4 * recipe.data.tokens * sizes.hidden
    block = 4 * now.inside // max(now.layers, 1)
    statistics = 5 * 4 * (3 * sizes.hidden**2 + sizes.inner**2)
    activations = 4 * recipe.data.sequence_length * (16 * sizes.hidden + 4 * sizes.inner)
    scores = 4 * 4 * sizes.heads * recipe.data.sequence_length**2
    return 4 * now.outside + hidden + block + statistics + activations + scores + 8 * 4 * largest


def _speaking(headers: Headers, sizes: Sizes, recipe: CompressRecipe) -> int:
    """Return what the model takes while it speaks and judges: eight texts at a time."""
    tokens = 8 * recipe.data.sequence_length
    cache = 8 * sizes.layers * sizes.kv * sizes.dim * tokens
    logits = 3 * 4 * sizes.vocabulary * 64
    weights = max(4 * headers.dense_numel, headers.bytes)
    texts = 64 * recipe.data.tokens
    return weights + cache + logits + texts + 2**28


def _learning(step: Distill, now: _Model, sizes: Sizes, recipe: CompressRecipe) -> int:
    """Return what training takes: weights, gradients, AdamW's moments, one batch's activations."""
    tokens = step.train.per_device_train_batch_size * recipe.data.sequence_length
    activations = 4 * tokens * (34 * sizes.hidden * now.layers + 8 * sizes.hidden)
    logits = 4 * 4 * 256 * sizes.vocabulary
    lessons = (8 * step.likeliest + 64) * recipe.data.tokens
    return 16 * now.weights + activations + logits + lessons + 2**28


def quantizable(headers: Headers) -> list:  # type: ignore[type-arg]
    """Return the matrices that are neither embeddings nor an output head, by their names."""
    outside = ("embed", "wte", "wpe", "lm_head", "shared", "classifier", "score", "position")
    return [
        t
        for name, t in headers.modules.items()
        if not any(word in name.rsplit(".", 1)[-1] for word in outside)
        and ".embeddings." not in f".{name}."
    ]


def _scales(shape: tuple[int, ...], group_size: object) -> int:
    if isinstance(group_size, int):
        return shape[0] * -(-shape[1] // group_size)
    return shape[0] * (1 if group_size == "channel" else -(-shape[1] // 32))
