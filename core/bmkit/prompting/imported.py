"""Experiments of OpenPrompt as recipes (its YAML files, arXiv 2111.01998)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bmkit.errors import InputError, did_you_mean
from bmkit.prompting import forms, importedsearch
from bmkit.prompting.processors import DATASETS

VERBALIZERS = {
    "manual_verbalizer": "manual",
    "one2one_verbalizer": "one_to_one",
    "knowledgeable_verbalizer": "knowledgeable",
    "soft_verbalizer": "soft",
    "proto_verbalizer": "prototypical",
    "automatic_verbalizer": "automatic",
    "ptr_verbalizer": "ptr",
    "generation_verbalizer": "generation",
}
TEMPLATES = (
    "manual_template",
    "mixed_template",
    "soft_manual_template",
    "soft_template",
    "ptuning_template",
    "ptr_template",
    "prefix_tuning_template",
    "lmbff_template",
)
"""OpenPrompt's kinds of templates."""
SETTINGS = {
    "full": "full",
    "few_shot": "few_shot",
    "zero_shot": "zero_shot",
    "few-shot": "few_shot",
    "zero-shot": "zero_shot",
}
DEFAULTS: dict[str, Any] = {
    "plm.optimize.lr": 5e-4,
    "plm.optimize.weight_decay": 0.01,
    "plm.optimize.scheduler.num_warmup_steps": 500,
    "train.num_epochs": 5,
    "train.batch_size": 2,
    "dataloader.max_seq_length": 256,
}
"""What OpenPrompt takes where an experiment says nothing, and bmkit would take something else."""
SHOTS = 10
"""Rows of each label, likewise."""
ELSEWHERE = {
    "environment": "--device says where to run; torchrun and accelerate run on several devices",
    "logging": "-o says where the artifact goes",
    "checkpoint": "a killed run resumes by itself; train.load_best_model_at_end keeps the best",
}
"""Sections that are no part of a recipe, and what takes their place."""


class _Config:
    """A configuration by dotted keys, which knows what nobody asked for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.values = dict(_leaves(config))
        self.asked: set[str] = set()

    def take(self, key: str) -> Any:
        """Return what stands at `key`, else OpenPrompt's default, or None."""
        self.asked.add(key)
        return self.values.get(key, DEFAULTS.get(key))

    def left(self) -> list[str]:
        """Return the keys that hold something and that nobody has asked for."""
        return [key for key, held in self.values.items() if key not in self.asked and held != ""]


