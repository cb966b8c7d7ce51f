"""`bmkit phrases`: a phrase pool from text, by a model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from bmkit import artifact, hashes, report
from bmkit.artifact import Artifact, InputEntry
from bmkit.data.rows import BadRow, read
from bmkit.errors import InputError, an_artifact
from bmkit.pipeline.resolve import find_base, find_model
from bmkit.report import Reporter


def build(
    corpus: Path,
    model: str,
    out: Path,
    reporter: Reporter,
    *,
    limit: int | None = None,
    force: bool = False,
) -> Artifact:
    """Tokenise the rows of `corpus`, and add them to the pool at `out`.

    A row holds `text`, `messages`, or `prompt` and `completion`. Raises InputError for a row that
    can't be used, naming its line.
    """
    named = find_model(model, reporter)
    base = find_base(named, reporter) if named.kind == "delta" else named
    if base.kind != "model":
        raise InputError(
            f"{base.path} is {an_artifact(base.kind)}; phrases need a model's tokenizer"
        )
    try:
        stream = corpus.open("rb")
    except OSError as exc:
        raise InputError(f"{corpus} cannot be read: {exc.strerror}") from None
    from bmkit import model as models
    from bmkit.data import chat
    from bmkit.runtime.speculation import pool

    tokenizer, config = models.load_tokenizer(base.path), models.load_config(base.path)
    pieces: list[list[int]] = []
    size = corpus.stat().st_size
    with stream, report.task(reporter, "phrases", size, "bytes") as bar:
        at = 0
        for row in read(stream):
            problem = row.problem if isinstance(row, BadRow) else None
            if problem is None and not isinstance(row, BadRow):
                try:
                    pieces.append(chat.whole(tokenizer, row.values))
                except ValueError as exc:
                    problem = str(exc)
            if problem is not None:
                raise InputError(f"{corpus}:{row.line}: {problem}")
            bar.advance(stream.tell() - at)
            at = stream.tell()
    if not pieces:
        raise InputError(f"{corpus} holds no rows", hint="it takes one JSON object a line")
    with hashes.HashCache() as cache:
        digest = cache.sha256(corpus)
    pool.add(
        out,
        pieces,
        tokenizer=pool.tokenizer_digest(tokenizer),
        vocabulary=max(len(tokenizer), config.get_text_config().vocab_size),
        inputs={
            "model": base.entry(),
            "corpus": InputEntry(kind="data", digest=digest, path=str(corpus)),
        },
        limit=limit,
        force=force,
    )
    return artifact.open_artifact(out)
