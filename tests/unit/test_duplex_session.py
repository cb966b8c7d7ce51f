"""A running session: whatever is done to it, the model says what it says of the whole log."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from bmkit.data.slices.layout import Layout, Pair, parsed, rendered
from bmkit.data.slices.layout import collapsed as trained
from bmkit.data.slices.slicer import Words
from bmkit.duplex.agent import AgentSlice
from bmkit.duplex.forgetting import Spares
from bmkit.duplex.journal import LOG, Journal
from bmkit.duplex.places import Place, TargetPlace
from bmkit.duplex.policy import Policy
from bmkit.duplex.session import DuplexSession
from bmkit.duplex.settings import Settings
from bmkit.duplex.voice import Sampling
from bmkit.errors import InputError, ResourceError
from bmkit.runtime.cpu.load import load_decoder
from bmkit.runtime.speculation.static import StaticTarget
from bmkit.runtime.speculation.targets import DecoderTarget, ModelTarget, Target

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=2048, initializer_range=0.3
    ),
    "qwen2": Qwen2Config(**SIZES),
    "static": LlamaConfig(**SIZES),
}
WORDS = ["what", "is the", "capital", "of France", "and 4", "<idle>", "<|im_end|>", "🙂", "日本"]
NEVER = Policy(threshold=0.0, max_wait=None)
ALWAYS = Policy(threshold=1.1, max_wait=None)


class OneSpare:
    """A place that sessions take in turns."""

    def __init__(self, place: TargetPlace) -> None:
        self.place: Place | None = place
        self.taken = 0

    def take(self) -> Place | None:
        found, self.place = self.place, None
        self.taken += found is not None
        return found

    def give(self, place: Place) -> None:
        place.cut(0)
        self.place = place


class Bench:
    """A tiny model, its own code to compare with, and sessions on it."""

    def __init__(self, name: str, tokenizer: Any, folder: Path, *, scheme: str = "idle") -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<idle>", "<|u|>", "<|a|>"]})
        idle, user, agent = tokenizer.convert_tokens_to_ids(["<idle>", "<|u|>", "<|a|>"])
        named = ("listen", "think", "quiet", "yield", "answer", "continue")
        pairs = tuple((state, 370 + i) for i, state in enumerate(named))
        self.layout = Layout((user,), (agent,), idle, tokenizer.eos_token_id)
        if scheme == "state":
            self.layout = replace(self.layout, states=pairs)
        elif scheme == "minicpm":  # marks of several tokens that are text, and a beginning
            self.layout = Layout((30, 31, 32), (30, 33), idle, tokenizer.eos_token_id, (), (1,))
        self.tokenizer = tokenizer
        torch.manual_seed(3)
        self.model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
        self.target: Target
        if name == "llama":
            self.model.save_pretrained(folder)
            self.target = DecoderTarget(load_decoder(folder, threads=1), rows=5)
        elif name == "static":
            self.target = StaticTarget(self.model, 5)
        else:
            self.target = ModelTarget(self.model)
        self.lock = Lock()
        self.count = 0

    def session(
        self, settings: Settings | None = None, spares: Spares | None = None
    ) -> DuplexSession:
        place = TargetPlace(self.target, self.count % 4, self.lock)
        self.count += 1
        return DuplexSession(place, self.tokenizer, self.layout, settings, spares)

    def spares(self, number: int = 4) -> OneSpare:
        return OneSpare(TargetPlace(self.target, number, self.lock))

    def whole(self, ids: list[int]) -> Tensor:
        """Return the logits behind `ids`, read in one go by the model's own code."""
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        return logits.float()

    def check(self, session: DuplexSession) -> None:
        """Compare what the session says with the model's own code, and its log with its units."""
        assert session.place.ids == session.log[: len(session.place.ids)]
        fork = session.fork(TargetPlace(self.target, 3, self.lock))
        assert fork.log == session.log
        found, right = session.logits(), self.whole(session.log)
        assert (found - right).abs().max() <= 1e-4
        assert int(found.argmax()) == int(right.argmax())
        assert (fork.logits() - right).abs().max() <= 1e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tokenizer: Any, tmp_path: Path) -> Callable[..., Bench]:
    def make(name: str = "llama", **options: Any) -> Bench:
        return Bench(name, tokenizer, tmp_path / "model", **options)

    return make


