"""The arms of every question, for a model, a length and a window.

Times are estimates for one H100 at 8,192 tokens: a step of stage 1 takes .03 s (its states are kept
for eight steps), a step of stage 2 .5 s and the teacher's part of it .1 s, a question .1 s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ablations.arms import DENSE_HEADS, Arm, Group
from rtpurbo.config import AttentionRule
from rtpurbo.settings import (
    CalibrationSettings,
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
)

NO_FLOOR = {"min_tokens": 0}
SHORT = {"stage2.steps": 100}
SPACES = {"slow pairs": "low_frequency", "pre-RoPE": "pre_rope", "post-RoPE": "post_rope"}


def base_settings(length: int, window: int, seed: int) -> ConversionSettings:
    """The conversion that arms depart from; training meets every kind of question asked later."""
    mixture = {"needles": 0.35, "variables": 0.15}
    quarter, half = length // 4, length // 2
    return ConversionSettings(
        attention=AttentionRule(sliding_window=window),
        calibration=CalibrationSettings(length=half, num_documents=6),
        stage1=IndexerTrainingSettings(
            steps=200, lengths=(quarter, half, length), probe_every=10_000, mixture=mixture
        ),
        stage2=DistillationSettings(
            steps=300,
            lengths=(quarter, length, half, length),
            learning_rate=1e-3,
            lora_beyond_attention=True,
            gradient_checkpointing=False,
            refresh_steps=100,
            mixture=mixture,
        ),
        seed=seed,
    )


def shrunk(settings: ConversionSettings) -> ConversionSettings:
    """The same with hardly any training, to see that everything runs."""

    def few(steps: int) -> int:
        return -(-steps // 100)

    stage1, stage2 = settings.stage1, settings.stage2
    return replace(
        settings,
        calibration=replace(settings.calibration, num_documents=2),
        stage1=replace(
            stage1, steps=few(stage1.steps), warmup_steps=0, queries_per_step=32, init_sequences=1,
            probe_sequences=1,
        ),
        stage2=replace(
            stage2, steps=few(stage2.steps), warmup_steps=0, targets_per_sequence=64,
            refresh_steps=few(stage2.refresh_steps),
        ),
    )  # fmt: skip


def plan(length: int, window: int) -> list[Group]:
    """Every group; its arms are told in the order in which they run."""
    return [
        Group("a", "which reading of top-p, which p, and is it better than top-k?",
              selection_arms(length), "dense retrieval heads"),
        Group("b", "how are retrieval heads ranked, and how many are needed?",
              head_arms(length), "15 %"),
        Group("c", "which features, size, start and lengths serve the index?",
              index_arms(length), "slow pairs, 16"),
        Group("d", "how much of stage 2 is needed, and of what kind?",
              stage2_arms(length), "LoRA, 300 steps"),
        Group("e", "how long are windows, and are they better chosen head by head?",
              window_arms(length, window), f"one window of {window:,}"),
        Group("f", "is the head map stable, and what do rows read?",
              stability_arms(length), f"train, {length // 2:,}"),
    ]  # fmt: skip


def selection_arms(length: int) -> tuple[Arm, ...]:
    """Group a: one student, read under many rules."""

    def read(name: str, quick: bool = False, **rule: Any) -> Arm:
        return Arm(name, 11, quick, rule={**NO_FLOOR, **rule}, lengths=(length,))

    def top_k(of: str, quick: bool = False) -> Arm:
        return Arm(f"top-k, budget of {of}", 11, quick, budget_of=of, lengths=(length,))

    def reading(name: Any, top_p: float, quick: bool = False) -> Arm:
        return read(f"{name} {top_p:.2f}", quick, reading=name, top_p=top_p)

    return (
        Arm("dense retrieval heads", 230, True, rule=DENSE_HEADS, lengths=(length,)),
        reading("residual", 0.90, True),
        reading("paper", 0.90, True),
        reading("far", 0.90, True),
        read("residual 0.90, at least 128", True, top_p=0.90, min_tokens=128),
        top_k("residual 0.90, at least 128", True),
        top_k("paper 0.90", True),
        reading("residual", 0.99, True),
        reading("far", 0.70, True),
        Arm("full attention", 8, stage="teacher", lengths=(length,)),
        *(
            replace(
                reading("paper", top_p),
                name=f"paper {top_p:.2f}, index trained for it",
                refresh_reading="paper",
                seconds=16,
            )
            for top_p in (0.90, 0.95)
        ),
        reading("paper", 0.95),
        reading("residual", 0.95),
        reading("far", 0.80),
        read("residual 0.70, at least 128", top_p=0.70, min_tokens=128),
        reading("paper", 0.70),
        reading("residual", 0.70),
        reading("paper", 0.99),
        reading("far", 0.99),
        top_k("residual 0.95"),
        top_k("far 0.80"),
        reading("paper", 0.80),
        reading("residual", 0.80),
        reading("far", 0.95),
    )


def head_arms(length: int) -> tuple[Arm, ...]:
    """Group b: head maps before any training, which shows the choice itself; then after a short stage 2."""
    ratios = {"15 %": 0.15, "5 %": 0.05, "30 %": 0.30, "10 %": 0.10}
    kinds: dict[str, dict[str, Any]] = {
        **{name: {"changes": {"calibration.ratio": ratio}} for name, ratio in ratios.items()},
        "15 %, same number in every layer": {"choice": "per_layer"},
        "15 %, whole KV groups": {"changes": {"calibration.granularity": "kv_group"}},
        "whole KV groups, memory of 15 %": {"choice": "kv_group_same_memory"},
        "15 %, at random": {"choice": "random"},
        "15 %, by chains": {"changes": {"calibration.ranking": "variable_tracking"}},
        "15 %, copies and chains in turn": {"changes": {"calibration.ranking": "interleaved"}},
        **{
            f"{name}, by divergence": {
                "choice": "divergence", "changes": {"calibration.ratio": ratio},
            }
            for name, ratio in ratios.items()
        },
    }  # fmt: skip
    before = [
        Arm(name, 10, "chains" not in name, "map", rule=DENSE_HEADS, lengths=(length,), **kind)
        for name, kind in kinds.items()
    ]
    healed = ("15 %", "15 %, same number in every layer", "whole KV groups, memory of 15 %",
              "5 %", "30 %", "15 %, by divergence", "5 %, by divergence",
              "15 %, copies and chains in turn")  # fmt: skip
    after = [
        Arm(f"{name}, after 100 steps", 75, lengths=(length,),
            **{**kinds[name], "changes": {**kinds[name].get("changes", {}), **SHORT}})
        for name in healed
    ]  # fmt: skip
    return (*before, *after)


def index_arms(length: int) -> tuple[Arm, ...]:
    """Group c: stage 1 alone, judged by what its index reads at equal recall."""
    quarter, half = length // 4, length // 2

    def index(name: str, quick: bool = False, **changes: Any) -> Arm:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return Arm(name, 16, quick, "index", dotted, measure="index",
                   lengths=(quarter, half, length))  # fmt: skip

    short = {"stage1__lengths": (quarter,)}
    return (
        index("slow pairs, 16", True),
        replace(index("exact scores", True), oracle=True, seconds=6),
        index("pre-RoPE, 16", True, indexer__index_space="pre_rope"),
        index("post-RoPE, 16", True, indexer__index_space="post_rope"),
        *(
            index(f"{name}, 16, trained at {quarter:,}", True, indexer__index_space=space, **short)
            for name, space in SPACES.items()
        ),
        index("slow pairs, 4", True, indexer__index_dim=4),
        index("slow pairs, 32", True, indexer__index_dim=32),
        index("slow pairs, 8", indexer__index_dim=8),
        index("slow pairs, 16, start alone", stage1__steps=0),
        index("slow pairs, 16, start from weights", stage1__init="weight"),
        index("slow pairs, 16, start at random", stage1__init="random"),
        index(f"slow pairs, 16, trained at {length:,}", stage1__lengths=(length,)),
        *(
            index(f"{name}, {size}", indexer__index_dim=size, indexer__index_space=space)
            for size in (4, 8, 32)
            for name, space in SPACES.items()
            if name != "slow pairs"
        ),
        *(
            index(
                f"pre-RoPE, 16, start {name}",
                indexer__index_space="pre_rope",
                **changes,
            )
            for name, changes in {
                "alone": {"stage1__steps": 0},
                "from weights": {"stage1__start": "weight"},
                "at random": {"stage1__start": "random"},
            }.items()
        ),
    )


def stage2_arms(length: int) -> tuple[Arm, ...]:
    """Group d: one stage 1, many ways to heal."""

    def student(name: str, seconds: float, quick: bool = False, **fields: Any) -> Arm:
        changes = {f"stage2.{key}": value for key, value in fields.pop("stage2", {}).items()}
        return Arm(name, seconds, quick, changes=changes, lengths=(length,), **fields)

    full = {"lora_rank": 0, "learning_rate": 3e-5}
    return (
        student("LoRA, 300 steps", 12, True, stage2={"steps": 300}),
        student("none", 14, True, stage="index"),
        student("LoRA, 100 steps", 75, stage2={"steps": 100}),
        student("LoRA, 100 steps, selection on", 150,
                stage2={"steps": 100, "prefill_mode": "top_p"}),
        student("full weights, 300 steps", 175, stage2={"steps": 300, **full}),
        student("LoRA, 100 steps, whole vocabulary", 100, stage2={"steps": 100},
                objective="vocabulary"),
        student("LoRA, 100 steps, all retrieval rows dense", 75,
                stage2={"steps": 100, "decode_queries": 0}),
        student("LoRA, 600 steps", 350, stage2={"steps": 600}),
        student("LoRA, 300 steps, a third of the rate", 75,
                stage2={"steps": 300, "learning_rate": 3e-4}),
        student("LoRA, 300 steps, a tenth of the rate", 75,
                stage2={"steps": 300, "learning_rate": 1e-4}),
        student("LoRA on attention alone, 100 steps", 75,
                stage2={"steps": 100, "lora_beyond_attention": False}),
        student("LoRA, 300 steps, dense retrieval heads", 10, rule=DENSE_HEADS,
                stage2={"steps": 300}),
        student("none, dense retrieval heads", 8, stage="map", rule=DENSE_HEADS),
    )  # fmt: skip


def window_arms(length: int, window: int) -> tuple[Arm, ...]:
    """Group e: retrieval heads dense, so that only what local heads forget counts."""

    def local(name: str, size: int, quick: bool = False, **fields: Any) -> Arm:
        changes = {"attention.sliding_window": size, **fields.pop("changes", {})}
        fields = {"stage": "map", "seconds": 10, **fields}
        return Arm(
            name, quick=quick, changes=changes, rule=DENSE_HEADS, lengths=(length,), **fields
        )

    def mean(size: int, by: Any, quick: bool = False, **fields: Any) -> Arm:
        why = {"output_error": "output error", "lost_mass": "attention mass"}[by]
        name = f"a window a head by {why}, mean {size:,}" + (", after 100 steps" if fields else "")
        return local(name, size, quick, windows=by, **{"seconds": 14, **fields})

    healed: dict[str, Any] = {"stage": "student", "changes": SHORT, "seconds": 75}
    # Their masks, one a head, would not fit the memory for all layers at once.
    dealt = {
        **healed,
        "changes": {**SHORT, "stage2.gradient_checkpointing": True},
        "seconds": 130,
    }
    sizes = [size for size in (window * 2, window * 4, window * 8) if size < length]
    return (
        local(f"one window of {window:,}", window, True),
        mean(window, "output_error", True),
        mean(window, "lost_mass", True),
        *(local(f"one window of {size:,}", size, True) for size in sizes),
        *(
            local(f"heads of score {threshold} and more", window, index == 0,
                  changes={"calibration.threshold": threshold})
            for index, threshold in enumerate((0.05, 0.02))
        ),
        mean(window // 2, "output_error"),
        local(f"one window of {window // 2:,}", window // 2),
        mean(window * 2, "output_error"),
        mean(window * 2, "lost_mass"),
        local(f"one window of {window:,}, after 100 steps", window, **healed),
        mean(window, "output_error", **dealt),
        local(f"one window of {window * 2:,}, after 100 steps", window * 2, **healed),
        mean(window, "lost_mass", **dealt),
    )  # fmt: skip


def stability_arms(length: int) -> tuple[Arm, ...]:
    """Group f: head maps of several texts and lengths; what rows read by task and length."""
    quarter, half = length // 4, length // 2
    maps = [
        Arm(f"{text}, {size:,}", 4, True, "teacher", {"calibration.length": size},
            measure="map", text=text)
        for text, size in (
            ("train", half), ("heldout", half), ("python", half), ("train", quarter),
            ("train", length),
        )
    ]  # fmt: skip
    rules: dict[str, dict[str, Any]] = {
        "residual 0.90, at least 128": {},
        "residual 0.95": {"top_p": 0.95, **NO_FLOOR},
        "paper 0.90": {"reading": "paper", **NO_FLOOR},
    }
    reads = [
        Arm(f"reads of {name}", 22, number == 0, rule=rule, lengths=(quarter, half, length))
        for number, (name, rule) in enumerate(rules.items())
    ]
    return (*maps, *reads)
