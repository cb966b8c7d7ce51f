"""The verbalizer that a run begins with: its words as they are, searched or refined on rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bmkit.prompt import states
from bmkit.prompt.ask import Asker
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.ready import SEVERAL, Ready
from bmkit.prompt.refined import knowledgeable
from bmkit.prompt.rounds import Rows
from bmkit.prompt.rules import Rules
from bmkit.prompt.states import States
from bmkit.prompting.encode import Encoded
from bmkit.prompting.labelwords import LabelWords
from bmkit.verbalizers import automatic, prototypes
from bmkit.verbalizers.prototypes import Prototypes


def begun(
    ready: Ready, asker: Asker, train: Rows, plain: Sequence[Encoded], seed: int
) -> Verbalizer | States:
    """Return the recipe's verbalizer, before anything is trained.

    `automatic` and `prototypical` learn from `train`, `knowledgeable` looks at `plain` rows, whose
    labels aren't told. Raises InputError for rows that can't tell words.
    """
    spec = ready.recipe.verbalizer
    labels = tuple(ready.classes.names)
    if spec.reads_states:
        told = states.begun(spec.type, asker, ready.words, size=spec.size, seed=seed, labels=labels)
        if isinstance(told.module, Prototypes) and ready.recipe.tune.mode == "none":
            prototypes.fit(
                told.module,
                asker.states(train.prompts).to(asker.model.device),
                told.targets(train.right).to(asker.model.device),
                epochs=spec.epochs,
                learning_rate=spec.learning_rate or 1e-3,
            )
        return told
    words = ready.words
    if spec.type == "automatic":
        words = _searched(ready, asker, train)
    if spec.type in SEVERAL:
        return Rules(words, ready.handler, spec.combine, own_labels=labels)
    words_told = Verbalizer(
        words,
        spec.multi_token_handler,
        spec.combine,
        spec.aggregate,
        several=ready.recipe.task == "multilabel",
    )
    if spec.type == "knowledgeable":
        words_told = knowledgeable(words_told, asker, plain, spec)
    return words_told.weighted() if spec.word_weights else words_told


def _searched(ready: Ready, asker: Asker, train: Rows) -> LabelWords:
    spec = ready.recipe.verbalizer
    logprobs = asker.vocabulary(train.prompts)
    found = automatic.search(
        logprobs,
        torch.tensor([own[0] for own in train.right]),
        len(ready.classes.names),
        words_per_label=spec.words_per_label,
        num_candidates=spec.num_candidates,
        balanced=spec.balanced,
        allowed=_allowed(ready, logprobs.shape[1]),
    )
    return found.words(ready.tokenizer, ready.classes.names)


def _allowed(ready: Ready, size: int) -> torch.Tensor:
    """Return the tokens that are words; all but special ones where there are too few of these."""
    allowed = automatic.whole_words(ready.tokenizer, size)
    if int(allowed.sum()) < 100:
        known = [i for i in ready.tokenizer.get_vocab().values() if i < size]
        allowed[known] = True
        allowed[[i for i in ready.tokenizer.all_special_ids if i < size]] = False
    return allowed
