"""Methods and trials: every arm does what its name says, and a run becomes the right outcome."""

import json
import math
from itertools import pairwise
from statistics import fmean, pvariance

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msign_lightning import select_targets, stable_rank
from msign_lightning.ablations import training
from msign_lightning.ablations.baselines import Muon, SkipNonFinite, ZClip
from msign_lightning.ablations.cell import Criterion, find_collapse, smooth
from msign_lightning.ablations.methods import ARMS
from msign_lightning.ablations.program import check, count_spikes, outcome_of, run_cell
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.study import Bisect, Study, load
from msign_lightning.recipes.train import load_recipe

STEPS, PERIOD = 40, 10
LAST = {"msign_first_quarter": 10, "msign_first_half": 20, "msign": 30, "cap_first_half": 20, "cap": 30}
"""Step of the last application by arm."""


def make(**changed):
    given = {
        "program": "tiny/prose",
        "arms": list(ARMS),
        "factors": {"lr": [0.01], "period": [PERIOD]},
        "seeds": [0],
        "steps": STEPS,
        **changed,
    }
    return Study(name="s", **given)


def first_cell(study):
    return next(iter(study.cells.values()))


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The outcomes of all arms by name, and the folder of their logs by name."""
    folder = tmp_path_factory.mktemp("logs")
    study = make()
    outcomes = {cell.arm: run_cell(study, cell, folder) for cell in study.cells.values()}
    return outcomes, {cell.arm: folder / cell.folder for cell in study.cells.values()}


def loss_curve(outcome):
    """The smoothed loss of each step: with no more steps than points, all are there."""
    steps, losses = zip(*outcome.curve, strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    return losses


def first_difference(one, other):
    return next(i for i, (a, b) in enumerate(zip(loss_curve(one), loss_curve(other), strict=True), start=1) if a != b)


class TestArms:
    @pytest.mark.parametrize("name", ARMS)
    def test_every_arm_trains(self, trained, name):
        outcome = trained[0][name]
        assert outcome.steps == STEPS
        assert outcome.final_loss < 3.8 < 5 < outcome.initial_loss
        assert 2 < outcome.val_loss < outcome.initial_loss
        assert (outcome.diverged_at, outcome.collapsed_at) == (None, None)
        assert 1 <= outcome.stable_rank <= 32
        assert outcome.steps_per_second > 0
        assert outcome.seconds > 0

    def test_arms_with_the_same_seed_have_the_same_weights_and_data(self):
        starts = {}
        for arm, seed in (("adamw", 3), ("cap_muon", 3), ("adamw", 4)):
            study = make(
                arms=[arm], seeds=[seed], factors={"lr": [0.01]}, settings={} if arm == "adamw" else {"period": 5}
            )
            recipe = training._build(study, first_cell(study))
            recipe.datamodule.setup("fit")
            loader = recipe.datamodule.train_dataloader()
            starts[arm, seed] = [*recipe.model.parameters(), *(loader.batch(i) for i in range(3))]
        one, same, other = starts.values()
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not torch.equal(one[0], other[0])
        assert not torch.equal(one[-1], other[-1])

    def test_first_losses_are_the_same_in_all_arms(self, trained):
        """They are a function of the first weights and the first batch."""
        redrawn = {"scaled_embed", "spike_no_more"}
        starts = {name: outcome.initial_loss for name, outcome in trained[0].items() if name not in redrawn}
        assert len(set(starts.values())) == 1, starts

    def test_arms_differ_from_the_step_on_where_they_do_something(self, trained):
        outcomes = trained[0]
        for name in ("adamw_beta95", "qk_norm", "scaled_embed", "spike_no_more", "muon", "stablespam", "stableadamw"):
            # A first step, of Adam's normalised updates, is the same for all β; W_Q starts at zero.
            assert first_difference(outcomes[name], outcomes["adamw"]) <= 3, name
        for name in ("msign", "msign_attention", "msign_mlp", "cap"):
            assert first_difference(outcomes[name], outcomes["adamw"]) == PERIOD + 1, name
        assert first_difference(outcomes["msign_qk_norm"], outcomes["qk_norm"]) == PERIOD + 1
        assert first_difference(outcomes["cap_muon"], outcomes["muon"]) == PERIOD + 1
        assert first_difference(outcomes["msign"], outcomes["msign_first_half"]) == 31
        assert first_difference(outcomes["msign_first_half"], outcomes["msign_first_quarter"]) == 21

    @pytest.mark.parametrize(("name", "last"), LAST.items())
    def test_nothing_is_applied_after_its_share_nor_in_the_last_period(self, trained, name, last):
        steps = [step for step, _ in scalars(trained[1][name], "msign/changed")]
        assert steps == list(range(PERIOD, last + 1, PERIOD))

    def test_names_of_targets_and_rules_are_kept(self, trained):
        """MSign leaves a stable rank of 32, for square and 32 × 128 matrices alike; cap one of at most 8 or 14."""
        matrices = {"msign": 24, "msign_attention": 16, "msign_mlp": 8}
        for name, number in matrices.items():
            assert {value for _, value in scalars(trained[1][name], "msign/changed")} == {number}
            assert scalars(trained[1][name], "msign/stable_rank_after/min")[0][1] == pytest.approx(32, rel=1e-3)
        for name in ("cap", "cap_muon"):
            assert scalars(trained[1][name], "msign/stable_rank_after/min")[0][1] == pytest.approx(8, rel=1e-2)

    @pytest.mark.parametrize("name", ["quick", "targets", "period", "frontier", "frontier_map", "search"])
    def test_shipped_studies_can_be_run(self, name):
        check(load(name))


class TestTrials:
    def test_a_cell_gives_the_same_again(self, trained, tmp_path):
        cell = first_cell(make())
        timing = {"seconds": 0, "steps_per_second": 0}
        again = run_cell(make(), cell, tmp_path)
        assert again._replace(**timing) == trained[0][cell.arm]._replace(**timing)
        assert run_cell(make(), cell._replace(seed=1), tmp_path).initial_loss != again.initial_loss

    def test_scalars_for_tensorboard(self, trained):
        outcome, folder = trained[0]["adamw"], trained[1]["adamw"]
        curve = loss_curve(outcome)
        for step, loss in scalars(folder, "loss/smoothed"):
            assert loss == pytest.approx(curve[step - 1])
        assert [step for step, _ in scalars(folder, "lr")] == [19, 39, 40]
        assert scalars(folder, "lr")[0][1] == pytest.approx(0.01 * 20 / 50)
        assert max(value for _, value in scalars(folder, "grad_norm/max")) == pytest.approx(outcome.max_grad_norm)
        assert scalars(folder, "stable_rank/attention")[-1] == (STEPS, pytest.approx(outcome.stable_rank))
        assert scalars(folder, "loss/val") == [(STEPS, pytest.approx(outcome.val_loss))]

    def test_another_try_replaces_the_logs(self, tmp_path):
        study = make(arms=["adamw"], factors={"lr": [0.01]}, steps=20)
        cell = first_cell(study)
        for _ in range(2):
            run_cell(study, cell, tmp_path)
        assert [step for step, _ in scalars(tmp_path / cell.folder, "loss/val")] == [20]

    @pytest.mark.parametrize("arm", ["adamw", "msign"])
    def test_divergence_is_an_outcome(self, tmp_path, arm):
        study = make(arms=[arm], factors={"lr": [1e30]}, settings={"period": 1, "model.warmup_steps": 0})
        outcome = run_cell(study, first_cell(study), tmp_path)
        assert 2 <= outcome.diverged_at == outcome.collapsed_at <= 5
        assert (outcome.val_loss, outcome.final_loss, outcome.stable_rank) == (None, None, None)
        assert outcome.steps == 19, "the run ends where losses are next brought from the device"
        assert outcome.curve[-1][0] == outcome.diverged_at - 1
        json.dumps(outcome.as_dict(), allow_nan=False)
        assert not study.stability.is_stable(outcome)

    def test_reports_and_pruning(self, tmp_path):
        study = make(arms=["adamw"], factors={"lr": [0.01]}, steps=60)
        cell = first_cell(study)
        seen = []
        outcome = run_cell(study, cell, tmp_path, lambda step, loss: seen.append((step, loss)))
        assert [step for step, _ in seen] == [19, 39, 59, 60]
        assert dict(seen)[59] == pytest.approx(dict(outcome.curve)[59])
        calls = []
        assert run_cell(study, cell, tmp_path, lambda step, loss: calls.append(step) or step > 30) is None
        assert calls == [19, 39]
        assert run_cell(study, cell, tmp_path, lambda step, loss: step == 60) is not None, "nothing is left to stop"

    def test_accumulated_batches_are_one_step(self, tmp_path):
        study = make(
            arms=["msign"],
            factors={"lr": [0.01]},
            settings={"period": 10, "trainer.accumulate_grad_batches": 2},
            steps=20,
        )
        cell = first_cell(study)
        outcome = run_cell(study, cell, tmp_path)
        assert outcome.steps == outcome.curve[-1][0] == 20
        assert [step for step, _ in scalars(tmp_path / cell.folder, "msign/changed")] == [10]
        recipe = load_recipe("tiny/prose", "--seed_everything=0", "--use_msign=false", "--trainer.logger=false")
        recipe.datamodule.setup("fit")
        batches = [recipe.datamodule.train_dataloader().batch(i) for i in range(2)]
        assert outcome.initial_loss == pytest.approx(fmean(recipe.model.loss(batch).item() for batch in batches))

    def test_settings_and_factors_reach_the_recipe(self, tmp_path):
        study = make(
            arms=["adamw"],
            factors={"lr": [0.01], "model.config.norm": ["rmsnorm"], "data.batch_size": [2, 8]},
            settings={"model.config.width": 16},
            steps=20,
        )
        recorded = [run_cell(study, cell, tmp_path) for cell in study.cells.values()]
        assert all(outcome.stable_rank <= 16 for outcome in recorded)
        assert recorded[0].initial_loss != recorded[1].initial_loss

    def test_a_folder_that_cannot_be_written_to(self, tmp_path):
        study = make()
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="default_root_dir must be a folder that can be written to"):
            run_cell(study, first_cell(study), tmp_path / "file")

    def test_a_validation_loss_that_is_not_finite_is_divergence(self):
        speed = {"steps": 2, "seconds": 1.0, "steps_per_second": 2.0}
        outcome = outcome_of([(1, 5.0), (2, 4.0)], math.inf, Criterion(), **speed)
        assert (outcome.diverged_at, outcome.val_loss, outcome.collapsed_at) == (2, None, 2)


class TestChecks:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"settings": {"model.config.qknorm": True}}, "did you mean model.config.qk_norm"),
            ({"settings": {"model.config.norm": "batchnorm"}}, "Got value: batchnorm"),
            ({"settings": {"model.optimizer.bets": (0.9, 0.95)}}, "Option 'bets' is not accepted"),
            ({"settings": {"model.config.width": 33}}, "n_heads must divide width 33, got 2"),
            ({"settings": {"data.source": "no/such/text"}}, "source must be 'prose', 'source'"),
            ({"settings": {"trainer.limit_val_batches": 0}}, "trainer.limit_val_batches must let a batch be validated"),
            ({"settings": {"trainer.limit_train_batches": 1.5}}, "invalid value 1.5 for limit_train_batches"),
            ({"factors": {"lr": [0.1], "targets": ["mlp", "*nothing*"]}}, "nothing"),
            ({"factors": {"lr": [0.1], "model.config.n_heads": [2, 3]}}, "n_heads must divide width 32, got 3"),
            (
                {"factors": {"lr": [0.1]}, "steps": 30},
                "steps must be enough for msign to restore once before the last period of 20 steps, got 30",
            ),
            (
                {"factors": {}, "sampler": Bisect(1.0, 2.0), "settings": {"trainer.precision": "9-bit"}},
                "trainer.precision",
            ),
        ],
    )
    def test_what_the_recipe_refuses(self, changed, message):
        study = make(**{"arms": ["adamw", "msign"], "factors": {"lr": [0.1]}, "steps": 100, **changed})
        with pytest.raises(StudyError, match=message):
            check(study)

    def test_errors_name_the_line_of_the_study_file(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text(
            "program: tiny/prose\nsteps: 300\narms:\n- adamw\n- msign\nfactors:\n  lr: [0.1]\n"
            "  model.config.norm: [rmsnorm, batchnorm]\nseeds: [0]\n"
        )
        with pytest.raises(
            StudyError, match=r"mine.yaml:8: adamw \(model.config.norm=batchnorm\): tiny/prose can't be built"
        ):
            check(load(file))


class TestLosses:
    def test_smoothed_losses_are_trailing_means(self):
        losses = np.random.default_rng(0).normal(3, 1, 70).tolist()
        assert smooth(losses) == pytest.approx([fmean(losses[max(0, i - 19) : i + 1]) for i in range(70)])
        assert smooth([5.0, 1e20] + [3.0] * 20)[-1] == 3.0

    @pytest.mark.parametrize(
        ("smoothed", "collapsed"),
        [
            ([5, 4, 3, 2], None),
            ([5, 4, 3, 3.5, 3.5], None),
            ([5, 4, 3, 3.6, 3.6], 3),
            ([5, 4, 3, 3.6, 3.4, 3.6], 5),
            ([5, 3, 6, 2, 2], None),
            ([5, 5.1, 5.2], 1),
            ([5], None),
        ],
    )
    def test_collapse_is_the_begin_of_what_never_recovers(self, smoothed, collapsed):
        assert find_collapse(smoothed, 0.5) == collapsed

    def test_spikes_are_counted_once_each(self):
        losses = [3.0] * 120
        losses[50] = 3.6
        losses[80:84] = [4.0, 3.9, 4.1, 3.7]
        losses[100] = 3.4
        assert count_spikes(losses, 0.5) == 2
        assert count_spikes(losses, 0.3) == 3


class TestZClip:
    def test_norms_are_clipped_reciprocally_to_their_score(self):
        clip = ZClip(2.5, 0.97, warmup_steps=25)
        norms = np.random.default_rng(0).normal(1, 0.1, 25).tolist()
        assert [clip.update(norm) for norm in norms] == [None] * 25
        mean, variance = fmean(norms), pvariance(norms)
        for norm in (1.0, 3.0, math.inf, 1.1, 2.0):
            bound = clip.update(norm)
            if not math.isfinite(norm):
                assert bound is None
                continue
            score = (norm - mean) / math.sqrt(variance)
            expected = mean + 2.5**2 / score * math.sqrt(variance) if score > 2.5 else None
            assert (bound is None) == (expected is None)
            taken = norm
            if expected is not None:
                taken = expected
                assert bound == pytest.approx(expected)
            mean = 0.97 * mean + 0.03 * taken
            variance = 0.97 * variance + 0.03 * (taken - mean) ** 2

    @pytest.mark.parametrize("scale", [1.0, 8.0], ids=["plain", "fused, under a scaler"])
    def test_gradients_are_clipped_before_the_optimizer_sees_them(self, tmp_path, scale):
        norms = []

        class Outlier(pl.LightningModule):
            """Its gradient norm is that of the batch: about 1, and 50 once."""

            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(4))

            def training_step(self, batch, batch_idx):
                return (batch * self.weight).sum()

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=0.1, fused=scale != 1)

        class Norms(pl.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                norms.append(pl_module.weight.grad.norm().item() / scale)

        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        random = np.random.default_rng(0)
        given = [*random.normal(1, 0.1, 30), 50.0, 1.0]
        module = Outlier()
        trainer = pl.Trainer(
            max_steps=len(given),
            callbacks=[ZClip(), Norms()],
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scale != 1 else None,
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = [torch.tensor([norm, 0, 0, 0], dtype=torch.float32) for norm in given]
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        assert norms[:25] == pytest.approx(given[:25])
        assert norms[31] == pytest.approx(1)
        assert 0.5 < norms[30] < 1.5


class TestSkipNonFinite:
    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_step_with_infinite_gradients_leaves_the_weights_and_training_goes_on(self, tmp_path, value):
        weights = []

        class Module(pl.LightningModule):
            """Its gradient is that of the batch; the one of the second parameter is always finite."""

            def __init__(self):
                super().__init__()
                self.weight, self.other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

            def training_step(self, batch, batch_idx):
                return (batch * self.weight).nan_to_num().sum() + self.other.sum()

            def on_after_backward(self):
                if self.global_step == 2:
                    self.weight.grad[1] = value

            def on_train_batch_end(self, *_):
                weights.append(torch.cat([self.weight, self.other]).detach().clone())

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)

        trainer = pl.Trainer(
            max_steps=5,
            callbacks=[SkipNonFinite()],
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(5, 3), batch_size=None))
        changed = [bool((a != b).all()) for a, b in pairwise(weights)]
        assert changed == [True, False, True, True]
        assert torch.equal(weights[1], weights[2])
        assert weights[-1].isfinite().all()


class TestMuon:
    def test_matrices_by_muon_and_the_rest_by_adamw(self):
        torch.manual_seed(0)
        recipe = load_recipe(
            "tiny/prose",
            "--use_msign=false",
            "--trainer.logger=false",
            "--model.optimizer=msign_lightning.ablations.baselines.Muon",
        )
        model, lr = recipe.model, 0.01
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.loss(torch.randint(256, (4, 65))).backward()
        optimizer = model.optimizer(model.parameter_groups())
        assert isinstance(optimizer, Muon)
        assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
            ("matrices", lr, 0.1),
            ("embeddings", lr, 0.1),
            ("gains", lr, 0.0),
        ]
        twin = load_recipe("tiny/prose", "--use_msign=false", "--trainer.logger=false").model
        twin.load_state_dict(model.state_dict())
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        optimizer.step()
        twin.optimizer(twin.parameter_groups()).step()
        matrices = {id(p) for group in model.parameter_groups() if group["name"] == "matrices" for p in group["params"]}
        assert len(matrices) == 24
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            if id(ours) not in matrices:
                torch.testing.assert_close(ours, theirs)
            elif ours.grad.any():
                update = (before[name] * (1 - lr * 0.1) - ours).detach()
                # As large as an update of AdamW tends to be, and near orthogonal.
                expected = 0.2 * lr * math.sqrt(max(update.shape))
                values = torch.linalg.svdvals(update) / expected
                rank = torch.linalg.matrix_rank(ours.grad)
                assert 0.6 < values[: rank // 2].min() <= values.max() < 1.3


class TestTriggered:
    def test_fallen_matrices_are_restored_until_the_last_step(self):
        """All start at rank one; halfway, after the last step for restoring, they are made so once more."""

        class Flatten(pl.Callback):
            def __init__(self):
                self.ranks = {}

            def on_train_batch_start(self, trainer, module, *_):
                weights = [t.parameter for t in select_targets(module, "all_2d")]
                if trainer.global_step in (0, 12):
                    for weight in weights:
                        weight.data = torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1])) * 0.1
                self.ranks[trainer.global_step] = min(stable_rank(weight).item() for weight in weights)

        flatten = Flatten()
        msign = {"period": 5, "stop": 10, "targets": "all_2d", "exclude": (), "cuts": None, "rule": "msign"}
        recipe = load_recipe(
            "tiny/prose",
            "--use_msign=false",
            "--trainer.logger=false",
            "--trainer.max_steps=20",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.limit_val_batches=0",
            callbacks=[flatten, *ARMS["msign_triggered"].callbacks(**msign)],
        )
        recipe.trainer.fit(recipe.model, recipe.datamodule)
        assert flatten.ranks[4] < 2
        assert flatten.ranks[5] > 4, "measured and restored at step 5"
        assert max(flatten.ranks[step] for step in range(12, 20)) < 2


def die_at_39(step, loss):
    return 1 / (39 - step) > 1


class TestLegs:
    @pytest.mark.parametrize("arm", ["adamw", "zclip", "muon", "cap", "msign_triggered", "spike_no_more"])
    def test_a_run_that_goes_on_from_its_last_leg_gives_the_same(self, trained, tmp_path, arm):
        study = make(arms=[arm], factors={"lr": [0.01], **({"period": [PERIOD]} if ARMS[arm].until else {})})
        cell = first_cell(study)
        with pytest.raises(ZeroDivisionError):
            run_cell(study, cell, tmp_path, die_at_39, legs=3)
        (saved,) = (tmp_path / cell.folder).glob("*.ckpt")
        assert torch.load(saved, weights_only=False)["global_step"] == 28
        seen = []
        again = run_cell(study, cell, tmp_path, lambda step, loss: seen.append(step), legs=3)
        assert seen == [39, 40]
        timing = {"seconds": 0, "steps_per_second": 0}
        assert again._replace(**timing) == trained[0][arm]._replace(**timing)
        assert not saved.exists()

    def test_the_last_leg_stays_until_its_run_has_been_validated(self, tmp_path, monkeypatch):
        study = make(arms=["adamw"], factors={"lr": [0.01]})
        cell, seen = first_cell(study), []
        with monkeypatch.context() as patch:
            patch.setattr(training, "_validate", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_cell(study, cell, tmp_path, legs=4)
        run_cell(study, cell, tmp_path, lambda step, loss: seen.append(step), legs=4)
        assert seen == [39, 40]

    def test_a_leg_of_another_run_is_not_gone_on_from(self, tmp_path):
        def make_with(size):
            return make(arms=["adamw"], factors={"lr": [0.01]}, settings={"data.batch_size": size})

        cell = first_cell(make_with(4))
        with pytest.raises(ZeroDivisionError):
            run_cell(make_with(4), cell, tmp_path, die_at_39, legs=2)
        for size, expected in ((8, [19, 39, 40]), (4, [39, 40])):
            seen = []
            run_cell(make_with(size), cell, tmp_path, lambda step, loss, seen=seen: seen.append(step), legs=2)
            assert seen == expected