def chance(random: Random) -> str | None:
    return (
        " ".join(random.choices(WORDS, k=random.randint(1, 5))) if random.random() < 0.4 else None
    )


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("scheme", ["idle", "state", "minicpm"])
@pytest.mark.parametrize(
    ("threshold", "ahead", "guesses"), [(None, 0, 0), (0.01, 0, 3), (0.01, 7, 0)]
)
def test_after_any_operation_it_says_what_the_model_says_of_the_whole_log(
    bench: Callable[..., Bench],
    name: str,
    scheme: str,
    threshold: float | None,
    ahead: int,
    guesses: int,
) -> None:
    made = bench(name, scheme=scheme)
    random = Random(f"{name} {scheme} {threshold}")
    policy = Policy(threshold=threshold, max_wait=2, sure=1.0)
    settings = Settings(
        agent_tokens=4, high=120, low=70, sinks=4, ahead=ahead, guesses=guesses, policy=policy
    )
    spares = made.spares()
    session = made.session(settings, spares)
    done: set[str] = set()
    for number in range(60):
        parts = (Words(number, text),) if (text := chance(random)) else ()
        agent = session.step(parts=parts)
        done |= {agent.decision, agent.reason} | ({"evicted"} if agent.evicted else set())
        assert len(session.log) <= 120
        made.check(session)
        what = random.random()
        if what < 0.15 and session.units and session.units[-1].answer:
            answer = session.units[-1].answer
            if session.truncate(answer, random.randint(0, 9)):
                done.add("truncate")
        elif what < 0.3 and session.revise(number - random.randint(0, 3), chance(random) or "so"):
            done.add("revise")
        else:
            continue
        made.check(session)
    assert {"evicted", "revise"} <= done
    assert done & {"speak"}
    assert (spares.taken > 1) == (ahead > 0)


def test_a_session_renders_as_its_model_was_trained(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=3, policy=Policy(threshold=0.003, max_wait=None)))
    random = Random(4)
    slices: list[Pair] = []
    for _ in range(60):
        text = chance(random)
        agent = session.step(text)
        user = session.units[-1].user if text else None
        slices.append(Pair(user, agent.ids or None))
    assert {bool(pair.agent) for pair in slices} == {True, False}
    assert session.log == rendered(made.layout, list(trained(slices))).ids
    assert [p.user for p in parsed(made.layout, session.log)] == [u.user for u in session.units]


def test_an_idle_slice_is_one_forward_and_what_ends_it_none(bench: Callable[..., Bench]) -> None:
    session = bench().session(Settings(agent_tokens=5, policy=NEVER))
    assert session.step("what is").forwards == 1
    assert session.step("the capital").forwards == 1
    session.settings = replace(session.settings, policy=ALWAYS)
    agent = session.step("of France")
    assert agent.forwards == len(agent.ids)


def test_a_thousand_idle_slices_leave_the_cache_as_it_was(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(policy=NEVER))
    session.step("what is it")
    first = session.step()
    for _ in range(1000):
        agent = session.step()
        assert (agent.kv_length, agent.p_idle) == (first.kv_length, first.p_idle)
    assert agent.slice == 1001 and len(session.units) == 2 and session.forwards == 2
    made.check(session)
    session.step("and then")
    assert len(session.units) == 3
    made.check(session)


def test_without_collapse_silence_stays_in_the_log(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(policy=NEVER, collapse_idle=False))
    for _ in range(5):
        session.step()
    made.check(session)
    assert len(session.units) == 5


