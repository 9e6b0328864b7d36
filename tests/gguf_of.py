"""MODEL_FOLDER -> GGUF, by llama.cpp's converter, with a vocabulary that names ids: the tests ask by id alone.

    python tests/gguf_of.py LLAMA_FOLDER MODEL_FOLDER OUT.gguf

The converter knows the tokenizers of published models, and refuses those that the tests make.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

llama, model, target = map(Path, sys.argv[1:])
sys.path[:0] = [str(llama / "llama.cpp"), str(llama / "llama.cpp" / "gguf-py"), str(llama / "python")]

import convert_hf_to_gguf  # pyright: ignore[reportMissingImports]
import gguf  # pyright: ignore[reportMissingImports]
from conversion.llama import LlamaModel  # pyright: ignore[reportMissingImports]

END = json.loads((model / "config.json").read_text())["eos_token_id"]


def set_vocab(self: LlamaModel) -> None:
    size = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_token_list([f"<{i}>" for i in range(size)])
    self.gguf_writer.add_token_scores([0.0] * size)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    self.gguf_writer.add_token_types([control if i == END else normal for i in range(size)])
    self.gguf_writer.add_eos_token_id(END)
    self.gguf_writer.add_add_bos_token(False)


LlamaModel.set_vocab = set_vocab
sys.argv[1:] = [str(model), "--outfile", str(target), "--outtype", "f32"]
convert_hf_to_gguf.main()
