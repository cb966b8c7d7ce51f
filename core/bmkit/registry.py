"""Names to code, without importing the code: the stages and their methods, as data."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One `bmkit` command: what it reads, what it writes, where its code is."""

    name: str
    summary: str
    recipe: str  # "package.module:Class", torch-free
    plan: str  # "package.module:function", torch-free
    run: str  # "package.module:function", imports torch
    takes: tuple[str, ...]  # kinds of inputs; with "nothing", it also runs without one
    gives: str  # what it writes by default; "text" is written to stdout
    version: int = 1  # raise it when the same recipe would give other bytes
    others: tuple[tuple[str, str, str], ...] = ()
    """A kind of input that another engine answers for: kind, `plan` and `run` as above.

    Or, in the place of a kind, the `part` of the stage that a request names.
    """
    taught_by: str = ""
    """A kind of artifact that may be named in the place of a model: it stands for what it was made
    on, and the rows in it are those to learn from."""

    def engine(self, kind: str) -> tuple[str, str]:
        """Return the `plan` and `run` of the engine that takes inputs of this kind."""
        return next(((p, r) for k, p, r in self.others if k == kind), (self.plan, self.run))


@dataclass(frozen=True)
class Method:
    """One way of doing a step of a stage: a file of code, a built-in recipe, a row in the docs."""

    stage: str
    name: str  # the tag in the recipe: `method: quantize`, `type: lora`
    code: str  # "package.module:function"
    builtin: str  # the built-in recipe that uses it
    summary: str
    source: str  # paper or library that it follows


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "compress",
            "Make a checkpoint smaller.",
            "bmkit.compress.recipe:CompressRecipe",
            "bmkit.compress.plan:estimate",
            "bmkit.compress.run:run",
            takes=("model",),
            gives="model",
            version=9,
        ),
        Stage(
            "tune",
            "Train a delta on a frozen model.",
            "bmkit.tune.recipe:TuneRecipe",
            "bmkit.tune.plan:estimate",
            "bmkit.tune.run:run",
            takes=("model",),
            gives="delta",
            version=4,
            taught_by="prompt",
        ),
        Stage(
            "prompt",
            "Ask a model for labels by a template.",
            "bmkit.prompt.recipe:PromptRecipe",
            "bmkit.prompt.plan:estimate",
            "bmkit.prompt.run:run",
            takes=("model", "delta"),
            gives="prompt",
            version=2,
        ),
        Stage(
            "infer",
            "Generate text.",
            "bmkit.infer.recipe:InferRecipe",
            "bmkit.infer.plan:estimate",
            "bmkit.infer.run:run",
            takes=("model", "delta", "prompt"),
            gives="text",
            others=(("prompt", "bmkit.prompt.plan:estimate_answers", "bmkit.prompt.answer:run"),),
        ),
        Stage(
            "spec-decode",
            "Generate the same text in fewer forward passes.",
            "bmkit.specdec.recipe:SpecDecodeRecipe",
            "bmkit.specdec.plan:estimate",
            "bmkit.specdec.run:run",
            takes=("model", "delta"),
            gives="text",
        ),
        Stage(
            "duplex",
            "Let a model listen while it speaks, or make the data of which it learns to.",
            "bmkit.duplex.recipe:DuplexRecipe",
            "bmkit.duplex.plan:estimate",
            "bmkit.duplex.build:run",
            takes=("nothing", "model", "delta"),
            gives="data",
            version=2,
            others=(
                ("model", "bmkit.duplex.plan:estimate_sessions", "bmkit.duplex.opening:run"),
                ("delta", "bmkit.duplex.plan:estimate_sessions", "bmkit.duplex.opening:run"),
                ("eval", "bmkit.duplex.plan:estimate_evaluation", "bmkit.duplex.evaluation:run"),
            ),
        ),
    )
}