@pytest.mark.parametrize("after", range(5))
def test_an_abort_stops_within_one_token(bench: Callable[..., Bench], after: int) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=8, policy=ALWAYS))
    free = made.session(Settings(agent_tokens=8, policy=ALWAYS)).step("what is it").ids
    assert len(free) > 5
    token = session.chooser.token

    def counting(logits: Tensor, said: list[int], *, number: int) -> int:
        if len(said) == after:
            thread = threading.Thread(target=session.abort)
            thread.start()
            thread.join()
        return token(logits, said, number=number)

    session.chooser.token = counting  # type: ignore[method-assign,assignment]
    agent = session.step("what is it")
    assert agent.interrupted and agent.ids == free[: after + 1]
    assert agent.epoch == 1
    made.check(session)
    assert not session.abort()  # there is nothing to stop
    session.chooser.token = token  # type: ignore[method-assign]
    assert not session.step("and then").interrupted


def test_an_abort_before_the_first_word_is_silence(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(policy=replace(ALWAYS, cooldown=2)))
    read = session.place.append

    def aborting(ids: list[int]) -> Tensor:
        found = read(ids)
        session.abort()
        return found

    session.place.append = aborting  # type: ignore[method-assign,assignment]
    agent = session.step("what is it")
    assert (agent.decision, agent.reason, agent.ids) == ("listen", "abort", ())
    session.place.append = read  # type: ignore[method-assign]
    assert [session.step(f"{i}").reason for i in range(3)] == ["cooldown", "cooldown", "threshold"]
    made.check(session)


def test_an_agent_that_was_hushed_is_silent_until_the_users_next_words(
    bench: Callable[..., Bench],
) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=4, policy=replace(ALWAYS, max_wait=1, sure=2.0)))
    said = session.step("what is it")
    session.hush()
    session.truncate(1, len(said.text) // 2)  # as a client does that has played so much
    found = [session.step() for _ in range(5)]
    assert {(a.decision, a.reason, a.ids) for a in found} == {("listen", "cooldown", ())}
    other = session.fork(made.session().place)
    assert other.step().reason == "cooldown"
    heard = session.step("and then")
    assert heard.decision == "speak" and heard.answer == 2
    assert session.step().decision == "speak"
    made.check(session)


def test_a_capital_behind_a_letter_over_the_users_words_is_another_answer(
    bench: Callable[..., Bench],
) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=4, policy=ALWAYS))
    session.step("what is it")

    def anew(before: str, text: str) -> bool:
        agent = tuple(made.tokenizer.encode(before, add_special_tokens=False))
        session.units[-1] = replace(session.units[-1], agent=agent)
        return session._begins_anew(made.tokenizer.encode(text, add_special_tokens=False)[0])

    assert anew("the leaves of the", "It is")
    assert not anew("the leaves of the", " It is")
    assert not anew("the leaves of the", "re is")
    assert not anew("the leaves.", "It is")
    assert not session._begins_anew(made.layout.end)


def test_what_was_not_delivered_is_forgotten(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=4, policy=ALWAYS))
    agents = [session.step("what is it"), session.step(), session.step()]
    whole = "".join(agent.text for agent in agents)
    assert {agent.answer for agent in agents} == {1}
    ids = [token for agent in agents for token in agent.ids]
    delivered = len(agents[0].text) + len(agents[1].text) // 2
    gone = session.truncate(1, delivered)
    left = [token for unit in session.units for token in unit.agent or ()]
    assert gone > 0 and left == ids[: len(ids) - gone]
    text = made.tokenizer.decode(left)
    assert whole.startswith(text) and len(text) <= delivered
    assert len(text) + 8 > delivered  # a token is short
    made.check(session)
    assert session.step("and").answer == 2


