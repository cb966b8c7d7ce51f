"""Checkpoints, adapters, inputs and outputs that are less usual: right, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def rows_of(done: Done) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def save(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[Any, str], Path]:
    """Save a model with the tiny checkpoint's tokenizer, without chat template."""

    def write(model: Any, name: str) -> Path:
        path = tmp_path / name
        shutil.copytree(tiny_checkpoint, path)
        for left in ("chat_template.jinja", "generation_config.json", "model.safetensors"):
            (path / left).unlink(missing_ok=True)
        model.save_pretrained(path)
        return path

    return write


def test_an_adapter_that_replaces_a_module_loses_nothing(
    bmkit: Run, save: Callable[[Any, str], Path], tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = save(LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)), "base")
    base = AutoModelForCausalLM.from_pretrained(path)
    made = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    made.save_pretrained(tmp_path / "delta")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path), tmp_path / "delta"
    )
    ids = AutoTokenizer.from_pretrained(path)("Hello", return_tensors="pt")["input_ids"]
    wanted = plain.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=2)
    words = ("infer", "-m", path, "--adapter", "delta", "-p", "Hello", "--max-new-tokens", "8")
    (row,) = rows_of(bmkit(*words, "--json"))
    assert row["token_ids"] == wanted[0, ids.shape[1] :].tolist()
    refused = bmkit(*words, "--quant", "int8")
    assert refused.returncode == 4
    assert "brings modules of its own" in refused.stderr


def test_an_adapter_with_tensors_that_fit_nowhere_is_refused(
    bmkit: Run, save: Callable[[Any, str], Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    path = save(GPT2LMHeadModel(config), "base")
    delta = get_peft_model(
        GPT2LMHeadModel(config), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    delta.save_pretrained(tmp_path / "delta")
    file = tmp_path / "delta" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if ".h.1." in n)
    tensors[name.replace(".h.1.", ".h.7.")] = tensors[name].clone()
    save_file(tensors, file)
    refused = bmkit("infer", "-m", path, "--adapter", "delta", "-p", "Hello")
    assert refused.returncode == 3
    assert "1 of its tensors has no place in it" in refused.stderr and ".h.7." in refused.stderr


def test_a_window_that_llama_does_not_look_at_changes_nothing(
    bmkit: Run, save: Callable[[Any, str], Path]
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, initializer_range=0.3)
    config.sliding_window = 20
    path = save(LlamaForCausalLM(config), "windowed")
    assert json.loads((path / "config.json").read_text())["sliding_window"] == 20
    plain = LlamaForCausalLM.from_pretrained(path)
    text = "Some words, and then some more words, and more."
    (row,) = rows_of(bmkit("infer", "-m", path, "--score", "-p", text, "--json"))
    ids = torch.tensor([row["token_ids"]])
    with torch.no_grad():
        loss = float(plain(input_ids=ids, labels=ids).loss)
    assert row["logprob"] == pytest.approx(-loss * (ids.shape[1] - 1), rel=1e-4)


def test_a_decoder_that_classifies_labels_rows_as_it_does_one_by_one(
    bmkit: Run, save: Callable[[Any, str], Path]
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    for name, pad in (("other", 7), ("none", None)):
        torch.manual_seed(0)
        config = LlamaConfig(**{**SIZES, "pad_token_id": pad}, initializer_range=0.3, num_labels=3)
        path = save(LlamaForSequenceClassification(config), name)
        prompts = [word for p in ("Hi", "A longer text", "x y z w") for word in ("-p", p)]
        found = [
            rows_of(bmkit("infer", "-m", path, *prompts, "--json", "-s", f"batch_size={n}"))
            for n in (1, 3)
        ]
        for one, other in zip(*found, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "T5EncoderModel"])
def test_encoders_of_other_checkpoints_embed(
    bmkit: Run, save: Callable[[Any, str], Path], kind: str
) -> None:
    import torch
    import transformers
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    if kind == "T5EncoderModel":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
        config: Any = transformers.T5Config(vocab_size=259, **sizes, decoder_start_token_id=0)
    else:
        config = transformers.BertConfig(**SIZES, max_position_embeddings=64)
    path = save(getattr(transformers, kind)(config), "encoder")
    loader = transformers.BertModel if "Bert" in kind else transformers.T5EncoderModel
    plain = loader.from_pretrained(path).eval()
    (row,) = rows_of(bmkit("infer", "-m", path, "-p", "Hello", "--json"))
    ids = AutoTokenizer.from_pretrained(path)("Hello", return_tensors="pt")
    with torch.no_grad():
        hidden = plain(**ids).last_hidden_state[0]
    wanted = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert row["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_checkpoints_for_what_is_not_done_and_of_wrong_sizes_are_refused(
    bmkit: Run, save: Callable[[Any, str], Path], tiny: Path
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel

    path = save(BertForQuestionAnswering(BertConfig(**SIZES)), "tags")
    refused = bmkit("infer", "-m", path, "-p", "Hello")
    assert refused.returncode == 3 and "ForQuestionAnswering" in refused.stderr
    config = GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    other = save(GPT2LMHeadModel(config), "cut")
    for folder, name in ((tiny, "mlp.up_proj.weight"), (other, "ln_f.weight")):
        tensors = load_file(folder / "model.safetensors")
        key = next(n for n in tensors if n.endswith(name))
        tensors[key] = tensors[key][:-1].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        refused = bmkit("infer", "-m", folder, "-p", "Hello")
        assert refused.returncode == 3, refused.stderr
        assert "has the shape" in refused.stderr and name.removesuffix(".weight") in refused.stderr


def test_rows_may_come_from_a_pipe_and_reports_go_to_devices_and_links(
    bmkit: Run, sh: Callable[[str], Done], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.json").write_text("old")
    (tmp_path / "link.json").symlink_to("there.json")
    ask = "bmkit infer -m tiny --max-new-tokens 3 --json -q"
    done = sh(f'{ask} -i <(echo \'{{"prompt": "Hi"}}\') --report link.json')
    assert len(rows_of(done)) == 1
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "there.json").read_text())["stage"] == "infer"
    os.mkfifo(tmp_path / "fifo")
    reader = subprocess.Popen(
        [sys.executable, "-c", "print(len(open('fifo').read()))"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    done = bmkit("infer", "-m", "tiny", "-p", "Hi", "--max-new-tokens", "3", "--report", "fifo")
    assert done.returncode == 0, done.stderr
    assert int(reader.communicate(timeout=60)[0]) > 100
    assert not (tmp_path / "fifo").is_file()
    for words, said in (
        (("-p", "Hi", "--report", "."), "is a directory"),
        (("-p", "Hi", "-o", "fifo", "--force"), "no plain file"),
    ):
        refused = bmkit("infer", "-m", "tiny", *words)
        assert refused.returncode == 3 and said in refused.stderr, refused.stderr
    (tmp_path / "empty.jsonl").write_text("\n")
    refused = bmkit("infer", "-m", "tiny", "-i", "empty.jsonl", "-o", "out.jsonl")
    assert refused.returncode == 3 and "empty.jsonl holds no rows" in refused.stderr
    assert refused.stdout == "" and not (tmp_path / "out.jsonl").exists()
