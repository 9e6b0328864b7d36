"""Uploads an exported folder to the Hub: private by default, known files only, and no secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sparring.data.tables import read_table
from sparring.errors import RunError, UserError
from sparring.run.manifest import MANIFEST, failpoint, verify

ALLOWED = (
    "README.md",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template.jinja",
    "iteration-*.parquet",
)

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


def push_folder(folder: Path, repo: str, *, is_public: bool = False) -> list[Path]:
    """Uploads an exported folder; returns the uploaded files. Refuses a folder that contains a secret."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} was not made by 'sparring export'. Export to a new folder first.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push {repo}: not a repository name. Write OWNER/NAME.")
    verify(folder)
    files = sorted({file for pattern in ALLOWED for file in folder.glob(pattern) if file.is_file()})
    if problems := [problem for file in files for problem in find_problems(file)]:
        raise UserError("Nothing was uploaded:\n  " + "\n  ".join(problems))
    upload(folder, repo, files, is_public)
    return files


def find_problems(file: Path) -> Iterator[str]:
    """Yields secrets and local folders in the text of a file."""
    for number, line in enumerate(_lines(file), start=1):
        for name, pattern in SECRETS.items():
            if re.search(pattern, line):
                yield f"{file.name}, line {number}: {name}"
        if file.name == "adapter_config.json" and re.search(r'"base_model_name_or_path": "/', line):
            yield f"{file.name}, line {number}: the base model is a local folder. Export with --merge"


def _lines(file: Path) -> Iterator[str]:
    if file.suffix == ".safetensors":
        return  # weights are not text
    if file.suffix == ".parquet":
        for row in read_table(file).to_pylist():
            yield " ".join(str(value) for value in row.values())
        return
    yield from file.read_text(encoding="utf-8", errors="replace").splitlines()


def upload(folder: Path, repo: str, files: list[Path], is_public: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, whichever huggingface_hub uses
    )

    kind = "dataset" if any(file.suffix == ".parquet" for file in files) else "model"
    api = HfApi()
    try:
        api.create_repo(repo, repo_type=kind, private=not is_public, exist_ok=True)
        if not is_public and not api.repo_info(repo, repo_type=kind).private:
            raise UserError(
                f"Nothing was uploaded: '{repo}' exists already and is public. Add --public, or choose another name."
            )
        failpoint("before-upload")
        api.upload_folder(
            repo_id=repo, repo_type=kind, folder_path=folder, allow_patterns=[file.name for file in files]
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"The Hub rejected '{repo}': {error}. Log in with 'hf auth login'.") from error
    except HTTPError as error:
        raise RunError(
            f"The Hub cannot be reached: {error}. Nothing was uploaded; the same command tries again."
        ) from error
