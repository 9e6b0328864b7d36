"""`play` in the manner of TRL's trainers: a script that fine-tunes with TRL changes three lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sparring.commands.export import export_model
from sparring.loop import play
from sparring.run.in_memory import Rows
from sparring.run.results import Results

RECIPE_KEYS = {
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "train.max_length",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "seed": "seed",
}
"""TRL's names of settings that a recipe has too."""


@dataclass(kw_only=True)
class SelfPlayConfig:
    """The settings of `SelfPlayTrainer`, under TRL's names. None: the recipe's default, which may not be TRL's."""

    output_dir: str | Path
    """The run directory."""
    method: str | Mapping[str, object] = "space"
    per_device_train_batch_size: int | None = None
    """Times gradient_accumulation_steps: the examples of an optimizer step, over all devices."""
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    num_train_epochs: float | None = None
    """Of each iteration."""
    lr_scheduler_type: str | None = None
    warmup_steps: float | None = None
    """A fraction of all steps, below 1."""
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_length: int | None = None
    gradient_checkpointing: bool | None = None
    seed: int | None = None
    recipe: Mapping[str, object] = field(default_factory=dict[str, object])
    """All other settings, under the recipe's dotted keys, such as {"iterations": 3, "generate.max_new_tokens": 128}."""

    def overrides(self) -> dict[str, object]:
        """The settings under the recipe's keys."""
        found = {key: getattr(self, name) for name, key in RECIPE_KEYS.items() if getattr(self, name) is not None}
        if self.per_device_train_batch_size is not None:
            found["train.batch_size"] = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return {**found, **self.recipe}


class SelfPlayTrainer:
    """A cover over `play`, with the constructor and the methods that scripts for TRL's SFTTrainer call."""

    def __init__(
        self,
        model: str | Path,
        args: SelfPlayConfig,
        train_dataset: Rows,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.args, self.processing_class = model, args, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset

    def train(self) -> Results:
        """Plays, or continues what an earlier process played in `output_dir`. Raises what `play` raises."""
        return play(
            run_dir=self.args.output_dir,
            overrides=self.args.overrides(),
            model=self.model,
            method=self.args.method,
            train=self.train_dataset,
            held_out=self.eval_dataset,
            tokenizer=self.processing_class,
        )

    def save_model(self, output_dir: str | Path) -> None:
        """Writes the best iteration's model and tokenizer to a new folder. Raises `UserError` if the start is best."""
        export_model(Results(self.args.output_dir), Path(output_dir))
