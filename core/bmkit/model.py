"""Load and save checkpoints: lazily, shard by shard, safetensors only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bmkit import packed
from bmkit.artifact import SIDE_FILES
from bmkit.errors import (
    InputError,
    LibraryRefusal,
    RecipeError,
    ResourceError,
    counted,
    first_line,
    machine_refusal,
)
from bmkit.foreign import quanto
from bmkit.plan import Headers, Task, read_headers, read_json
from bmkit.plan import task as task_of

SMALLER = "close other programs, or take a smaller model"
SHARD_BYTES = 2 * 2**30


def pick_device(name: str) -> torch.device:
    """Turn `cpu`, `cuda` (the first), … into a device. Raises ResourceError if it isn't there.

    `auto` has become one of them before (`env.resolve_device`), without torch, since plan and key
    depend on it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(
            f"device: `{name}` is not a device", hint="write auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if not _is_there(device):
        found = ", ".join(devices())
        raise ResourceError(
            f"torch can use no device `{name}` here", hint=f"there is: {found}; --device cpu"
        )
    return torch.device("cuda", 0) if name == "cuda" else device  # torch's own calls ask for both


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.device_count() > (device.index or 0)
    if device.type == "xpu":
        return torch.xpu.device_count() > (device.index or 0)
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cpu"


def devices() -> list[str]:
    """Return the devices that torch can use here, with the names of their chips."""
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def compute_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype to compute in: `auto` keeps `stored` where the device is good at it.

    Else float32: bf16 weights are widened exactly.
    """
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cuda" and (stored != torch.bfloat16 or has_bf16(device)):
        return stored
    return torch.float32


def has_bf16(device: torch.device) -> bool:
    """Tell whether a GPU computes in bfloat16 itself."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def stored_dtype(config: Any) -> torch.dtype:
    """Return the dtype that a checkpoint's config names; float32 if it names none."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def behind_start(config: Any, said: Tensor) -> Tensor:
    """Return what a decoder of an encoder-decoder reads to say `said` [batch, tokens] and one more.

    That is `said` behind the token that it starts with.
    """
    candidates = (getattr(config, "decoder_start_token_id", None), config.pad_token_id, 0)
    start = next(i for i in candidates if i is not None)
    return torch.cat((said.new_full((len(said), 1), start), said), 1)


def task(config: Any) -> Task:
    """Tell what the checkpoint of a config is for."""
    return task_of(config.to_dict())


READ_PADDING = ("rwkv", "xlnet")
"""Model types that read padding as if it were text."""
SHIFTED = ("camembert", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta")
"""Model types that count positions from behind the padding token's number."""


def context(config: Any) -> int | None:
    """Return how many tokens a model can read and write, None if there is no limit."""
    found: int | None = getattr(config, "max_position_embeddings", None)
    if found is not None and config.model_type.startswith(SHIFTED):
        found -= (config.pad_token_id or 0) + 1
    return found


def load_config(path: Path) -> Any:
    """Read a checkpoint's config. Raises InputError if transformers doesn't know the model."""
    from transformers import AutoConfig

    hint = "bmkit runs no code from a checkpoint (trust_remote_code stays off)"
    with LibraryRefusal(f"{path}/config.json: transformers can't read it", hint):
        return AutoConfig.from_pretrained(path, local_files_only=True)


def load_generation_config(path: Path) -> Any:
    """Read what a checkpoint says about generating, else what its config does."""
    from transformers import GenerationConfig

    if not (path / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(load_config(path))
    with LibraryRefusal(f"{path}/generation_config.json can't be read"):
        return GenerationConfig.from_pretrained(path, local_files_only=True)


def load_tokenizer(path: Path) -> Any:
    """Load a checkpoint's tokenizer. Raises InputError if it has none."""
    from transformers import AutoTokenizer

    if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise InputError(
            f"{path} has no tokenizer", hint="copy tokenizer.json and tokenizer_config.json there"
        )
    with LibraryRefusal(f"{path}: its tokenizer can't be loaded"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)


POOLER = ".pooler."
"""In the names of what some encoders put behind their token vectors, and not all files hold."""
OTHER_HEADS = ("ForQuestionAnswering", "ForMultipleChoice")


def auto_class(config: Any) -> Any:
    """Return transformers' class that loads a checkpoint for its task: an Auto class, most often.

    Raises InputError for a task that nothing here does.
    """
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(OTHER_HEADS):
        raise InputError(
            f"{name} is made for a task that bmkit doesn't do",
            hint="generating, scoring, classifying a text and embedding it are done",
        )
    if name.endswith("EncoderModel") and hasattr(transformers, name):
        return getattr(transformers, name)
    kind = {
        "classify": "AutoModelForSequenceClassification",
        "tag": "AutoModelForTokenClassification",
        "embed": "AutoModel",
    }.get(task(config), "AutoModelForCausalLM")
    if config.is_encoder_decoder and task(config) == "generate":
        kind = "AutoModelForSeq2SeqLM"
    return getattr(transformers, kind)


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    config: Any = None,
    fresh: list[str] | None = None,
) -> Any:
    """Load a checkpoint's model, dense, in eval mode, for its own task, or that of `config`.

    Quantised checkpoints are unpacked to the compute dtype. With `fresh`, parameters may be
    missing: they are drawn, and their names put into it. Peak memory: the dense model and one
    shard. Raises InputError for a checkpoint that doesn't fit its config, ResourceError for memory.
    """
    if config is None:
        config = load_config(path)
        kind = auto_class(config)
    else:
        import transformers

        kind = getattr(transformers, config.architectures[0])
    chosen = compute_dtype(dtype, stored_dtype(config), device)
    headers = read_headers(path)
    way = packed.way(path, headers.config.get("quantization_config"))
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    where: Path | None = path
    if way in ("here", "modules"):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if hasattr(kind, "_model_mapping"):  # an auto class wants a path
            kind = kind._model_mapping[type(config)]
    if way == "modules":
        return _of_modules(path, kind, config, chosen, device)
    if way == "here":
        stored = packed.unpacked(headers, dict(tensors(headers)), empty_model(path))
        where, options = None, {"state_dict": stored}
    elif way == "stock":
        options |= _dense(headers.config["quantization_config"])
    try:
        model, info = kind.from_pretrained(
            where,
            config=config,
            dtype=chosen,
            device_map={"": device} if device.type != "cpu" else None,
            output_loading_info=True,
            **({"ignore_mismatched_sizes": True} if fresh is not None else {}),
            **options,
        )
    except (SafetensorError, ValueError, OSError, KeyError, RuntimeError) as exc:
        if said := machine_refusal(exc):
            raise ResourceError(f"{path} can't be loaded: {said}", hint=SMALLER) from None
        raise InputError(f"{path} can't be loaded: {first_line(exc)}") from None
    missing = sorted(info["missing_keys"])
    if task(config) == "embed" and all(POOLER in f".{key}" for key in missing):
        missing = []  # token vectors are pooled here
    if fresh is not None:
        fresh += missing
    elif missing:
        raise InputError(
            f"{path}: {counted(len(missing), 'tensor is', 'tensors are')} missing, as {missing[0]}",
            hint="the weights belong to another config.json; fetch the checkpoint again",
        )
    return model.eval()


def _dense(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which transformers unpacks compressed-tensors weights at once.

    Layers whose inputs are rounded as well are unpacked in the first pass, and keep rounding.
    """
    from transformers import CompressedTensorsConfig

    groups = (quantization.get("config_groups") or {}).values()
    if quantization.get("dequantize") or any(g.get("input_activations") for g in groups):
        return {}  # unpacked weights alone wouldn't round what goes into them
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def _of_modules(
    path: Path, kind: Any, config: Any, dtype: torch.dtype, device: torch.device
) -> Any:
    """Load a checkpoint whose layers are modules of optimum-quanto."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype)
    headers = read_headers(path)
    outputs = headers.config["quantization_config"].get("rounds_outputs")
    quanto.fill(path, model, dict(tensors(headers)), quanto.read_map(path), outputs)
    if hasattr(model, "generation_config"):
        model.generation_config = load_generation_config(path)
    return model.to(device).eval()


def empty_model(path: Path) -> nn.Module:
    """Build the checkpoint's model on the meta device: shapes and module types, no memory."""
    import transformers

    config = load_config(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = config.architectures or []
    kind = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if kind is None:
        raise InputError(f"{path}/config.json names no architecture that transformers knows")
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model


def tensors(headers: Headers) -> Iterator[tuple[str, Tensor]]:
    """Read a checkpoint's tensors one at a time, in the order of its files.

    Peak memory: one tensor; the file is mapped, and its pages can be dropped at any time.
    """
    for file in dict.fromkeys(t.file for t in headers.tensors):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dict
                yield name, stream.get_tensor(name)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a `.safetensors` file in one rename, so that it is there whole or not."""
    from safetensors.torch import save_file

    scratch = file.with_suffix(".partial")
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, scratch)
    scratch.replace(file)


class ShardWriter:
    """Write a checkpoint tensor by tensor, starting a new file every `shard_bytes`.

    Peak memory: one shard. One shard gives `model.safetensors`, more give numbered files and their
    index, as transformers writes them.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is written when its shard is full.

        Raises InputError for one that isn't finite.
        """
        wide = tensor.is_floating_point() and tensor.element_size() > 1
        if wide and not torch.isfinite(tensor).all():
            raise InputError(f"{name} holds NaN or infinite weights")
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is left, and the index if there are several shards."""
        self._flush()
        count = len(self.shards)
        weight_map = {}
        for i, names in enumerate(self.shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
            self._part(i).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=1, sort_keys=True)
            (self.folder / "model.safetensors.index.json").write_text(text + "\n")

    def _flush(self) -> None:
        if not self.pending:
            return
        self.shards.append(list(self.pending))
        save_file(self.pending, self._part(len(self.shards)), metadata={"format": "pt"})
        self.pending.clear()
        self.pending_bytes = 0

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i:05}.safetensors"


def save(model: Any, source: Path, out: Path) -> None:
    """Write a dense model whose config is that of the checkpoint at `source`, in its stored dtype.

    Weights that are tied are stored once.
    """
    stored = stored_dtype(load_config(source))
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    head = model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    shares = head is not None and inputs is not None and head.weight is inputs.weight
    writer = ShardWriter(out)
    for name, tensor in model.state_dict().items():
        if not (shares and name in tied):
            writer.add(
                name, tensor.to(stored).cpu() if tensor.is_floating_point() else tensor.cpu()
            )
    writer.close()
    copy_side_files(source, out)
    values = dict(read_json(source / "config.json"))
    values.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights: config, tokenizer, chat template."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.suffix != ".bin":
                shutil.copyfile(file, target / file.name)
