"""What compressing will need, from headers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bmkit import env
from bmkit.compress.options.experts import Moefy
from bmkit.compress.options.foreign import OptimumGptq, Quanto
from bmkit.compress.options.learning import Distill
from bmkit.compress.options.rounding import Gptq, Quantize
from bmkit.compress.options.scaling import Awq, SmoothQuant
from bmkit.compress.options.sparse import Magnitude, SparseGpt, Wanda
from bmkit.compress.options.structure import COUNTS, DropLayers, FrequentTokens, Gates, Shrink
from bmkit.compress.recipe import CompressRecipe
from bmkit.data import rows
from bmkit.errors import InputError, RecipeError
from bmkit.foreign import extra
from bmkit.plan import RUNTIME_BYTES, Estimate, Headers, Job, Peak, read_headers
from bmkit.runtime.budget import Sizes, block_of

SHARD_BYTES = 2 * 2**30
LOGITS = 2**24
"""Logits that training keeps, as in `train.distil`."""


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


@dataclass
class State:
    """What the steps so far have left."""

    headers: Headers
    sizes: Sizes
    recipe: CompressRecipe
    now: _Model
    largest: int
    """Weights of the largest tensor."""
    written: int
    """Bytes that the last step has written."""
    first: bool = True
    """Whether the headers are those of what the step works on."""
    teacher: Headers | None = None
    """Of the further model that the step names."""
    speaks: bool = True
    """Whether the model may have to say the texts that it is looked at with."""


@dataclass(frozen=True)
class Need:
    """What a step does, and the bytes that it takes at its peak."""

    text: str
    ram: int
    gpu: int = 0
    work: int = 0


def estimate(job: Job) -> Estimate:
    """Say what `compress` will do to the model, and the memory and disk it takes."""
    recipe = job.recipe
    assert isinstance(recipe, CompressRecipe)  # the registry pairs recipe and plan
    headers = read_headers(job.checkpoint)
    if headers.config.get("quantization_config"):
        raise InputError(
            f"{job.checkpoint} is quantised already", hint="compress the model it was made from"
        )
    limits = (headers.config.get(key) for key in ("max_position_embeddings", "n_positions"))
    length = min([recipe.data.sequence_length, *(n for n in limits if isinstance(n, int))])
    data = recipe.data.model_copy(update={"sequence_length": length})
    recipe = recipe.model_copy(update={"data": data})
    inside = sum(t.numel for t in headers.tensors if block_of(t.name) is not None)
    whole = sum(t.numel for t in headers.tensors)
    sizes = Sizes.of(headers.config)
    width = max(headers.bytes // max(whole, 1), 1)
    now = _Model(inside, whole - inside, sizes.layers, width)
    largest = max((t.numel for t in headers.tensors), default=0)
    file = job.files.get("data.calibration")
    speaks = file is None or file.suffix not in rows.PLAIN
    state = State(headers, sizes, recipe, now, largest, headers.bytes, speaks=speaks)
    ram = gpu = work = 0
    steps = []
    for i, step in enumerate(recipe.steps):
        other = job.models.get(f"steps.{i}.teacher")
        state.teacher = read_headers(other.path) if other else None
        need = NEEDS[step.method](state, step)
        ram, gpu = max(ram, need.ram), max(gpu, need.gpu)
        work += need.work
        if i < len(recipe.steps) - 1:
            work += state.written
        steps.append(need.text)
        state.first = False
    gpu = gpu if recipe.device != "cpu" else 0
    peak = Peak(RUNTIME_BYTES + ram, gpu, state.written + 2**24, work)
    return Estimate(steps, peak)


def _rounded(state: State, step: Quantize) -> Need:
    text, state.written = _quantize(state, step)
    floats = 4 * 4 * state.largest
    return Need(text, min(state.written, SHARD_BYTES) + floats, floats)


def _fewer_layers(state: State, step: DropLayers) -> Need:
    now = state.now
    kept = len(step.keep) if isinstance(step.keep, list) else step.keep
    last = step.keep[-1] + 1 if isinstance(step.keep, list) else step.keep
    if state.first and last > now.layers > 0:
        raise RecipeError(f"keep: {state.headers.path} has {now.layers} layers")
    text = f"keep {kept} of {now.layers} layers"
    now.inside = now.inside * kept // max(now.layers, 1)
    now.layers = kept
    state.written = now.width * now.weights
    return Need(text, min(state.written, SHARD_BYTES) + now.width * state.largest)


def _shrunk(state: State, step: Shrink | Gates) -> Need:
    now, sizes = state.now, state.sizes
    text = f"cut the model to {_widths(step)}"
    through = _through(now, sizes, state.recipe, state.largest)
    statistics = 6 * 4 * sizes.inner**2
    speaking = _texts(state)
    if step.parameters is not None:
        now.inside = int(now.inside * step.parameters)
    elif step.num_hidden_layers is not None:
        now.inside = now.inside * min(step.num_hidden_layers, now.layers) // max(now.layers, 1)
        now.layers = min(step.num_hidden_layers, now.layers)
    state.written = now.width * now.weights
    ram = max(speaking, through + statistics, min(state.written, SHARD_BYTES))
    work = state.written + 64 * state.recipe.data.tokens
    return Need(text, ram, through + statistics, work)


def _gated(state: State, step: Gates) -> Need:
    recipe, before = state.recipe, state.now.weights
    learning = _learning(step, state.now, state.sizes, recipe) - 12 * before  # no weight learns
    need = _shrunk(state, step)
    text = f"let gates learn from {recipe.data.tokens} tokens how to {need.text}"
    lessons = 8 * step.likeliest * recipe.data.tokens
    return Need(text, max(need.ram, learning), max(need.gpu, learning), need.work + lessons)


def _widths(step: Shrink | Gates) -> str:
    if step.parameters is not None:
        return f"{step.parameters:.0%} of its blocks' parameters, by {', '.join(step.units)}"
    counts = {name: getattr(step, name, None) for name in COUNTS}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count is not None)


def _fewer_tokens(state: State, step: FrequentTokens) -> Need:
    text = f"find the {step.tokens} most frequent tokens"
    return Need(text, _speaking(state.headers, state.recipe))


def _magnitude(state: State, step: Magnitude) -> Need:
    floats = 6 * 4 * state.largest
    return Need(_zeros(step), floats + min(state.written, SHARD_BYTES), floats)


def _zeros(step: Magnitude | Wanda | SparseGpt) -> str:
    what = step.pattern if ":" in step.pattern else f"{step.sparsity:.0%}"
    return f"set weights to zero by {step.method}, {what}"


def _blockwise(state: State, step: Gptq | Wanda | SparseGpt) -> Need:
    now, tokens = state.now, state.recipe.data.tokens
    if isinstance(step, Gptq):
        text, state.written = _quantize(state, step)
        text = f"by GPTQ, {text}"
    else:
        text = _zeros(step)
    through = _through(now, state.sizes, state.recipe, state.largest)
    speaking = _texts(state)
    ram = max(speaking, through, min(state.written, SHARD_BYTES))
    return Need(text, ram, through, now.width * now.inside + 64 * tokens)


def _scaled(state: State, step: Awq | SmoothQuant) -> Need:
    through = _through(state.now, state.sizes, state.recipe, state.largest)
    speaking = _texts(state)
    ram = max(speaking, through, min(state.written, SHARD_BYTES))
    work = state.now.width * state.now.inside + 64 * state.recipe.data.tokens
    return Need(f"scale inputs and weights by {step.method}", ram, through, work)


def _divided(state: State, step: Moefy) -> Need:
    now, tokens, sizes = state.now, state.recipe.data.tokens, state.sizes
    size = step.size if step.experts is None else max(sizes.inner // step.experts, 1)
    text = (
        f"divide feed-forwards into experts of {size} neurons, and let {step.active:.0%} of the "
        "neurons be computed"
    )
    seen = tokens * (2 * 4 * sizes.hidden + 4 * sizes.inner + 16 * sizes.inner // max(size, 1))
    clusters = 4 * sizes.inner * (4096 + 4 * 1024 + sizes.inner // max(size, 1))
    through = _through(now, sizes, state.recipe, state.largest) + 2 * seen + clusters
    speaking = _texts(state)
    routers = 2 * 4 * now.layers * (sizes.hidden + 1) * (sizes.inner // max(size, 1))
    state.written += routers
    return Need(text, max(speaking, through), through, routers + 16 * now.layers * sizes.inner)


def _distilled(state: State, step: Distill) -> Need:
    tokens, now = state.recipe.data.tokens, state.now
    learning = _learning(step, now, state.sizes, state.recipe)
    if step.qat:
        learning += 4 * now.inside  # as they are rounded
    headers = state.teacher or state.headers
    whose = "of the model" if state.teacher is None else f"of {headers.path}"
    if step.hidden or step.attention:
        learning += _beside(step, headers, state)
    speaking = _speaking(state.headers, state.recipe)
    if state.teacher is not None:
        speaking = max(speaking, _speaking(headers, state.recipe))
    need = max(speaking, learning)
    work = 3 * 12 * now.weights + 8 * step.likeliest * tokens
    return Need(f"learn from {tokens} tokens {whose}", need, need, work)


def _beside(step: Distill, teacher: Headers, state: State) -> int:
    """Return what a teacher takes that runs beside its student: weights, states, attention."""
    bits = {"int8": 8, "int4": 5, None: 8 * teacher.bytes // max(teacher.dense_numel, 1)}
    weights = teacher.dense_numel * bits[step.teacher_quant] // 8
    if step.teacher_memory is not None:
        weights = min(weights, env.parse_bytes(step.teacher_memory))
    length, rows = state.recipe.data.sequence_length, step.train.per_device_train_batch_size
    found = weights
    for sizes, layers in (
        (Sizes.of(teacher.config), Sizes.of(teacher.config).layers),
        (state.sizes, state.now.layers),
    ):
        found += 4 * rows * length * sizes.hidden * layers
        if step.attention:
            found += 4 * 4 * rows * sizes.heads * length**2 * layers
    return found


def _by_quanto(state: State, step: Quanto) -> Need:
    extra.require("optimum.quanto", "quanto", "`quanto`")
    now, bits = state.now, int(step.weights[-1])
    state.written = now.inside * bits // 8 + now.inside // 16 + now.width * now.outside
    ram = 4 * now.weights + min(state.written, SHARD_BYTES) + 8 * 4 * state.largest
    text = f"round weights to {step.weights} by optimum-quanto"
    if step.activations:
        text += f", and activations to {step.activations}"
        ram = max(ram + _activations(state), _texts(state))
    return Need(text, ram, ram)


def _by_optimum(state: State, step: OptimumGptq) -> Need:
    extra.require("gptqmodel", "gptq", "`optimum_gptq`")
    now = state.now
    state.written = now.inside * step.bits // 8 + now.inside // 16 + now.width * now.outside
    hidden = 2 * 4 * state.recipe.data.tokens * state.sizes.hidden
    statistics = 4 * 4 * (3 * state.sizes.hidden**2 + state.sizes.inner**2)
    ram = 2 * 4 * now.weights + hidden + statistics + _activations(state) + 2 * state.written
    text = f"round weights to {step.bits} bits by optimum's GPTQ"
    return Need(text, max(ram, _texts(state)), ram, state.written)


def _activations(state: State) -> int:
    sizes = state.sizes
    return (
        4
        * state.recipe.data.sequence_length
        * (24 * sizes.hidden + 4 * sizes.inner + 2 * sizes.vocabulary)
    )


NEEDS: dict[str, Callable[[State, Any], Need]] = {
    "quantize": _rounded,
    "awq": _scaled,
    "smoothquant": _scaled,
    "gptq": _blockwise,
    "quanto": _by_quanto,
    "optimum_gptq": _by_optimum,
    "magnitude": _magnitude,
    "wanda": _blockwise,
    "sparsegpt": _blockwise,
    "drop_layers": _fewer_layers,
    "shrink": _shrunk,
    "gates": _gated,
    "frequent_tokens": _fewer_tokens,
    "moefy": _divided,
    "distill": _distilled,
}


def _quantize(state: State, step: Quantize | Gptq) -> tuple[str, int]:
    headers, now = state.headers, state.now
    group = "per output channel" if step.group_size == "channel" else f"per {step.group_size}"
    if not state.first:  # of another checkpoint than the one that is known
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


def _texts(state: State) -> int:
    """Return what it takes to have texts to look at the model with."""
    return _speaking(state.headers, state.recipe) if state.speaks else 64 * state.recipe.data.tokens


def _speaking(headers: Headers, recipe: CompressRecipe) -> int:
    """Return what the model takes while it speaks and judges: eight texts at a time."""
    return opened(headers, 8 * recipe.data.sequence_length) + 64 * recipe.data.tokens


def opened(headers: Headers, tokens: int) -> int:
    """Return what a checkpoint takes that is opened whole, with so many tokens in its cache."""
    sizes = Sizes.of(headers.config)
    cache = 8 * sizes.layers * sizes.kv * sizes.dim * tokens
    logits = 3 * 4 * sizes.vocabulary * 64
    return max(4 * headers.dense_numel, headers.bytes) + cache + logits + 2**28


def _learning(step: Distill | Gates, now: _Model, sizes: Sizes, recipe: CompressRecipe) -> int:
    """Return what training takes: weights, gradients, AdamW's moments, one batch's activations."""
    tokens = step.train.per_device_train_batch_size * recipe.data.sequence_length
    activations = 4 * tokens * (34 * sizes.hidden * now.layers + 8 * sizes.hidden)
    logits = 4 * 4 * max(256 * sizes.vocabulary, LOGITS)
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