def test_a_missed_query_is_answered_where_it_ended(bench: Callable[..., Bench]) -> None:
    made = bench()
    silent = Settings(agent_tokens=4, policy=replace(NEVER, max_wait=2, sure=1.0))
    session = made.session(silent)
    session.step("what is")
    session.step("the capital")
    assert session.step().decision == "listen"
    agent = session.step()
    assert (agent.decision, agent.reason, agent.rewound) == ("speak", "max_wait", 2)
    right = made.session(replace(silent, policy=NEVER))
    right.step("what is")
    right.settings = replace(silent, policy=ALWAYS)
    assert right.step("the capital").ids == agent.ids
    assert right.log == session.log
    made.check(session)


def test_an_agent_that_was_sure_of_silence_stays_silent(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(policy=replace(NEVER, max_wait=2, sure=0.0)))
    session.step("stop it")
    agents = [session.step() for _ in range(4)]
    assert {agent.decision for agent in agents} == {"listen"}
    made.check(session)


def test_max_wait_can_speak_in_the_present_slice(bench: Callable[..., Bench]) -> None:
    made = bench()
    policy = Policy(threshold=0.0, max_wait=2, on_max_wait="speak", sure=1.0)
    session = made.session(Settings(policy=policy))
    session.step("what is it")
    assert [session.step().reason for _ in range(2)] == ["threshold", "max_wait"]
    assert [unit.agent is None for unit in session.units] == [True, False]
    made.check(session)


def test_words_that_turn_out_to_be_others_are_replayed(bench: Callable[..., Bench]) -> None:
    made = bench()
    settings = Settings(agent_tokens=3, policy=NEVER, revisable=3)
    session, right = made.session(settings), made.session(settings)
    for number, (text, other) in enumerate([("it is", "it is"), ("what", "that"), ("4", "4")]):
        session.step(parts=(Words(number, text),))
        right.step(other)
    assert session.revise(1, "that")
    assert session.log == right.log
    made.check(session)
    assert not session.revise(-1, "never said")
    for _ in range(3):
        session.step("and")
    assert not session.revise(1, "what")
    assert session.ignored == 2


def test_a_revision_keeps_its_words_in_their_slices(bench: Callable[..., Bench]) -> None:
    session = bench().session(Settings(policy=NEVER))
    session.step(parts=(Words(0, "what is"),))
    session.step(parts=(Words(0, "the"), Words(9, "so")))
    assert session.revise(0, "that was the capital of France")
    heard = [[part.text for part in unit.parts] for unit in session.units]
    assert heard == [["that was"], ["the capital of France", "so"]]


def test_no_control_token_comes_out_of_either_side(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=6, policy=ALWAYS))
    for _ in range(12):
        session.step("say <idle> <|a|> <|u|> <|im_end|> 🙂")
    control = made.layout.control | set(made.tokenizer.all_special_ids)
    for unit in session.units:
        assert not control & {*(unit.user or ()), *(unit.agent or ())}
    assert session.slices == len(parsed(made.layout, session.log)) == 12


def test_a_character_of_several_tokens_appears_with_its_last(bench: Callable[..., Bench]) -> None:
    made = bench()
    ids = made.tokenizer("it is 🙂 日本 so", add_special_tokens=False)["input_ids"]
    session = made.session(Settings(agent_tokens=3, policy=ALWAYS))
    left = list(ids)
    session.chooser.token = lambda *_, **__: left.pop(0)  # type: ignore[method-assign]
    deltas: list[str] = []
    said = []
    while len(left) >= 3:
        said.append(session.step(write=deltas.append))
    assert "".join(deltas) == "".join(agent.text for agent in said)
    assert "".join(deltas) == made.tokenizer.decode(ids[: 3 * len(said)]).rstrip("\ufffd")
    assert all("\ufffd" not in delta for delta in deltas)


def test_a_long_session_stays_within_its_room(bench: Callable[..., Bench]) -> None:
    made = bench("gpt2")
    settings = Settings(agent_tokens=5, high=96, low=64, policy=Policy(threshold=0.004))
    session = made.session(settings)
    random = Random(1)
    longest = 0
    for _ in range(400):
        agent = session.step(chance(random))
        longest = max(longest, len(session.log), agent.kv_length)
    made.check(session)
    assert longest <= 96 and session.evicted > 1000
    assert session.units[0].number == 0  # the beginning stays


