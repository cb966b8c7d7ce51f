"""How a model will run and where its weights will be, from headers alone. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from bmkit.artifact import deltas
from bmkit.errors import RecipeError, ResourceError
from bmkit.plan import FOREIGN, Headers, Job, read_headers, task
from bmkit.runtime import budget, family
from bmkit.runtime.budget import Placement
from bmkit.runtime.recipe import GenerateRecipe

PROMPT_TOKENS = 512
"""Tokens of a prompt that are planned for where prompts aren't known before."""
TEMPLATE_TOKENS = 128
"""What a chat template may add."""
LOGITS = 512
"""Rows of logits that recorded forwards of a draft on a GPU hold."""
BYTES_A_TOKEN = 3
"""The fewest that are reckoned with where tokens are not counted."""

NOT_PLACED = ("rwkv",)
"""Model types that write to their own weights."""

Way = Literal["packed", "placed", "dense"]


@dataclass(frozen=True)
class Chosen:
    """How a model will run.

    `packed` is the fused decoder on the CPU, `placed` transformers' own code on weights in slabs,
    `dense` transformers' own code on a model that transformers has loaded.
    """

    way: Way
    placement: Placement | None


def choose(job: Job, headers: Headers, *, tokens: int | None = None) -> Chosen:
    """Say how the model will run and where its weights will be.

    Caches are planned for `tokens` a row, guesses included, if given.

    Raises ResourceError for a budget that can't work, RecipeError for `quant` where there is none.
    """
    recipe = job.recipe
    assert isinstance(recipe, GenerateRecipe)  # the registry pairs recipe and plan
    on_gpu = recipe.device.startswith("cuda")
    model_type = headers.config.get("model_type")
    if recipe.quant == "w8a8" and not on_gpu:
        raise RecipeError(
            f"quant: w8a8 needs a GPU, this is {recipe.device}",
            hint="int8 is as small, and the quickest on a CPU",
        )
    quant = "int8" if recipe.quant == "w8a8" else recipe.quant
    readable = family.readable(headers.config.get("quantization_config"))
    exact = recipe.dtype in {"auto", "float32"}
    limit = job.gpu_memory if on_gpu else job.cpu_memory
    context = int(headers.config.get("max_position_embeddings") or 2**20)
    prompt = PROMPT_TOKENS
    if job.longest is not None:
        text = f"{recipe.system or ''}{job.longest}"
        known = _tokens(job, text, exact=limit is not None) + TEMPLATE_TOKENS
        prompt = known if limit is not None and job.rows == 1 else max(prompt, known)
    generates = task(headers.config) == "generate"
    answer = recipe.max_new_tokens if generates and not recipe.scores else 0
    guesses = recipe.guesses if answer else 0
    tokens = tokens or min(answer + prompt, context) + guesses
    besides = budget.lora_bytes([read_headers(path) for path in job.adapter_paths])
    if len(job.deltas) > 1:  # what rows call an artifact of several is put together as well
        for parts in (deltas(delta.path) for delta in job.deltas):
            several = [read_headers(path) for path in parts if len(parts) > 1]
            besides += budget.lora_bytes(several)
    besides += budget.experts_bytes(headers, quant)
    if recipe.scores:
        besides += 4 * budget.SCORE_BYTES
    besides += 8 * guesses * int(headers.config.get("vocab_size") or 0)
    beside = _Beside() if job.draft is None else _draft(job, recipe, tokens)
    besides += beside.fixed
    rows = 1 if recipe.scores else min(recipe.batch_size, job.rows or recipe.batch_size)
    lora = all(family.plain_lora(path) for path in job.adapter_paths)
    if recipe.device == "cpu" and exact and lora and generates and family.covers(headers.config):
        found = budget.place(
            headers,
            rows=rows,
            tokens=tokens,
            budget=limit,
            quant=quant,
            besides=besides,
            row=beside.row,
            token=beside.token,
            chunk=budget.SMALL_CHUNK if job.tight else budget.CHUNK,
        )
        return Chosen("packed", found)
    packed = any(t.name.endswith(("_packed", "_kept")) for t in headers.tensors)
    whole = next((p for p in job.adapter_paths if family.replaces_modules(p)), None)
    if whole is not None and (limit is not None or recipe.quant):
        raise ResourceError(
            f"{whole} brings modules of its own: it works on a model that is loaded as a whole",
            hint="run it without --quant and without a budget",
        )
    wanted = recipe.quant is not None or limit is not None or packed or not generates
    readable = readable and whole is None and model_type not in NOT_PLACED
    if readable and ((recipe.device == "cpu" and exact) or (on_gpu and wanted)):
        placed = budget.place_any(
            headers,
            rows=rows,
            tokens=tokens,
            prompt=min(prompt, context),
            budget=limit,
            quant=quant,
            besides=besides + rows * beside.row,
            gpu=on_gpu,
            width=budget.computed_bytes(recipe.dtype, recipe.device, headers),
        )
        return Chosen("placed", placed)
    method = (headers.config.get("quantization_config") or {}).get("quant_method")
    if method in FOREIGN and (limit is not None or recipe.quant):
        what = "a budget can't be kept" if limit is not None else "quant: can't be had"
        error = ResourceError if limit is not None else RecipeError
        raise error(
            f"{what} with weights packed by {method}: they are unpacked as a whole",
            hint="compress the model it was made from by bmkit's own methods, as int4 or gptq",
        )
    if limit is not None:
        raise ResourceError(
            f"a budget can't be kept with device {recipe.device}, dtype {recipe.dtype} and this "
            "model",
            hint="it is kept on cuda, and on cpu with dtype auto or float32",
        )
    if recipe.quant:
        raise RecipeError(
            f"quant: can't be had with device {recipe.device}, dtype {recipe.dtype} and this model",
            hint="it works on cuda, and on cpu with dtype auto; else: bmkit compress int8",
        )
    return Chosen("dense", None)


