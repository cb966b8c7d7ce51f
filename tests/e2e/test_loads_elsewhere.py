"""What bmkit writes, read by plain transformers and plain peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

Run = Callable[..., subprocess.CompletedProcess[str]]
IDS = torch.tensor([[5, 9, 40, 77, 120, 3, 200]])


def logits(path: Path, **options: Any) -> torch.Tensor:
    """Load with plain transformers in a process without bmkit, and return float32 logits."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained(sys.argv[1], dtype=torch.float32, **{options!r})\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # sums depend on it
        "with torch.no_grad(): out = m(ids).logits\n"
        "assert 'bmkit' not in sys.modules\n"
        "torch.save(out, sys.argv[2])\n"
    )
    target = path.parent / "logits.pt"
    subprocess.run([sys.executable, "-c", code, str(path), str(target)], check=True)
    found: torch.Tensor = torch.load(target, weights_only=True)
    return found


def by_bmkit(path: Path) -> torch.Tensor:
    from bmkit import model

    loaded = model.load_model(path, device=torch.device("cpu"))
    with torch.no_grad():
        out: torch.Tensor = loaded(IDS).logits
    assert out.dtype == torch.float32
    return out


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_a_quantised_checkpoint_gives_the_same_logits_in_plain_transformers(
    bmkit: Run, tiny: Path, tmp_path: Path, recipe: str
) -> None:
    assert bmkit("compress", recipe, "-m", "tiny", "-o", "a").returncode == 0
    ours, theirs = by_bmkit(tmp_path / "a"), logits(tmp_path / "a")
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits(tiny))