@pytest.mark.parametrize("name", ["llama", "gpt2", "static"])
def test_a_session_that_forgets_reads_little_in_each_slice(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = bench(name)
    read: list[int] = []
    append = TargetPlace.append

    def counted(self: TargetPlace, ids: Sequence[int]) -> Tensor:
        read[-1] += len(ids)
        return append(self, ids)

    monkeypatch.setattr(TargetPlace, "append", counted)
    most = {}
    for ahead in (0, 64):
        policy = Policy(threshold=0.004, max_wait=None)
        settings = Settings(agent_tokens=5, high=700, low=200, ahead=ahead, policy=policy)
        session = made.session(settings, made.spares())
        random = Random(3)
        read.clear()
        longest = 0
        for _ in range(300):
            read.append(0)
            agent = session.step(chance(random))
            longest = max(longest, len(session.log), agent.kv_length)
        most[ahead] = max(read)
        assert longest <= 700 and session.evicted > 400
        made.check(session)
    assert most[0] > 150
    assert most[64] < 64 + 70, "words of a slice, some tokens each, and what is read ahead"


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_guesses_change_nothing_but_the_number_of_forwards(
    bench: Callable[..., Bench], name: str, temperature: float
) -> None:
    made = bench(name)
    how = Sampling(temperature=temperature, seed=4)
    settings = Settings(agent_tokens=8, policy=replace(ALWAYS, cooldown=0), sampling=how)
    plain, guessing = made.session(settings), made.session(replace(settings, guesses=4))
    texts = ["what is it" if number % 4 == 0 else None for number in range(40)]
    expected = [plain.step(text) for text in texts]
    for one in expected[::2]:  # a model that hasn't learned to speak seldom repeats itself
        guessing.guesses.note(one.ids)
    for text, one in zip(texts, expected, strict=True):
        other = guessing.step(text)
        assert one.ids == other.ids and one.text == other.text
        assert abs(one.p_idle - other.p_idle) < 1e-5
        assert other.forwards <= one.forwards
    tried, right = guessing.guesses.tried, guessing.guesses.right
    assert 40 < right <= tried
    assert guessing.forwards == plain.forwards - right
    made.check(guessing)


def test_a_slice_that_is_stopped_among_guesses_ends_there(bench: Callable[..., Bench]) -> None:
    made = bench("gpt2")
    settings = Settings(agent_tokens=8, policy=ALWAYS, guesses=6)
    session = made.session(settings)
    free = made.session(replace(settings, guesses=0)).step("what is it")
    session.guesses.note(free.ids)
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if len(seen) == 2:
            session.abort()

    agent = session.step("what is it", write=write)
    assert session.guesses.tried > session.guesses.right, "nothing is left that was guessed"
    assert agent.interrupted and agent.ids == free.ids[: len(agent.ids)] and len(agent.ids) < 6
    made.check(session)


def test_what_is_being_forgotten_is_left_at_once_where_it_gets_too_much(
    bench: Callable[..., Bench],
) -> None:
    made = bench()
    spares = made.spares()
    settings = Settings(agent_tokens=5, high=160, low=100, ahead=1, policy=ALWAYS)
    session = made.session(settings, spares)
    for _ in range(80):
        session.step("what is the capital")
        assert len(session.log) <= 160
        made.check(session)
    assert session.evicted > 300 and spares.taken > 2


def test_sessions_take_turns_at_the_spare_place(bench: Callable[..., Bench]) -> None:
    made = bench()
    spares = made.spares()
    settings = Settings(agent_tokens=5, high=160, low=100, ahead=8, policy=ALWAYS)
    sessions = [made.session(settings, spares) for _ in range(3)]
    alone = made.session(settings, made.spares(4))
    for _ in range(60):
        for session in sessions:
            session.step("what is the capital")
        assert len({session.place for session in sessions}) == 3
        assert len({session.place.number for session in sessions}) == 3  # type: ignore[attr-defined]
        for session in sessions:
            assert len(session.log) <= 160
            made.check(session)
    assert alone.evicted == 0
    assert all(session.evicted > 300 for session in sessions)


def test_more_words_than_there_is_room_for_are_cut_to_the_last(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=5, high=96, low=64, policy=ALWAYS))
    session.step("so")
    agent = session.step(" ".join(["what is it"] * 60))
    assert agent.cut > 0 and len(session.log) <= 96
    made.check(session)


