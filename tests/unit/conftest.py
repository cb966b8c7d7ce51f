"""What unit tests share: a small tokenizer and small models that are made on the spot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "system\nYou answer in one word.\nuser\nWhat is the capital of France?\nassistant\nParis",
    "The answer is the answer, and what is not the answer is not.\n\nThen there is more.\n\n",
    "It is what it is. It is 4. It is Paris, the capital of France.\n\n\n",
]


@pytest.fixture
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with merges (some over line ends) and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 34,
}
GROUPED = {**WIDTHS, "num_key_value_heads": 1}
OLD = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 34}
HALVES = {
    "d_model": 16,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 24 for half in ("encoder", "decoder")},
    "vocab_size": 40,
    "max_position_embeddings": 34,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "decoder_start_token_id": 1,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 40}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {
    **GROUPED,
    **EXPERTS,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
PICTURES = {**WIDTHS, "image_size": 8, "patch_size": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi": ("PhiForCausalLM", GROUPED),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", OLD),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 34},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", WIDTHS),
    "gptj": ("GPTJForCausalLM", {**OLD, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", OLD | {"hidden_size": 16}),
    "opt": ("OPTForCausalLM", {**WIDTHS, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "falcon": ("FalconForCausalLM", WIDTHS),
    "mpt": ("MptForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 40}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8},
    ),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "gpt_oss": ("GptOssForCausalLM", {**GROUPED, "head_dim": 8, "num_local_experts": 4}),
    "bert": ("BertForMaskedLM", WIDTHS),
    "bert_classifier": ("BertForSequenceClassification", WIDTHS),
    "roberta": ("RobertaForMaskedLM", WIDTHS),
    "roberta_classifier": ("RobertaForSequenceClassification", WIDTHS),
    "electra": ("ElectraForMaskedLM", {**WIDTHS, "embedding_size": 8}),
    "albert": ("AlbertForMaskedLM", {**WIDTHS, "embedding_size": 8}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        {**WIDTHS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        WIDTHS
        | dict.fromkeys(("pad_token_id", "eos_token_id", "cls_token_id"), 1)
        | {"bos_token_id": 1, "sep_token_id": 1},
    ),
    "mpnet": ("MPNetForMaskedLM", WIDTHS),
    "nomic_bert": ("NomicBertModel", WIDTHS),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5_gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "t5_encoder": ("T5EncoderModel", T5),
    "bart": ("BartForConditionalGeneration", HALVES),
    "m2m_100": ("M2M100ForConditionalGeneration", HALVES),
    "marian": ("MarianMTModel", HALVES),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**HALVES, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
    "vit": ("ViTForImageClassification", PICTURES),
    "clip": (
        "CLIPModel",
        {"text_config": {**WIDTHS}, "vision_config": {**PICTURES}, "projection_dim": 8},
    ),
}


@pytest.fixture
def architecture() -> Callable[..., Any]:
    """Build a tiny random model of a family, 16 wide with 2 blocks: on meta unless `real`."""

    def build(name: str, *, real: bool = False, kind: str | None = None, **config: Any) -> Any:
        import torch
        import transformers

        known, values = ARCHITECTURES[name]
        made = getattr(transformers, kind or known)
        torch.manual_seed(0)
        with torch.device("cpu" if real else "meta"):
            return made(made.config_class(**(copy.deepcopy(values) | config))).eval()

    return build
