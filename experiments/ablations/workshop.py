"""Makes the model of every arm, and makes what arms have in common once.

What was made lies in a folder, named by a hash of all that it depends on: scores of heads, costs of
windows, indexers of stage 1, weights of stage 2, refreshed indexers, and the teacher's targets.
Trainings keep checkpoints there, and go on from them.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ablations.arms import Arm, Text
from ablations.divergence_shares import SHARES, divergence_shares
from ablations.head_choice import chosen_map
from ablations.plan import shrunk
from ablations.whole_vocabulary import whole_vocabulary
from ablations.windows import dealt_windows, ladder, use_windows, window_costs
from rtpurbo.calibration.calibrate import Calibration, calibrate
from rtpurbo.calibration.selection import Scores, Stability
from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig, head_map_from_dict
from rtpurbo.data.texts import TextCorpus, begin_ids, load_texts
from rtpurbo.files import save_tensors_atomically, whole_folder, write_json_atomically
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.models.sparse_layers import indexer_weights, is_sparse, load_indexers
from rtpurbo.models.sparsify import resolve_indexer_settings, restore, sparsify
from rtpurbo.models.stage2_weights import apply_stage2, read_tensors
from rtpurbo.settings import (
    ConversionSettings,
    IndexerTrainingSettings,
    Progress,
    change_settings,
    no_progress,
)
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.sequences import TrainingMix
from rtpurbo.training.stage1 import train_indexers
from rtpurbo.training.stage2 import distill

NUM_WINDOW_TEXTS = 3
BASE_WEIGHTS = "base"


@dataclass
class Workshop:
    """Models on demand.

    Attributes:
        model: name or folder of the dense model.
        data: texts to train on; held-out parts are not touched.
        folder: where what is made lies.
        settings: the conversion that arms depart from.
        device: where to work.
        smoke: hardly any training, whatever the settings say.
        progress: told after each step of a training.
    """

    model: str | None
    data: list[str] | None
    folder: Path
    settings: ConversionSettings
    device: torch.device
    smoke: bool = False
    progress: Progress = no_progress
    _base: BaseModel | None = field(default=None, repr=False)
    _weights: str = BASE_WEIGHTS

    def __post_init__(self) -> None:
        self.train_text = load_texts(self.data, "train")
        self.held_out = load_texts(self.data, "heldout")

    def dense(self) -> BaseModel:
        """The dense model with its own weights."""
        base = self._with_weights(BASE_WEIGHTS)
        if is_sparse(base.model):
            restore(base.model)
        return base

    def settings_of(self, arm: Arm) -> ConversionSettings:
        """The arm's conversion."""
        settings = change_settings(self.settings, arm.changes)
        return shrunk(settings) if self.smoke else settings

    def calibration(self, settings: ConversionSettings, text: Text = "train") -> Calibration:
        """A head map and its stability; scores are measured once for each length and text."""
        wanted = settings.calibration
        measured = {"length": wanted.length, "num_documents": wanted.num_documents}
        if wanted.ranking != "induction":
            measured["ranking"] = wanted.ranking
        path = self._path("scores", ".json", measured, text, settings.seed)
        if not path.is_file():
            base = self.dense()
            found = calibrate(
                base.model, base.tokenizer, self.corpus(text), wanted, seed=settings.seed,
                progress=self.progress,
            )  # fmt: skip
            write_json_atomically(path, found.to_dict())
        kept = json.loads(path.read_text(encoding="utf-8"))
        stability = kept["stability"] and Stability(**kept["stability"])
        return Calibration(head_map_from_dict(kept["head_map"]), stability)

    def corpus(self, text: Text) -> TextCorpus:
        """One of the texts that maps are measured on."""
        if text == "python":
            return load_texts(None, "train")
        return self.train_text if text == "train" else self.held_out

    def head_map(self, arm: Arm) -> HeadMap:
        """The arm's choice of heads."""
        settings = self.settings_of(arm)
        found = self.calibration(settings).head_map
        return chosen_map(
            self.divergence_shares(settings) if arm.choice == "divergence" else found.scores,
            found.num_key_value_heads,
            settings.calibration,
            arm.choice,
            settings.seed,
        )

    def divergence_shares(self, settings: ConversionSettings) -> Scores:
        """What each head's window costs answers, measured on as many sequences as calibration has documents."""
        rule, wanted = self._rule(settings), settings.calibration
        near = (rule.num_sink_tokens, rule.sliding_window)
        path = self._path(
            "divergence", ".json", near, wanted.length, wanted.num_documents, settings.seed
        )
        if not path.is_file():
            base = self.dense()
            mix = TrainingMix(
                base.tokenizer, self.train_text, (wanted.length,), SHARES, settings.seed,
                "divergence",
            )  # fmt: skip
            write_json_atomically(
                path, divergence_shares(base.model, mix, wanted.num_documents, rule)
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def windows(self, arm: Arm) -> list[list[int] | None] | None:
        """A window a head, or None where one serves all."""
        if arm.windows == "one":
            return None
        settings = self.settings_of(arm)
        rule = self._rule(settings)
        sizes = ladder(settings.calibration.length)
        path = self._path("windows", ".json", sizes, rule.num_sink_tokens, settings.seed)
        if not path.is_file():
            base = self.dense()
            start, length = begin_ids(base.tokenizer), settings.calibration.length
            texts = [
                start
                + self.train_text.sample_tokens(
                    base.tokenizer,
                    length - len(start),
                    random.Random(f"windows-{settings.seed}-{number}"),
                )
                for number in range(NUM_WINDOW_TEXTS)
            ]
            costs = window_costs(base.model, texts, sizes, rule.num_sink_tokens)
            write_json_atomically(path, costs)
        costs = json.loads(path.read_text(encoding="utf-8"))[arm.windows]
        return dealt_windows(costs, self.head_map(arm), sizes, rule.sliding_window)

    def prepare(self, arm: Arm) -> BaseModel:
        """The arm's model, trained as far as it says; rule and weights are the arm's."""
        if arm.stage == "teacher":
            return self.dense()
        settings, head_map, windows = self.settings_of(arm), self.head_map(arm), self.windows(arm)
        rule = self._rule(settings)
        config = RTPurboConfig(head_map, rule, settings.indexer)
        if arm.stage == "map":
            return self._sparse(BASE_WEIGHTS, config, windows)

        # The loss of stage 1 knows of the rule what is near and how masses are read.
        near = (rule.num_sink_tokens, rule.near_window, rule.reading)
        indexer = resolve_indexer_settings(self.dense().model, settings.indexer)
        heads = head_map.retrieval_heads
        stage1 = self._path("stage1", "", heads, near, indexer, settings.stage1, settings.seed)
        self._indexers(
            stage1, lambda: self._sparse(BASE_WEIGHTS, config, None), settings.stage1, settings
        )
        if arm.stage == "index":
            return self._sparse(BASE_WEIGHTS, config, windows, stage1)

        learnt = replace(settings.stage2, refresh_steps=0, checkpoint_every=20)
        stage2 = self._path("stage2", "", stage1.name, rule, learnt, windows, arm.objective)
        if not (stage2 / "weights").is_dir():
            base = self._sparse(BASE_WEIGHTS, config, windows, stage1)
            self._distill(base, stage2, settings, arm)
        kind = "lora" if settings.stage2.lora_rank else "full"
        trained = replace(rule, reading=arm.refresh_reading or rule.reading)
        healed, refresh = f"{kind} {stage2}", settings.refresh
        refreshed = self._path("refresh", "", stage2.name, refresh, trained.reading)
        self._indexers(
            refreshed,
            lambda: self._sparse(healed, replace(config, attention=trained), windows, stage1),
            refresh,
            settings,
            on_student=True,
        )
        return self._sparse(healed, config, windows, refreshed)

    def figures(self, arm: Arm) -> dict[str, Any]:
        """Facts of the arm's sparse model as `prepare` made it."""
        if arm.stage == "teacher":
            return {}
        head_map, windows = self.head_map(arm), self.windows(arm)
        facts: dict[str, Any] = {
            "retrieval_heads": head_map.num_retrieval_heads,
            "full_key_value_heads": head_map.num_full_key_value_heads,
        }
        if windows is not None:
            facts |= _window_facts(head_map, windows)
        return facts

    def _rule(self, settings: ConversionSettings) -> AttentionRule:
        assert settings.attention is not None
        return settings.attention

    def _path(self, kind: str, suffix: str, *depends_on: Any) -> Path:
        """Where something lies that these plain values and dataclasses determine."""
        text = json.dumps([self.model, self.data, *depends_on], default=asdict, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}{suffix}"

    def _with_weights(self, weights: str) -> BaseModel:
        """The model with its base weights, or with those of a stage 2 ("lora FOLDER")."""
        if self._base is None or self._weights != weights:
            self._base = None  # Two models at once may be one too many.
            base = load_base_model(self.model, device=self.device)
            if weights != BASE_WEIGHTS:
                kind, folder = weights.split(" ", 1)
                apply_stage2(base.model, Path(folder) / "weights", kind)  # type: ignore[arg-type]
            self._base, self._weights = base, weights
        return self._base

    def _sparse(
        self,
        weights: str,
        config: RTPurboConfig,
        windows: list[list[int] | None] | None,
        indexers: Path | None = None,
    ) -> BaseModel:
        base = self._with_weights(weights)
        sparsify(base.model, config)
        if windows is not None:
            use_windows(base.model, windows)
        if indexers is not None:
            load_indexers(base.model, read_tensors(_weights_of(indexers)))
        return base

    def _indexers(
        self,
        folder: Path,
        make: Callable[[], BaseModel],
        settings: IndexerTrainingSettings,
        conversion: ConversionSettings,
        *,
        on_student: bool = False,
    ) -> None:
        """Trains indexers, unless they are there."""
        if _weights_of(folder).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        base = make()
        stage = "refresh" if on_student else "stage1"
        figures = train_indexers(
            base.model,
            base.tokenizer,
            self.train_text,
            self.held_out,
            settings,
            seed=conversion.seed,
            stage=stage,
            on_student=on_student,
            log=_rewound_log(folder, stage),
            checkpoint=Checkpoint(folder / "checkpoint"),
            progress=self.progress,
        )
        write_json_atomically(folder / "figures.json", figures)
        save_tensors_atomically(_weights_of(folder), indexer_weights(base.model))
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)

    def _distill(
        self, base: BaseModel, folder: Path, settings: ConversionSettings, arm: Arm
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        learnt = settings.stage2
        # Sequences and labels do not depend on how many there are, nor on the student.
        about = (
            "lengths",
            "targets",
            "target_stride",
            "targets_per_sequence",
            "top_logits",
            "mixture",
        )
        targets = self._path(
            "teacher", "", [getattr(learnt, name) for name in about], settings.seed
        )
        objective = whole_vocabulary() if arm.objective == "vocabulary" else nullcontext()
        with whole_folder(folder / "weights") as output, objective:
            distill(
                base.model,
                base.tokenizer,
                self.train_text,
                self.held_out,
                output,
                learnt,
                teacher_folder=targets,
                seed=settings.seed,
                log=_rewound_log(folder, "stage2"),
                checkpoint=Checkpoint(folder / "checkpoint"),
                progress=self.progress,
            )
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _weights_of(folder: Path) -> Path:
    return folder / "indexer.safetensors"


def _rewound_log(folder: Path, stage: str) -> TrainingLog:
    log = TrainingLog(folder / "training_log.jsonl")
    log.rewind(stage, Checkpoint(folder / "checkpoint").steps_done())
    return log


def _window_facts(head_map: HeadMap, windows: list[list[int] | None]) -> dict[str, Any]:
    """How many local heads have each window, and what bounded KV heads hold on the mean."""
    counts: dict[int, int] = {}
    held = []
    for layer, sizes in enumerate(windows):
        heads, full = head_map.retrieval_heads[layer], head_map.full_key_value_heads(layer)
        if sizes is None or heads is None:
            continue
        group = head_map.group_size(layer)
        for head, size in enumerate(sizes):
            if head not in heads:
                counts[size] = counts.get(size, 0) + 1
        held += [
            max(sizes[first : first + group])
            for first in range(0, len(sizes), group)
            if first // group not in full
        ]
    return {
        "local_heads_by_window": {str(size): counts[size] for size in sorted(counts)},
        "mean_window_of_windowed_key_value_heads": sum(held) / max(1, len(held)),
    }