def test_int8_logits_are_those_of_rounded_weights(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert bmkit("compress", "int8", "-m", "tiny", "-o", "a").returncode == 0
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            w = module.weight.data
            scale = w.abs().max(1, keepdim=True).values / 127
            module.weight.data = (w / scale).round() * scale
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(by_bmkit(tmp_path / "a"), expected, rtol=0, atol=1e-6)


@pytest.mark.model
def test_int8_of_a_real_model_is_really_small(bmkit: Run, smollm2: Path, tmp_path: Path) -> None:
    done = bmkit("compress", "int8", "-m", "smollm2-135m", "-o", "a", "--json")
    assert done.returncode == 0, done.stderr
    stored = dense = 0
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            if name.endswith("weight_shape"):
                dense += 4 * int(tensor[0]) * int(tensor[1])
            if ".weight_" in name:
                stored += tensor.numel() * tensor.element_size()
            if name.endswith("embed_tokens.weight"):
                assert tensor.dtype == torch.bfloat16
    assert "lm_head.weight" not in names  # tied: stored once
    assert len([n for n in names if n.endswith("weight_packed")]) == 30 * 7
    assert stored / dense <= 0.30
    assert stored / dense == pytest.approx(json.loads(done.stdout)["metrics"]["bytes_ratio"], 1e-5)


@pytest.fixture
def delta(bmkit: Run, tiny: Path, chats: Path, tmp_path: Path) -> Path:
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "a").returncode == 0
    done = bmkit(
        *("tune", "lora", "-m", "a", "--data", chats, "-o", "d"),
        *("-s", "train.max_steps=8", "-s", "train.learning_rate=0.02"),
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "d"


def test_a_delta_loads_in_plain_peft_on_its_int8_base(delta: Path, bmkit: Run) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(delta, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
    from bmkit import model as models
    from bmkit.deltas import plugged

    ours = plugged.load(
        models.load_model(delta.parent / "a", device=torch.device("cpu")), {"a": delta}
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs, rtol=0, atol=1e-5)
    assert (theirs - base).abs().max() > 1e-3


def test_merge_writes_a_model_that_answers_as_base_and_delta(
    bmkit: Run, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    words = ("tune", "lora", "-m", "tiny", "--data", chats, "-s", "train.max_steps=8")
    words += ("-s", "train.learning_rate=0.02")
    assert bmkit(*words, "-o", "d").returncode == 0
    merged = bmkit(*words, "-s", "merge=true", "-o", "m", "--json")
    assert json.loads(merged.stdout)["kind"] == "model", merged.stderr
    from bmkit import model as models
    from bmkit.deltas import plugged

    apart = plugged.load(models.load_model(tiny, device=torch.device("cpu")), {"a": tmp_path / "d"})
    with torch.no_grad():
        expected = apart(IDS).logits
    found = logits(tmp_path / "m")
    # stored in bfloat16, as its base is: two to three digits
    assert (found - expected).norm() < 0.02 * expected.norm()
    base = logits(tiny)
    assert (found - base).norm() > 0.1 * base.norm()


def test_a_foreign_peft_adapter_and_checkpoint_are_taken(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    done = bmkit("infer", "-m", "theirs", "-p", "Hi", "--max-new-tokens", "6", "--json")
    assert done.returncode == 0, done.stderr
    base = bmkit("infer", "-m", "tiny", "-p", "Hi", "--max-new-tokens", "6", "--json")
    assert json.loads(done.stdout)["token_ids"] != json.loads(base.stdout)["token_ids"]
    two = bmkit(
        *("infer", "-m", "tiny", "--adapter", "theirs", "-p", "Hi", "--json"),
        *("--max-new-tokens", "6"),
    )
    assert json.loads(two.stdout)["token_ids"] == json.loads(done.stdout)["token_ids"]


def test_a_gguf_file_is_taken_and_equals_its_source(
    bmkit: Run, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """A GGUF written here with gguf's own writer, float32, Llama layout."""
    path = tmp_path / "small.gguf"
    model = _gguf_llama(path)
    done = bmkit("pull", path, "-o", "g")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(IDS % 64).logits
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "g", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS % 64).logits, expected, rtol=0.02, atol=0.02)
    answer = bmkit("infer", "-m", path, "-p", "a", "--raw", "--max-new-tokens", "2", "--json")
    assert answer.returncode == 0, answer.stderr


def _gguf_llama(path: Path) -> Any:
    """Write a random one-layer Llama as GGUF, and return it as transformers has it."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list(["<e>", "<s>", "<p>", *alphabet, "ab"])
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    state = model.state_dict()

    def put(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(name, tensor.float().contiguous().numpy())

    def rope(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """llama.cpp pairs neighbouring dimensions, transformers the two halves."""
        size = tensor.shape[0] // heads
        return tensor.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(tensor.shape)

    put("token_embd.weight", state["model.embed_tokens.weight"])
    put("output.weight", state["lm_head.weight"])
    put("output_norm.weight", state["model.norm.weight"])
    layer = "model.layers.0."
    put("blk.0.attn_q.weight", rope(state[layer + "self_attn.q_proj.weight"], 4))
    put("blk.0.attn_k.weight", rope(state[layer + "self_attn.k_proj.weight"], 2))
    put("blk.0.attn_v.weight", state[layer + "self_attn.v_proj.weight"])
    put("blk.0.attn_output.weight", state[layer + "self_attn.o_proj.weight"])
    for ours, theirs in (("gate", "gate"), ("up", "up"), ("down", "down")):
        put(f"blk.0.ffn_{theirs}.weight", state[f"{layer}mlp.{ours}_proj.weight"])
    put("blk.0.attn_norm.weight", state[layer + "input_layernorm.weight"])
    put("blk.0.ffn_norm.weight", state[layer + "post_attention_layernorm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3", "opt", "bert"])
def test_int8_covers_other_architectures_or_says_that_it_can_not(
    bmkit: Run, tmp_path: Path, name: str
) -> None:
    from transformers import (
        BertConfig,
        BertModel,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        GPT2LMHeadModel,
        OPTConfig,
        OPTForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99}
    wide = small | {"intermediate_size": 64}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=99)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**wide, num_key_value_heads=2)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**wide, num_key_value_heads=2, head_dim=8)
        ),
        "opt": lambda: OPTForCausalLM(OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32)),
        "bert": lambda: BertModel(BertConfig(**wide)),
    }[name]()
    model.save_pretrained(tmp_path / "m")
    done = bmkit("compress", "int8", "-m", "m", "-o", "a")
    if name == "gpt2":
        assert done.returncode == 3 and "Conv1D" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, torch, transformers; C = getattr(transformers, sys.argv[2])\n"
        "m = C.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "ids = torch.arange(7)[None] + 3\n"
        "with torch.no_grad(): out = m(ids)[0]\n"
        "print(float(out.double().abs().sum()))"
    )

    def total(path: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / path), type(model).__name__],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ),
        )
        return float(done.stdout)

    assert total("a") == pytest.approx(total("m"), rel=0.02)
    assert total("a") != total("m")


@pytest.mark.parametrize("scales", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, "false"), (3, "false"), (2, "true")])
def test_small_grids_load_in_plain_transformers(
    bmkit: Run, tiny: Path, tmp_path: Path, bits: int, symmetric: str, scales: str
) -> None:
    done = bmkit(
        *("compress", "int4", "-m", "tiny", "-o", "a", "-s", f"steps.0.bits={bits}"),
        *("-s", f"steps.0.symmetric={symmetric}", "-s", f"steps.0.scale_dtype={scales}"),
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(by_bmkit(tmp_path / "a"), logits(tmp_path / "a"))
    if scales == "bfloat16":  # transformers multiplies in it, infer in float32
        return
    says_what_transformers_says(bmkit, tmp_path / "a")


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_rounded_embeddings_are_read_or_refused(
    bmkit: Run, tiny: Path, tmp_path: Path, recipe: str, untied: bool
) -> None:
    source = with_own_head(tiny, tmp_path / "untied") if untied else tiny
    done = bmkit("compress", recipe, "-m", str(source), "-o", "a", "-s", "steps.0.embeddings=8")
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight_packed" in names
    assert not [n for n in names if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert ("lm_head.weight_packed" in names) == untied
    manifest = json.loads((tmp_path / "a" / "bmkit.json").read_text())
    ours = by_bmkit(tmp_path / "a")
    if recipe == "int8":  # the grid of all other layers
        assert manifest["loads_in"] == ["transformers + compressed-tensors"]
        assert torch.equal(ours, logits(tmp_path / "a"))
        says_what_transformers_says(bmkit, tmp_path / "a")
    else:
        assert manifest["loads_in"] == ["bmkit"]
        with pytest.raises(subprocess.CalledProcessError):
            logits(tmp_path / "a")
    plain = bmkit("compress", recipe, "-m", str(source), "-o", "b")
    assert plain.returncode == 0, plain.stderr
    other = by_bmkit(tmp_path / "b")
    assert 0 < (ours - other).abs().max() < 0.05 * other.abs().max()
    ids = []
    for more in ([], ["--cpu-memory", "600MiB"]):
        asked = bmkit("infer", "-m", "a", "-p", "word " * 9, "--raw", "--json", *more)
        assert asked.returncode == 0, asked.stderr
        ids.append(json.loads(asked.stdout)["token_ids"])
    assert ids[0] == ids[1]


def says_what_transformers_says(bmkit: Run, path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = bmkit("infer", "-m", str(path), "-p", "a word", "--raw", "--json")
    assert asked.returncode == 0, asked.stderr
    said = json.loads(asked.stdout)["token_ids"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(path)("a word", return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=len(said), do_sample=False)
    assert said == found[0, ids.shape[1] :].tolist()


def with_own_head(source: Path, target: Path) -> Path:
    """Make a copy whose head is not tied to its embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.5)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_w8a8_rounds_inputs_as_transformers_does(
    bmkit: Run, tiny: Path, tmp_path: Path, activations: str
) -> None:
    (tmp_path / "text.txt").write_text("some words to look at, and others. " * 60)
    done = bmkit(
        *("compress", "w8a8", "-m", "tiny", "-o", "a", "-s", f"steps.0.activations={activations}"),
        *("-s", "data.calibration=text.txt", "-s", "data.sequence_length=64"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "a" / "bmkit.json").read_text())["metrics"]
    assert 0.9 < metrics["perplexity_ratio"] < 1.2
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.int8
    assert ("model.layers.0.mlp.up_proj.input_scale" in kinds) == (activations == "static")
    says = bmkit("infer", "-m", "a", "-p", "a word", "--raw", "--json", "--max-new-tokens", 4)
    assert says.returncode == 0, says.stderr
    theirs = logits(tmp_path / "a")
    ours = placed_logits(tmp_path / "a")
    assert torch.equal(by_bmkit(tmp_path / "a"), theirs)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    unrounded = by_bmkit(tmp_path / "a")  # weights alone are rounded
    apart = (unrounded - theirs).abs().mean()
    if activations == "static":
        assert (ours - theirs).abs().mean() < 0.1 * apart
    else:  # it divides by 127.5, others by 127: as far from the unrounded ones, elsewhere
        assert 0.7 < (ours - unrounded).abs().mean() / apart < 1.4


def placed_logits(path: Path) -> torch.Tensor:
    """Return the logits of packed weights with inputs rounded as the checkpoint says."""
    from bmkit.report import Silent
    from bmkit.runtime.voice import Voice

    cpu = torch.device("cpu")
    voice = Voice(path, device=cpu, dtype="float32", rows=1, reporter=Silent())
    return torch.cat(list(voice.logits(IDS[0].tolist(), 0)))[None]


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_layers_of_several_widths_load_or_are_refused(
    bmkit: Run, tiny: Path, tmp_path: Path, symmetric: str
) -> None:
    (tmp_path / "text.txt").write_text("some words to look at, and others. " * 60)
    done = bmkit(
        *("compress", "gptq", "-m", "tiny", "-o", "a", "-s", "steps.0.average_bits=5"),
        *("-s", "data.calibration=text.txt", "-s", "data.sequence_length=64"),
        *("-s", "steps.0.scale_dtype=float32", "-s", f"steps.0.symmetric={symmetric}"),
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert len({g["weights"]["num_bits"] for g in groups}) > 1
    assert sum(len(g["targets"]) for g in groups) == 14
    ours = by_bmkit(tmp_path / "a")
    loads = json.loads((tmp_path / "a" / "bmkit.json").read_text())["loads_in"]
    if symmetric == "false":
        assert loads == ["bmkit"]
        with pytest.raises(subprocess.CalledProcessError):
            logits(tmp_path / "a")
        assert bmkit("infer", "-m", "a", "-p", "a", "--raw").returncode == 0
        return
    assert loads == ["transformers + compressed-tensors"]
    assert torch.allclose(ours, logits(tmp_path / "a"), atol=1e-5)
    says_what_transformers_says(bmkit, tmp_path / "a")