def convert(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a `prompt` recipe that does what an experiment did, and notes of what it leaves out.

    `config` is the YAML file's content. Paths are kept as they are. Raises InputError if it is no
    experiment of OpenPrompt.
    """
    if not isinstance(config, Mapping) or not {"template", "verbalizer", "plm"} & set(config):
        raise InputError(
            "it is no experiment of OpenPrompt: it has none of `plm`, `template`, `verbalizer`",
            hint="see experiments/*.yaml in OpenPrompt's repository",
        )
    from_ = _Config(config)
    notes: list[str] = []
    recipe: dict[str, Any] = {"kind": "prompt"}
    task = from_.take("task") or "classification"
    recipe["task"] = "generation" if task == "generation" else "classification"
    if task not in ("classification", "generation"):
        notes.append(f"task: `{task}` became `classification`")
    if isinstance(seed := from_.take("reproduce.seed"), int) and seed >= 0:
        recipe["seed"] = seed
    recipe["data"] = _data(from_, notes)
    if task == "generation" and recipe["data"]["columns"].pop("label", None) is not None:
        recipe["data"]["columns"]["target"] = "tgt_text"
    tune = {"mode": "none" if from_.take("plm.optimize.freeze_para") else "full"}
    recipe["template"] = _template(from_, notes)
    rate = _trained_template(from_, str(from_.take("template")), tune, notes)
    if (verbalizer := _verbalizer(from_, notes)) is not None:
        recipe["verbalizer"] = verbalizer
    if (search := importedsearch.search(from_.take, notes)) is not None:
        recipe["search"] = search
    if (calibrate := _calibrate(from_, notes)) is not None:
        recipe["calibrate"] = calibrate
    recipe["learning_setting"] = _learning_setting(from_, notes)
    if recipe["learning_setting"]["type"] == "zero_shot":
        tune = {"mode": "none"}
    recipe["tune"] = tune
    if tune["mode"] != "none":
        recipe["train"] = _train(from_, notes) | ({} if rate is None else {"learning_rate": rate})
    _model(from_, notes)
    notes += _rest(from_, config)
    return recipe, notes


def _data(from_: _Config, notes: list[str]) -> dict[str, Any]:
    name, path = from_.take("dataset.name"), from_.take("dataset.path")
    known = DATASETS.get(str(name).lower())
    if known is None:
        notes.append(f"data: the columns of `{name}` aren't known here: write data.columns")
        columns: Mapping[str, str | int] = {"text_a": "text_a", "label": "label"}
    else:
        columns = known.columns
    data: dict[str, Any] = {"columns": dict(columns)}
    if known is not None:
        named = known.labels
        data["labels"] = dict(named) if isinstance(named, Mapping) else list(named)
        if known.note:
            notes.append(f"data: {known.note}")
    if path and known is not None and known.files:
        folder = str(path).rstrip("/")
        return {split: f"{folder}/{file}" for split, file in known.files.items()} | data
    where = f"`{path}`" if path else "the Hugging Face hub"
    notes.append(
        f"data: `{name}` from {where} isn't read as it is: write data.train and data.test, "
        "JSON lines, CSV or TSV with these columns"
    )
    return data


def _template(from_: _Config, notes: list[str]) -> dict[str, Any]:
    name = _selected(from_, "template", TEMPLATES)
    template = _text_or_file(from_, name, "text")
    if text := template.get("text"):
        template["text"] = _pieces(str(text))
        if name == "lmbff_template" and (form := importedsearch.form(template["text"])):
            template["text"] = forms.parse(form).bare()
    elif "file_path" not in template:
        notes.append("template: it has neither text nor file_path: write template.text")
    if "file_path" in template:
        notes.append(
            f"template: {template['file_path']} is read as it is; a lambda in it has to become "
            "the name of a filter"
        )
    if length := from_.take("dataloader.max_seq_length"):
        template["max_seq_length"] = length
    if method := from_.take("dataloader.truncate_method"):
        template["truncate_method"] = method
        if method == "head":
            notes.append(
                "template.truncate_method: OpenPrompt's `head` cut the ends of pieces; here it "
                "cuts their beginnings, as documented"
            )
    return template


def _trained_template(
    from_: _Config, name: str, tune: dict[str, Any], notes: list[str]
) -> float | None:
    """Say in `tune` what a template trains beside the model; return the learning rate of all."""
    frozen = tune["mode"] != "full"
    deltas: list[dict[str, Any]] = []
    if name == "soft_template":
        tokens = from_.take(f"{name}.num_tokens") or 20
        deltas.append({"type": "prompt", "num_virtual_tokens": tokens})
        for key in ("initialize_from_vocab", "random_range"):
            from_.take(f"{name}.{key}")
    elif name == "prefix_tuning_template":
        tokens, width = from_.take(f"{name}.num_token") or 5, from_.take(f"{name}.mid_dim") or 512
        prefix = {"type": "prefix", "num_virtual_tokens": tokens, "prefix_projection": True}
        deltas.append({**prefix, "encoder_hidden_size": width})
        if from_.take(f"{name}.prefix_dropout"):
            notes.append("tune: a prefix has no dropout here")
    elif name in ("ptuning_template", "ptr_template"):
        encoder = from_.take(f"{name}.prompt_encoder_type") or (
            "mlp" if name == "ptr_template" else "lstm"
        )
        tune["encoder"] = encoder
    trains = deltas or "encoder" in tune or name in ("mixed_template", "soft_manual_template")
    if frozen:
        tune["mode"] = "delta" if deltas else "soft" if trains else "none"
    if deltas:
        tune["deltas"] = deltas
    rate = from_.take(f"{name}.optimize.lr")
    if rate is None or not trains:
        return None
    if not deltas:  # the template has soft tokens, which have a rate of their own
        tune["learning_rate"] = rate
        return None
    if not frozen:
        notes.append(
            f"tune: vectors in front were trained at {rate}; all that is trained has "
            "train.learning_rate here"
        )
        return None
    return float(rate)


def _verbalizer(from_: _Config, notes: list[str]) -> dict[str, Any] | None:
    if not from_.values.get("verbalizer"):
        from_.take("verbalizer")
        return None
    name = _selected(from_, "verbalizer", VERBALIZERS)
    verbalizer: dict[str, Any] = {"type": VERBALIZERS[name]}
    verbalizer |= _text_or_file(from_, name, "label_words")
    renamed = {
        "prefix": "prefix",
        "multi_token_handler": "multi_token_handler",
        "max_token_split": "max_token_split",
        "candidate_frac": "candidate_frac",
        "num_candidates": "num_candidates",
        "num_cadidates": "num_candidates",  # OpenPrompt's spelling
        "label_word_num_per_class": "words_per_label",
        "balance": "balanced",
        "mid_dim": "size",
        "epochs": "epochs",
        "lr": "learning_rate",
        "verbalizer_lr": "learning_rate",
    }
    for theirs, ours in renamed.items():
        if (held := from_.take(f"{name}.{theirs}")) is not None:
            verbalizer[ours] = held
    from_.take(f"{name}.num_classes")
    if from_.take(f"{name}.score_fct") not in (None, "llr"):
        notes.append("verbalizer: words are searched by their likelihood ratio only")
    if (from_.take(f"{name}.num_searches") or 1) > 1:
        notes.append("verbalizer: words are searched once")
    if from_.take(f"{name}.multi_verb") == "proto":
        notes.append("verbalizer: multi_verb: proto (prototypes alone, without label words)")
    if (rate := from_.take(f"{name}.optimize.lr")) is not None:
        verbalizer["learning_rate"] = rate
    return verbalizer


def _text_or_file(from_: _Config, name: str, what: str) -> dict[str, Any]:
    """Return a section's `text` or `label_words`, or its file and choice."""
    said = from_.take(f"{name}.{what}")
    path, choice = from_.take(f"{name}.file_path"), from_.take(f"{name}.choice")
    if said is not None:
        return {what: said}
    return {} if path is None else {"file_path": path, "choice": choice or 0}


def _selected(from_: _Config, kind: str, known: Any) -> str:
    name = from_.take(kind)
    if name not in known:
        close = did_you_mean(str(name), known, otherwise=f"there are {', '.join(known)}")
        raise InputError(f"{kind}: `{name}` is no {kind} of OpenPrompt", hint=close)
    return str(name)


def _pieces(text: str) -> str:
    """Write OpenPrompt's first language, `<text_a>` and `<mask>`, as pieces."""
    for name in ("text_a", "text_b"):
        text = text.replace(f"<{name}>", f'{{"placeholder": "{name}"}}')
    return text.replace("<mask>", '{"mask"}').replace("<soft>", '{"soft"}')


def _calibrate(from_: _Config, notes: list[str]) -> dict[str, Any] | None:
    name = from_.take("calibrate")
    from_.take("contextualized_calibrate.num_example")
    split = from_.take("contextualized_calibrate.use_split")
    if name is None:
        return None
    notes.append("calibrate: OpenPrompt's command never used it; here it is used")
    if name == "pmi_calibrate":
        return {"type": "content_free"}
    if split not in (None, "train"):
        notes.append(f"calibrate: rows of train are taken, not of `{split}`")
    rows = from_.take("contextualized_calibrate.num_example")
    return {"type": "contextual"} | ({"num_examples": rows} if rows else {})


def _learning_setting(from_: _Config, notes: list[str]) -> dict[str, Any]:
    name = from_.take("learning_setting") or "full"
    if name not in SETTINGS:
        raise InputError(
            f"learning_setting: `{name}` is none of OpenPrompt's",
            hint=did_you_mean(str(name), SETTINGS, otherwise=f"there are {', '.join(SETTINGS)}"),
        )
    setting: dict[str, Any] = {"type": SETTINGS[name]}
    from_.take("few_shot.few_shot_sampling")
    held = {
        key: from_.take(f"sampling_from_train.{key}")
        for key in (
            "num_examples_per_label",
            "num_examples_total",
            "also_sample_dev",
            "num_examples_per_label_dev",
            "num_examples_total_dev",
            "seed",
        )
    }
    if setting["type"] != "few_shot":
        return setting
    if held["num_examples_per_label"] is None and held["num_examples_total"] is None:
        held["num_examples_per_label"] = SHOTS
    for key in ("num_examples_per_label", "num_examples_total"):
        if held[key] is not None:
            setting[key] = held[key]
            dev = held[f"{key}_dev"]
            if held["also_sample_dev"] and dev is not None and dev != held[key]:
                notes.append(f"learning_setting: dev gets as many rows as train, not {dev}")
    if held["also_sample_dev"] is False:
        notes.append("learning_setting: also_sample_dev: false; give data.dev, or leave it out")
    seeds = held["seed"]
    if seeds is not None:
        setting["seeds"] = list(seeds) if isinstance(seeds, list) else [seeds]
    return setting


def _train(from_: _Config, notes: list[str]) -> dict[str, Any]:
    renamed = {
        "plm.optimize.lr": "learning_rate",
        "plm.optimize.weight_decay": "weight_decay",
        "plm.optimize.scheduler.num_warmup_steps": "warmup_steps",
        "plm.optimize.scheduler.type": "lr_scheduler_type",
        "train.num_epochs": "num_train_epochs",
        "train.num_training_steps": "max_steps",
        "train.batch_size": "per_device_train_batch_size",
        "train.gradient_accumulation_steps": "gradient_accumulation_steps",
        "train.max_grad_norm": "max_grad_norm",
        "dev.batch_size": "per_device_eval_batch_size",
        "valid.batch_size": "per_device_eval_batch_size",
    }
    train = {
        ours: held for theirs, ours in renamed.items() if (held := from_.take(theirs)) is not None
    }
    if (norm := train.get("max_grad_norm")) is not None and norm <= 0:
        del train["max_grad_norm"]
        notes.append("train: gradients weren't clipped; here they are, at 1.0")
    if str(train.get("lr_scheduler_type", "")).startswith("get_"):
        shown = train.pop("lr_scheduler_type")
        notes.append(f"train: the schedule `{shown}` became `linear`")
    return train


def _model(from_: _Config, notes: list[str]) -> None:
    path = from_.take("plm.model_path")
    from_.take("plm.model_name")
    if path:
        notes.append(f"the model is no part of a recipe: run it with -m {path}")


def _rest(from_: _Config, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note for each thing that nobody asked for."""
    chosen = {str(from_.values.get(key)) for key in ("template", "verbalizer", "calibrate", "task")}
    told: set[str] = set()
    for key in from_.left():
        section = key.partition(".")[0]
        held = config.get(section)
        optional = isinstance(held, Mapping) and "parent_config" in held
        flag = importedsearch.SECTIONS.get(section)
        unused = (
            not from_.values.get(f"classification.{flag}")
            if flag
            else section not in chosen
            and (optional or section in VERBALIZERS or section in TEMPLATES)
        )
        if unused or key.endswith(".parent_config") or section in told:
            continue
        if section in ELSEWHERE:
            told.add(section)
            yield f"{section}: left out; {ELSEWHERE[section]}"
        else:
            yield f"{key}: {from_.values[key]!r} was left out"


def _leaves(held: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in held.items():
        if isinstance(value, Mapping) and not (value and key == "label_words"):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