@pytest.mark.parametrize(("temperature", "ahead"), [(0.0, 0), (1.0, 0), (0.0, 5)])
@pytest.mark.parametrize("slices", [40, 43, 46])
def test_a_killed_session_goes_on_as_if_nothing_had_happened(
    bench: Callable[..., Bench], tmp_path: Path, temperature: float, ahead: int, slices: int
) -> None:
    made = bench()
    policy = Policy(threshold=0.004, max_wait=2, sure=1.0)
    how = Sampling(temperature=temperature, seed=5)
    settings = Settings(agent_tokens=4, high=120, low=70, ahead=ahead, policy=policy, sampling=how)
    session = made.session(settings, made.spares())
    journal = Journal.begin(tmp_path / "kept", session, {"model": "m"})
    random = Random(2)
    for number in range(slices):
        journal.note(session.step(parts=(Words(number, chance(random) or ""),)))
        if number % 9 == 8:
            session.revise(number - 1, "capital")
            journal.note()
    with (tmp_path / "kept" / LOG).open("a") as stream:
        stream.write('{"keep": [[0, 3')  # the next line, half written
    again = made.session(settings, made.spares(2))
    Journal.resume(tmp_path / "kept", again, {"model": "m"})
    assert again.log == session.log and again.counters() == session.counters()
    made.check(again)
    for _ in range(20):
        text = chance(random)
        one, other = session.step(text), again.step(text)
        assert one == replace(other, forwards=one.forwards, p_idle=one.p_idle)
        assert abs(one.p_idle - other.p_idle) < 1e-5


def test_a_resumed_session_can_be_killed_again(bench: Callable[..., Bench], tmp_path: Path) -> None:
    made = bench()
    session = made.session()
    Journal.begin(tmp_path / "kept", session, {}).note(session.step("it is"))
    second = made.session()
    journal = Journal.resume(tmp_path / "kept", second, {})
    journal.note(second.step("and then"))
    third = made.session()
    Journal.resume(tmp_path / "kept", third, {})
    assert third.log == second.log


