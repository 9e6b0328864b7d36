"""The data types that stages exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor

Role = Literal["real", "generated", "proto", "rejected"]
"""Where a response comes from: the data set, the opponent, the model that the run started from, or the rejected side of
the user's preference pairs."""

Finish = Literal["stop", "length", "failed"]
"""How a response ends: with its end token, or truncated at a length limit, without one. "failed": the engine could not
answer the prompt; such a generation never leaves the generate stage."""

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]

TokenIds = Int[np.ndarray, " _"]
Candidates = Int[np.ndarray, "_ _"]
"""Token ids, [tokens of a response, candidates]."""

Scores = Mapping[Role, Float[Tensor, "..."]]
"""log p(response | prompt) in nats, summed over response tokens.
`generated`: shape [batch, samples]; the others: shape [batch]. Of a role in `Needs.per_token`: not summed, with a last
dimension for tokens, padded with 0. With a teacher another dimension follows: of the response's token, and of each of
the teacher's candidates in its place."""

Lengths = Mapping[Role, Int[Tensor, "..."]]
"""Number of response tokens, in the shapes of `Scores`."""


class Message(dict[str, Any]):
    """One turn of a conversation: {"role": "system" | "user" | "assistant" | "tool", "content": text}.

    An assistant turn may also have `reasoning_content` (its thought) and `tool_calls`; with calls, content may be None.
    """


@dataclass(frozen=True)
class Example:
    """One row of supervised data. `messages` ends with the assistant turn that is the real answer."""

    id: str  # hash of the content, so it survives reordering; the key of every join
    row: int  # in the user's file, from 1
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas, as `apply_chat_template` takes them
    rejected: Message | None = None  # of preference data: the worse response to the same prompt
    left_out: tuple[str, ...] = ()  # what the row has and no template is given
    source: Mapping[str, object] = field(default_factory=dict[str, object])  # the user's row, with the user's columns

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"] or ""


@dataclass(frozen=True)
class Rendered:
    """An example as token ids. Every stage uses these ids; no text is tokenized twice."""

    id: str
    row: int
    prompt_ids: TokenIds
    real_ids: TokenIds
    real_finish: Finish
    prompt: str  # for people and checkers only
    real: str
    rejected_ids: TokenIds = field(default_factory=lambda: np.empty(0, dtype=np.int32))  # empty without one
    prompt_key: str = ""  # the same for all rows of a prompt, which are not independent
    source: str = ""  # the user's row as JSON, for checkers and exports
    left_out: tuple[str, ...] = ()  # what of the example is in no token; counted by the data stage, not stored


@dataclass(frozen=True)
class Prompt:
    """A request for one sample, which is a function of these fields and the model."""

    id: str
    sample: int
    token_ids: TokenIds
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Generation:
    """One sample. With `finish` "stop" its last token is an end token."""

    id: str
    sample: int
    token_ids: TokenIds
    finish: Finish
    logprob: float | None = None  # as the engine reports it: compared with the scorer, never trained on


@dataclass(frozen=True)
class Group:
    """A prompt and its responses by role: the unit of scoring and of training."""

    id: str
    prompt_ids: TokenIds
    responses: Mapping[Role, tuple[TokenIds, ...]]
    candidates: Mapping[Role, tuple[Candidates, ...]] = field(default_factory=dict[Role, tuple["Candidates", ...]])
    """Of roles that a teacher reads: the tokens that it finds likeliest in place of each token of a response."""


@dataclass(frozen=True)
class TrainingExample:
    """A group, and the opponent's log-probs of its responses: {} if the objective reads none.

    A teacher's have the shape [samples, tokens, 1 + candidates], padded with 0.
    """

    group: Group
    opponent: Mapping[Role, Float[np.ndarray, ...]]


@dataclass(frozen=True)
class Loss:
    """Loss and metrics per example, not reduced."""

    per_example: Float[Tensor, " batch"]
    metrics: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict[str, Tensor])


class Teacher(NamedTuple):
    """The opponent, shown the real response in its prompt."""

    prompt: str  # a text with {prompt} and {response}, in place of the last user turn
    candidates: int  # how many of its likeliest tokens the objective reads at each token of a generated response


class Needs(NamedTuple):
    """What an objective reads, given its coefficients. Nothing else is computed for it."""

    roles: tuple[Role, ...]
    opponent: bool  # the opponent's log-probs
    rounds: int  # how many iterations' generated responses it trains on (SPIN: those of t and t-1)
    first_round: Mapping[str, float] = {}  # coefficients in the objective's own first iteration
    per_token: tuple[Role, ...] = ()  # roles whose policy log-probs the objective reads token by token
    accepted: bool = False  # the opponent's responses that evaluate.checker accepts take the place of the real ones
    teacher: Teacher | None = None  # whose log-probs of the generated responses are read as the opponent's


@runtime_checkable
class Objective(Protocol):
    """A training objective: a pure function from log-probs to a loss per example."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    @property
    def start_loss(self) -> float | None:
        """The loss while policy and opponent are the same model; None if it depends on the data."""
        ...

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss: ...

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        """The objective's reward of a response, elementwise over any shape."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Samples responses: token ids in, token ids out, in the order of the prompts."""

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]: ...


OpenBackend = Callable[[Path], AbstractContextManager[Backend]]
"""Opens an engine for the model in a folder. Leaving the context frees its memory."""
