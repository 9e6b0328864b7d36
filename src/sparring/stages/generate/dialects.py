"""The two ways in which servers take and return token ids: vLLM's, and llama.cpp's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from sparring.types import Prompt

Body = dict[str, Any]


@dataclass(frozen=True)
class Vllm:
    """OpenAI's completions with `return_token_ids`: vLLM from 0.10.2 on."""

    model: str
    end_ids: Sequence[int]
    top_p: float
    path = "/v1/completions"

    def request(self, prompt: Prompt, temperature: float, is_checked: bool) -> Body:
        return {
            "model": self.model,
            "prompt": prompt.token_ids.tolist(),
            "max_tokens": prompt.max_new_tokens,
            "temperature": temperature,
            "top_p": self.top_p,
            "seed": prompt.seed % 2**63,
            "stop_token_ids": list(self.end_ids),
            "ignore_eos": True,  # end_ids has every end token
            "return_token_ids": True,
            "logprobs": 0 if is_checked else None,  # 0: of the drawn token alone
        }

    def understood(self, prompt: Prompt, reply: Any) -> bool:
        choice = reply["choices"][0] if "choices" in reply else {}
        return choice.get("prompt_token_ids") == prompt.token_ids.tolist() and bool(choice.get("token_ids"))

    def drawn(self, reply: Any) -> tuple[Int[np.ndarray, " steps"], float | None]:
        """Token ids, and the sum of their log-probs in nats if it was asked for."""
        choice = reply["choices"][0]
        reported = (choice.get("logprobs") or {}).get("token_logprobs")
        return np.array(choice["token_ids"]), sum(reported) if reported else None


@dataclass(frozen=True)
class LlamaCpp:
    """llama-server's own `/completion` with `return_tokens`. It ends at the end tokens that its GGUF file names."""

    model: str
    end_ids: Sequence[int]
    top_p: float
    path = "/completion"

    def request(self, prompt: Prompt, temperature: float, is_checked: bool) -> Body:
        return {
            "prompt": prompt.token_ids.tolist(),
            "n_predict": prompt.max_new_tokens,
            "samplers": ["temperature", "top_p"],  # none of its own: by default it draws from the 40 likeliest tokens
            "temperature": temperature,
            "top_p": self.top_p,
            "seed": prompt.seed % (2**32 - 1),  # 32 bits, and the largest stands for "any"
            "cache_prompt": False,  # with it, an answer depends on what was asked before
            "return_tokens": True,
            "n_probs": 1 if is_checked else 0,
        }

    def understood(self, prompt: Prompt, reply: Any) -> bool:
        # one more than was sent: a begin token that the training does not see
        return reply.get("tokens_evaluated") == len(prompt.token_ids) and bool(reply.get("tokens"))

    def drawn(self, reply: Any) -> tuple[Int[np.ndarray, " steps"], float | None]:
        tokens = np.array(reply["tokens"], dtype=np.int64)
        if reply["stop_type"] == "eos" and tokens[-1] not in self.end_ids:
            raise ValueError(f"it ended an answer with token {tokens[-1]}, which ends none here")
        reported = reply.get("completion_probabilities")
        return tokens, sum(entry["logprob"] for entry in reported) if reported else None


DIALECTS = (Vllm, LlamaCpp)