def test_a_session_of_another_model_is_not_resumed(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    made = bench()
    Journal.begin(tmp_path / "kept", made.session(), {"model": "one"})
    with pytest.raises(InputError, match="another `model`"):
        Journal.resume(tmp_path / "kept", made.session(), {"model": "other"})
    with pytest.raises(InputError, match="holds a session"):
        Journal.begin(tmp_path / "kept", made.session(), {"model": "one"})
    (tmp_path / "kept" / LOG).write_text("{}\n")
    with pytest.raises(InputError, match="damaged"):
        Journal.resume(tmp_path / "kept", made.session(), {"model": "one"})


def test_sessions_at_one_model_know_nothing_of_each_other(bench: Callable[..., Bench]) -> None:
    made = bench()
    settings = Settings(agent_tokens=4, policy=Policy(threshold=0.004))
    texts = [[chance(Random(f"{who} {i}")) for i in range(25)] for who in range(3)]
    alone: list[list[AgentSlice]] = []
    for mine in texts:
        session = made.session(settings)
        alone.append([session.step(text) for text in mine])
        made.count = 0
    sessions = [made.session(settings) for _ in texts]
    found: list[list[AgentSlice]] = [[], [], []]

    def run(who: int) -> None:
        for text in texts[who]:
            found[who].append(sessions[who].step(text))

    threads = [threading.Thread(target=run, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, together in zip(alone, found, strict=True):
        assert [(a.ids, a.text, a.reason) for a in mine] == [
            (a.ids, a.text, a.reason) for a in together
        ]
        assert all(abs(a.p_idle - b.p_idle) < 1e-5 for a, b in zip(mine, together, strict=True))
    for session in sessions:
        made.check(session)


def test_a_slice_as_json_has_no_time_of_this_machine(bench: Callable[..., Bench]) -> None:
    agent = bench().session(Settings(policy=ALWAYS)).step("what is it")
    assert json.loads(json.dumps(agent.values()))["decision"] == "speak"
    assert not {"seconds", "slice_ms", "ms"} & set(agent.values())


def test_going_back_keeps_what_the_cache_shares(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=4, policy=ALWAYS))
    for text in ("what is", "the capital", "of France"):
        session.step(text)
    units, counters = list(session.units), session.counters()
    log, held = list(session.log), len(session.place.ids)
    agents = [session.step(text) for text in ("and 4", None)]
    session.restore(units, counters)
    assert session.log == log and len(session.place.ids) >= held
    made.check(session)
    session.restore(units, counters)
    again = [session.step(text) for text in ("and 4", None)]
    assert [(a.ids, a.text, a.epoch) for a in again] == [(a.ids, a.text, a.epoch) for a in agents]


def test_a_slice_that_fails_has_not_begun(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(agent_tokens=6, policy=ALWAYS))
    session.step("what is")
    log, counters = list(session.log), session.counters()
    token, calls = session.chooser.token, [0]

    def failing(logits: Tensor, said: list[int], *, number: int) -> int:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return token(logits, said, number=number)

    session.chooser.token = failing  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        session.step("the capital")
    assert session.log == log and session.counters() == counters
    made.check(session)
    right = made.session(session.settings)
    right.step("what is")
    assert session.step("the capital") == replace(right.step("the capital"), forwards=6)


def test_what_was_delivered_counts_from_the_beginning_of_an_answer(
    bench: Callable[..., Bench],
) -> None:
    made = bench()
    settings = Settings(agent_tokens=5, high=70, low=40, sinks=0, policy=ALWAYS)
    session = made.session(settings)
    whole = "".join(session.step().text for _ in range(12))
    assert session.evicted and session.units[0].before
    last = session.units[-1]
    session.truncate(1, last.before + 2)
    left = [token for unit in session.units for token in unit.agent or ()]
    kept_text = made.tokenizer.decode(left)
    delivered = whole[: last.before + 2]
    assert kept_text in delivered[-len(kept_text) - 8 :]  # all but a part of a token
    assert len(kept_text) >= last.before - session.units[0].before
    made.check(session)


def test_a_session_that_may_not_forget_ends_when_it_is_full(bench: Callable[..., Bench]) -> None:
    made = bench()
    session = made.session(Settings(high=60, low=40, evicts=False, policy=NEVER))
    with pytest.raises(ResourceError, match="full"):
        for _ in range(30):
            session.step("what is it")
    assert len(session.log) <= 60
    made.check(session)


def test_an_interrupted_answer_does_not_go_on_after_a_crash(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    made = bench()
    settings = Settings(agent_tokens=5, high=70, low=40, sinks=0, policy=ALWAYS)
    session = made.session(settings)
    journal = Journal.begin(tmp_path / "kept", session, {})
    for _ in range(12):
        journal.note(session.step())
    going = made.session(settings)
    Journal.resume(tmp_path / "kept", going, {})
    session.truncate(1, session.units[-1].before + 1)
    journal.note()
    stopped = made.session(settings)
    Journal.resume(tmp_path / "kept", stopped, {})
    assert (going.step().answer, stopped.step().answer, session.step().answer) == (1, 2, 2)
    assert stopped.units[-1].before == session.units[-1].before == 0
    assert going.units[-1].before > going.units[0].before > 0
