"""The methods that studies compare, by name, each set up as its users would."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import lightning.pytorch as pl

Scalar = str | int | float | bool
Value = Scalar | tuple[Scalar, ...]


class Arm(NamedTuple):
    """A method.

    Attributes:
        description: What it does, in one sentence.
        settings: Settings of a recipe that make it what it is; no factor changes them.
        until: Share of the run after which nothing more is restored; None for a method without MSign, which no setting
            `msign.…` concerns.
        callback: What makes the method's callback for the trainer, by its dotted name; one with MSign is given the
            arguments of an `MSignCallback`. A study is read, and its results are, without Lightning.
        arguments: Further arguments of it.
    """

    description: str
    settings: Mapping[str, Value] = {}
    until: float | None = None
    callback: str | None = None
    arguments: Mapping[str, Any] = {}

    def callbacks(self, **msign: Any) -> list[pl.Callback]:
        """The method's callbacks, given the arguments of an `MSignCallback` if it is one with MSign."""
        return [] if self.callback is None else [resolve_name(self.callback)(**self.arguments, **msign)]

    def concerned_by(self, setting: str) -> bool:
        """Whether a setting, by its dotted name, changes this method."""
        return setting not in self.settings and (self.until is not None or not setting.startswith("msign."))


def triggered(**msign: Any) -> pl.Callback:
    """A monitor that restores, where the arguments of an `MSignCallback` allow, what has fallen below rank 4."""
    from msign_lightning import StabilityMonitor
    from msign_lightning.settings import RestorationSettings

    arguments = RestorationSettings(**msign).arguments()
    period: int = arguments["period"]
    any_below_4 = {"stable_rank": 4.0, "share": 1e-3, "spike": None, "z_score": None, "stall": None}
    shared = {name: arguments[name] for name in ("stop", "targets", "exclude", "cuts", "rule")}
    return StabilityMonitor({"stable_rank": period}, "restore", thresholds=any_below_4, cooldown=period, **shared)


PLAIN = "adamw"
"""The arm that leaves a program as it is, with which others are compared."""
OURS = "msign_lightning.ablations.baselines"
MSIGN, SPIKE_NO_MORE = "msign_lightning.MSignCallback", "msign_lightning.SpikeNoMoreCallback"
QK_NORM: dict[str, Value] = {"model.config.qk_norm": True}
MUON: dict[str, Value] = {"model.optimizer": f"{OURS}.Muon"}
STABLE_SPAM: dict[str, Value] = {"model.optimizer": "pytorch_optimizer.StableSPAM"}
STABLE_ADAMW: dict[str, Value] = {"model.optimizer": "pytorch_optimizer.StableAdamW"}
CAP: dict[str, Value] = {"msign.rule": "cap"}

ARMS: dict[str, Arm] = {
    PLAIN: Arm("The program's optimizer alone."),
    "adamw_beta95": Arm("AdamW with β₂ = 0.95.", {"model.optimizer.betas": (0.9, 0.95)}),
    "zclip": Arm("Clipping of gradient norms by their z-score (arXiv 2504.02507).", callback=f"{OURS}.ZClip"),
    "skip_nonfinite": Arm(
        "No step where gradients are not finite, as with a gradient scaler.", callback=f"{OURS}.SkipNonFinite"
    ),
    "qk_norm": Arm("RMS norm of queries and keys (arXiv 2302.05442).", QK_NORM),
    "scaled_embed": Arm(
        "The embedding's output × √d (arXiv 2312.16903).",
        callback=SPIKE_NO_MORE,
        arguments={"shortcut": "scaled_embed", "init": False},
    ),
    "spike_no_more": Arm(
        "Small sub-layers and scaled embedding (arXiv 2312.16903).",
        callback=SPIKE_NO_MORE,
        arguments={"shortcut": "scaled_embed"},
    ),
    "muon": Arm(
        "Muon for the blocks' matrices, its updates × 0.2 √max(m, n) (arXiv 2502.16982); AdamW for the rest.", MUON
    ),
    "stablespam": Arm("Stable-SPAM (arXiv 2502.17055) with the recipe's β and weight decay.", STABLE_SPAM),
    "stableadamw": Arm("StableAdamW (arXiv 2304.13013) with the recipe's β and weight decay.", STABLE_ADAMW),
    "msign": Arm("MSign on all targets (arXiv 2602.01734).", {}, 1.0, MSIGN),
    "msign_attention": Arm("MSign on attention.", {"msign.targets": "attention"}, 1.0, MSIGN),
    "msign_mlp": Arm("MSign on the MLPs.", {"msign.targets": "mlp"}, 1.0, MSIGN),
    "msign_first_quarter": Arm("MSign for the first quarter of the run.", {}, 0.25, MSIGN),
    "msign_first_half": Arm("MSign for the first half of the run.", {}, 0.5, MSIGN),
    "cap": Arm("Restoration that lifts stable ranks to a random matrix's at most.", CAP, 1.0, MSIGN),
    "cap_first_half": Arm("The cap rule for the first half of the run.", CAP, 0.5, MSIGN),
    "msign_triggered": Arm(
        "MSign for matrices whose stable rank, measured every period, has fallen below 4.",
        {},
        1.0,
        f"{__name__}.triggered",
    ),
    "msign_qk_norm": Arm("MSign and QK-norm.", QK_NORM, 1.0, MSIGN),
    "cap_muon": Arm("The cap rule and Muon.", {**CAP, **MUON}, 1.0, MSIGN),
}