def _tokens(job: Job, text: str, *, exact: bool) -> int:
    """Return how many tokens a text may have: counted, where the tokenizer is one file."""
    size = len(text.encode(errors="replace"))
    file = job.checkpoint / "tokenizer.json"
    if not exact:
        return size // BYTES_A_TOKEN
    if not file.is_file():
        return size
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False)
    except Exception as exc:  # the library has no other class
        if type(exc) is not Exception:
            raise
        return size
    return len(found.ids)


def draft_job(job: Job) -> Job:
    """Return the job of opening the draft beside its target: all of it is in memory."""
    assert job.draft is not None and isinstance(job.recipe, GenerateRecipe)  # the caller has looked
    return replace(
        job,
        model=job.draft,
        base=None,
        adapters=(),
        draft=None,
        cpu_memory=None,
        gpu_memory=None,
        recipe=job.recipe.of_draft(),
        is_draft=True,
        tight=job.cpu_memory is not None,
    )


@dataclass(frozen=True)
class _Beside:
    """The memory that a draft model takes beside its target."""

    fixed: int = 0
    row: int = 0
    """Of each row, its cache for the tokens that are planned for."""
    token: int = 0
    """Of each further token of a row."""


def _draft(job: Job, recipe: GenerateRecipe, tokens: int) -> _Beside:
    """Return what a draft takes for `tokens` a row; what libraries take counts with the target."""
    own = draft_job(job)
    headers = read_headers(own.model.path)
    sizes = budget.Sizes.of(headers.config)
    token = 8 * sizes.layers * sizes.kv * -(-sizes.dim // 32) * 32
    on_gpu = recipe.device.startswith("cuda")
    one, two = (choose(replace(own, rows=r), headers, tokens=tokens) for r in (1, 2))
    if one.placement is not None and two.placement is not None:
        shared = budget.SLACK_BYTES + (budget.LOAD_BYTES if one.way == "packed" else 0)
        whole = one.placement.peak_bytes - (budget.GPU_BYTES if on_gpu else shared)
        row = two.placement.peak_bytes - one.placement.peak_bytes
        return _Beside(whole - row, row, token)
    stored = -(-headers.bytes // max(headers.dense_numel, 1))
    width = 4 if recipe.dtype == "float32" or not on_gpu else max(stored, 2)
    logits = 4 * LOGITS * sizes.vocabulary if on_gpu else 0
    return _Beside(width * headers.dense_numel + logits, token * tokens, token)