METHODS = (
    Method(
        "compress",
        "quantize",
        "bmkit.nn.rounding:quantize",
        "int8",
        "Round weights to 8, 4, 3 or 2 bits, a scale per output channel or per group of inputs.",
        "round to nearest, symmetric or not; compressed-tensors `pack-quantized` on disk",
    ),
    Method(
        "compress",
        "gptq",
        "bmkit.nn.gptq:gptq",
        "gptq",
        "Round weights so that the layers' outputs change least, on calibration text.",
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv "
        "2210.17323",
    ),
    Method(
        "compress",
        "quanto",
        "bmkit.foreign.quanto:quantise",
        "quanto",
        "Round weights to float8 or 2, 4, 8 bits, and activations if wanted, by optimum-quanto.",
        "optimum-quanto 0.2.7, its format on disk",
    ),
    Method(
        "compress",
        "optimum_gptq",
        "bmkit.compress.steps.foreign:optimum_gptq",
        "optimum-gptq",
        "Round weights by optimum's GPTQ, in the format that GPTQModel and vLLM read.",
        "optimum.gptq with GPTQModel; GPTQ, arXiv 2210.17323",
    ),
    Method(
        "compress",
        "awq",
        "bmkit.nn.scaling:activation_aware",
        "awq",
        "Scale weights by how large their inputs are, so that rounding costs less.",
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv "
        "2306.00978",
    ),
    Method(
        "compress",
        "smoothquant",
        "bmkit.nn.scaling:smooth",
        "smoothquant",
        "Move the range of inputs into weights before both are rounded.",
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, "
        "arXiv 2211.10438",
    ),
    Method(
        "compress",
        "magnitude",
        "bmkit.nn.sparsity:magnitude",
        "magnitude",
        "Set the smallest weights to zero: a share of them, or n of each m.",
        "Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626; "
        "2:4 as in BMCook",
    ),
    Method(
        "compress",
        "wanda",
        "bmkit.nn.sparsity:wanda",
        "wanda",
        "Set to zero the weights that carry least, by their size times their input's.",
        "A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695",
    ),
    Method(
        "compress",
        "sparsegpt",
        "bmkit.nn.sparsity:sparsegpt",
        "sparsegpt",
        "Set weights to zero, and let those that are left make up for it.",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv 2301.00774",
    ),
    Method(
        "compress",
        "drop_layers",
        "bmkit.compress.layers:spread",
        "draft",
        "Leave whole layers out, spread over the depth.",
        "layer dropping; as in ShortGPT, arXiv 2403.03853, without its ranking",
    ),
    Method(
        "compress",
        "shrink",
        "bmkit.nn.structured:best",
        "shrink",
        "Cut neurons, heads, channels and layers that carry least, and let the others make up.",
        "Compact Language Models via Pruning and Knowledge Distillation (Minitron), arXiv "
        "2407.14679; errors made up for as in ZipLM, arXiv 2302.04089; layers by ShortGPT, arXiv "
        "2403.03853",
    ),
    Method(
        "compress",
        "gates",
        "bmkit.nn.gates:draw",
        "gates",
        "Let gates learn which neurons, heads and layers stay, then cut the others.",
        "Learning Sparse Neural Networks through L0 Regularization, arXiv 1712.01312; Structured "
        "Pruning Learns Compact and Accurate Models, arXiv 2204.00408",
    ),
    Method(
        "compress",
        "frequent_tokens",
        "bmkit.compress.frequent:ranked",
        "draft",
        "Let a draft's head say only the most frequent tokens.",
        "FR-Spec: Accelerating Large-Vocabulary Language Models via Frequency-Ranked Speculative "
        "Sampling, arXiv 2502.14856",
    ),
    Method(
        "compress",
        "moefy",
        "bmkit.nn.experts:divide",
        "moefy",
        "Divide the neurons of feed-forwards into experts, of which each token computes some.",
        "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts, arXiv 2110.01786",
    ),
    Method(
        "compress",
        "distill",
        "bmkit.train.distil:divergence",
        "draft",
        "Train a smaller model on its teacher's likeliest tokens, kept on disk.",
        "Distilling the Knowledge in a Neural Network, arXiv 1503.02531",
    ),
    Method(
        "tune",
        "lora",
        "bmkit.deltas.configs:lora",
        "lora",
        "Low-rank updates beside frozen linear layers.",
        "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; carried by PEFT",
    ),
    Method(
        "tune",
        "adalora",
        "bmkit.deltas.configs:adalora",
        "adalora",
        "Low-rank updates whose ranks go to where they are worth most.",
        "AdaLoRA, arXiv 2303.10512; carried by PEFT",
    ),
    Method(
        "tune",
        "ia3",
        "bmkit.deltas.configs:ia3",
        "ia3",
        "Learned scales of keys, values and the feed-forward.",
        "IA3, arXiv 2205.05638; carried by PEFT",
    ),
    Method(
        "tune",
        "vera",
        "bmkit.deltas.configs:vera",
        "vera",
        "Learned scales between random matrices that all layers share.",
        "VeRA, arXiv 2310.11454; carried by PEFT",
    ),
    Method(
        "tune",
        "oft",
        "bmkit.deltas.configs:oft",
        "oft",
        "Rotations of what goes into linear layers.",
        "OFT, arXiv 2306.07280; carried by PEFT",
    ),
    Method(
        "tune",
        "boft",
        "bmkit.deltas.configs:boft",
        "boft",
        "Such rotations, made of butterflies.",
        "BOFT, arXiv 2311.06243; carried by PEFT",
    ),
    Method(
        "tune",
        "layer_norm",
        "bmkit.deltas.configs:layer_norm",
        "layer_norm",
        "Norms alone.",
        "Tuning LayerNorm in Attention, arXiv 2312.11420; carried by PEFT",
    ),
    Method(
        "tune",
        "trainable_tokens",
        "bmkit.deltas.configs:trainable_tokens",
        "trainable_tokens",
        "Rows of the embedding alone.",
        "PEFT",
    ),
    Method(
        "tune",
        "prefix",
        "bmkit.deltas.configs:prefix",
        "prefix",
        "Keys and values in front of all others, in each layer.",
        "Prefix-Tuning, arXiv 2101.00190; carried by PEFT",
    ),
    Method(
        "tune",
        "prompt",
        "bmkit.deltas.configs:prompt",
        "prompt",
        "Vectors in front of what the model reads.",
        "Prompt tuning, arXiv 2104.08691; carried by PEFT",
    ),
    Method(
        "tune",
        "p_tuning",
        "bmkit.deltas.configs:p_tuning",
        "p_tuning",
        "Such vectors, out of an encoder.",
        "P-tuning, arXiv 2103.10385; carried by PEFT",
    ),
    Method(
        "tune",
        "adapter",
        "bmkit.deltas.configs:adapter",
        "adapter",
        "Bottlenecks behind modules.",
        "Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247",
    ),
    Method(
        "tune",
        "parallel_adapter",
        "bmkit.deltas.configs:parallel_adapter",
        "parallel_adapter",
        "Bottlenecks beside modules.",
        "He et al., arXiv 2110.04366",
    ),
    Method(
        "tune",
        "compacter",
        "bmkit.deltas.configs:compacter",
        "compacter",
        "Bottlenecks of sums of Kronecker products.",
        "Compacter, arXiv 2106.04647",
    ),
    Method(
        "tune",
        "low_rank_adapter",
        "bmkit.deltas.configs:low_rank_adapter",
        "low_rank_adapter",
        "Bottlenecks of thin matrices.",
        "OpenDelta, arXiv 2307.03084",
    ),
    Method(
        "tune",
        "bitfit",
        "bmkit.deltas.configs:bitfit",
        "bitfit",
        "Biases, also where there were none.",
        "BitFit, arXiv 2106.10199",
    ),
    Method(
        "prompt",
        "manual",
        "bmkit.verbalizers.manual:label_logprobs",
        "sentiment",
        "Words for each label, of any number of tokens.",
        "PET, arXiv 2001.07676; OpenPrompt, arXiv 2111.01998",
    ),
    Method(
        "prompt",
        "one_to_one",
        "bmkit.verbalizers.manual:label_logprobs",
        "question",
        "One word for each label, of one token.",
        "OpenPrompt, arXiv 2111.01998",
    ),
    Method(
        "prompt",
        "knowledgeable",
        "bmkit.prompt.refined:knowledgeable",
        "knowledgeable",
        "Many words for each label, of which those are kept that the model says and tells apart.",
        "Knowledgeable Prompt-tuning, arXiv 2108.02035",
    ),
    Method(
        "prompt",
        "automatic",
        "bmkit.verbalizers.automatic:search",
        "automatic",
        "Words that are searched on a few rows, by their likelihood ratio.",
        "PETAL, arXiv 2010.13641",
    ),
    Method(
        "prompt",
        "soft",
        "bmkit.verbalizers.softwords:SoftWords",
        "soft",
        "A row of the head for each label, trained.",
        "WARP, arXiv 2101.00121",
    ),
    Method(
        "prompt",
        "prototypical",
        "bmkit.verbalizers.prototypes:Prototypes",
        "prototypical",
        "A point for each label among states at the mask.",
        "Prototypical verbalizer, arXiv 2203.09770",
    ),
    Method(
        "prompt",
        "ptr",
        "bmkit.prompt.rules:Rules",
        "rules",
        "A word for each label at each of several masks, which labels may share.",
        "PTR, arXiv 2105.11259",
    ),
    Method(
        "prompt",
        "generation",
        "bmkit.prompt.rules:Rules",
        "causes",
        "Texts of each row's own for its labels, made by rules.",
        "OpenPrompt, arXiv 2111.01998",
    ),
    Method(
        "prompt",
        "content_free",
        "bmkit.verbalizers.calibration:prior",
        "sentiment",
        "Divide away what is likely after inputs that say nothing.",
        "Calibrate Before Use, arXiv 2102.09690",
    ),
    Method(
        "prompt",
        "contextual",
        "bmkit.verbalizers.calibration:prior",
        "question",
        "Divide away what is likely on the average of rows without labels.",
        "Knowledgeable Prompt-tuning, arXiv 2108.02035",
    ),
)


def load(spec: str) -> Any:
    """Import `package.module:name`."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)
