"""Study files: what they hold, what is refused, and the identity of cells and studies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import msign_lightning.ablations
from msign_lightning.ablations.cell import Outcome
from msign_lightning.ablations.methods import ARMS
from msign_lightning.ablations.reader import StudyError
from msign_lightning.ablations.study import Bisect, Cell, Criterion, Grid, Group, Study, Tpe, Variant, changes, load

SHIPPED = sorted(file.stem for file in (Path(msign_lightning.ablations.__file__).parent / "studies").glob("*.yaml"))
SOUND = """\
program: tiny/prose
steps: 300
arms:
  - adamw
  - msign
  - {name: narrow, base: msign, settings: {model.config.width: 16}}
factors:
  lr: [3e-3, 0.03]
  period: [5, 20]
  model.config.n_layers: [2, 4]
seeds: [0, 1]
settings:
  model.optimizer.betas: [0.9, 0.95]
  data.batch_size: 8
stability:
  max_loss: 2.5
sampler: grid
"""


def make(**changed):
    given = {"arms": ["adamw", "msign"], "factors": {"lr": [0.01]}, "seeds": [0], "steps": 300, **changed}
    return Study(name="s", program="tiny/prose", **given)


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return file

    return write


class TestStudyFiles:
    def test_everything_is_read_with_its_type(self, write):
        study = load(write(SOUND))
        assert study == Study(
            name="mine",
            program="tiny/prose",
            steps=300,
            arms=("adamw", "msign", "narrow"),
            factors={"lr": (0.003, 0.03), "period": (5, 20), "model.config.n_layers": (2, 4)},
            seeds=(0, 1),
            settings={"model.optimizer.betas": (0.9, 0.95), "data.batch_size": 8},
            stability=Criterion(max_loss=2.5),
            sampler=Grid(),
            variants={"narrow": Variant("msign", {"model.config.width": 16})},
        )

    def test_the_part_smoke_goes_before_the_rest(self, write):
        small = "smoke:\n  steps: 40\n  arms: [msign]\n  factors: {period: [5]}\n  settings: {data.batch_size: 2}\n"
        file = write(SOUND + small)
        whole, study = load(file), load(file, smoke=True)
        assert whole.fingerprint() == load(write(SOUND)).fingerprint(), "it is no part of the study"
        assert (whole.name, study.name) == ("mine", "mine_smoke")
        assert (study.steps, study.arms, study.seeds) == (40, ("msign",), whole.seeds)
        assert study.factors == {**whole.factors, "period": (5,)}
        assert study.settings == {**whole.settings, "data.batch_size": 2}
        assert study.stability == whole.stability

    @pytest.mark.parametrize(
        ("small", "line", "message"),
        [
            ("", 1, "smoke is missing"),
            ("smoke: 3\n", 18, "smoke must be a mapping, got 3"),
            ("smoke:\n  stepps: 40\n", 19, "unknown key 'stepps', did you mean steps?"),
            ("smoke:\n  steps: 5\n", 19, "steps must be between 20"),
            ("smoke:\n  factors:\n    period: [5, 200]\n", 20, "steps must be enough for msign to restore once"),
        ],
    )
    def test_errors_in_the_part_smoke(self, write, small, line, message):
        file = write(SOUND + small)
        assert load(file).name == "mine"
        with pytest.raises(StudyError) as error:
            load(file, smoke=True)
        assert str(error.value).startswith(f"{file}:{line}: ")
        assert message in str(error.value)

    def test_samplers(self, write):
        text = SOUND.replace("  lr: [3e-3, 0.03]\n", "")
        bisect = load(write(text.replace("grid", "{name: bisect, low: 1e-3, high: 1, runs: 4}"))).sampler
        assert bisect == Bisect(low=0.001, high=1.0, resolution=0.1, runs=4)
        assert isinstance(bisect.runs, int)
        study = load(write(text.replace("grid", "{name: tpe, low: 1e-3, high: 1, trials: 9}\nprune: true")))
        assert study.sampler == Tpe(low=0.001, high=1.0, trials=9, seed=0)
        assert study.prune

    @pytest.mark.parametrize("name", SHIPPED)
    def test_shipped_studies_are_found_by_name(self, name):
        study = load(name)
        assert study.name == name
        if study.program == "tiny/prose":
            assert study.stability.max_loss is not None, "a bound is to be fixed before the study is run"
        assert study.sampler != Grid() or list(study.cells.values())

    @pytest.mark.parametrize(
        ("old", "new", "line", "message"),
        [
            ("seeds: [0, 1]", "seeds: []", 11, "seeds must hold at least one seed, got []"),
            ("seeds: [0, 1]", "seeds: [0, true]", 11, "seeds[1] must be a whole number, got True"),
            ("seeds: [0, 1]", "seeds: [0, 0]", 11, "seeds must not hold 0 twice"),
            ("seeds: [0, 1]", "seeds: [-1]", 11, "seeds must be between 0 and 2³² - 1, got -1"),
            ("seeds: [0, 1]", "seeds: 3", 11, "seeds must be a list, got 3"),
            ("seeds: [0, 1]\n", "", 1, "seeds is missing"),
            ("seeds: [0, 1]", "seed: [0, 1]", 11, "unknown key 'seed', did you mean seeds?"),
            ("seeds: [0, 1]", "seeds: [0]\nseeds: [1]", 12, "seeds is there twice, first in line 11"),
            ("steps: 300", "steps: 3e2", 2, "steps must be a whole number, got 300.0"),
            ("steps: 300", "steps: !!bool foo", 2, "a part must be one of the kind bool, got 'foo'"),
            ("steps: 300", "steps: !!timestamp foo", 2, "a part must be one of the kind timestamp, got 'foo'"),
            ("steps: 300", "steps: 5", 2, "steps must be between 20 and 1,000,000,000, got 5"),
            ("program: tiny/prose", "program: tiny/poetry", 1, "program must be the name of a recipe, a file"),
            ("program: tiny/prose", "program: a..b:c", 1, "program must be the name of a recipe, a file"),
            ("program: tiny/prose", "program: plain:1x", 1, "program must be the name of a recipe, a file"),
            ("  - msign\n", "  - msing\n", 5, "unknown arm 'msing', did you mean msign"),
            ("  - msign\n", "  - adamw\n", 5, "arms must not hold adamw twice"),
            ("base: msign", "base: mzign", 6, "unknown arm 'mzign', did you mean"),
            ("name: narrow", "name: cap", 6, "the name of a variant must not be that of an arm, got 'cap'"),
            ("name: narrow, ", "", 6, "name is missing"),
            ("[3e-3, 0.03]", "[0.03, 0]", 8, "lr must be positive and finite, got 0"),
            ("[3e-3, 0.03]", "[.inf]", 8, "lr must be positive and finite, got inf"),
            ("[3e-3, 0.03]", "[fast]", 8, "lr must be positive and finite, got 'fast'"),
            ("  lr: [3e-3, 0.03]\n", "", 7, "factors must hold lr for a grid"),
            ("  period: [5, 20]", "  perod: [5, 20]", 9, "unknown factor 'perod', did you mean period?"),
            ("  period: [5, 20]", "  period: []", 9, "period must hold at least one value, got []"),
            ("  period: [5, 20]", "  period: [5, 2.5]", 9, "period must be a positive integer, got 2.5"),
            ("  period: [5, 20]", "  period:\n  - 5\n  - 200", 11, "steps must be enough for msign to restore once"),
            ("  period: [5, 20]", "  msign.period: [5]", 9, "msign.period must be written period"),
            (
                "  model.config.n_layers",
                "  data.seed",
                10,
                "data.seed must not be a factor or a setting: seeds sets it",
            ),
            ("  data.batch_size: 8", "  period: 5", 9, "period must be a factor or a setting, not both"),
            (
                "  data.batch_size: 8",
                "  data.batch_size: null",
                14,
                "settings.data.batch_size must be a string, a number",
            ),
            (
                "  data.batch_size: 8",
                "  use_msign: true",
                14,
                "use_msign must not be a factor or a setting: the arm sets",
            ),
            ("  data.batch_size: 8", "  lr: 0.1", 14, "lr must be a factor, not a setting"),
            ("  data.batch_size: 8", "  data.batch_size:", 14, "settings.data.batch_size must be a string, a number"),
            ("{model.config.width: 16}", "{period: 0}", 6, "period must be a positive integer, got 0"),
            ("{model.config.width: 16}", "{period: abc}", 6, "period must be a positive integer, got 'abc'"),
            ("{model.config.width: 16}", "{period: 299}", 6, "steps must be enough for narrow to restore once"),
            ("{model.config.width: 16}", "{lr: 0.1}", 6, "lr must be a factor, not a setting"),
            ("  max_loss: 2.5", "  max_loss: 0", 16, "max_loss must be positive and finite, got 0"),
            ("  max_loss: 2.5", "  bound: 2.5", 16, "unknown key 'bound'; known: max_loss, delta"),
            ("sampler: grid", "sampler: grit", 17, "sampler must be one of grid, bisect, tpe, got 'grit'"),
            ("sampler: grid", "sampler: {name: bisect, low: 1}", 17, "high is missing"),
            ("sampler: grid", "sampler: {name: bisect, low: 1, high: 2}", 8, "lr must not be a factor with bisect"),
            ("sampler: grid", "sampler: {name: grid, low: 1}", 17, "unknown key 'low'; known: none"),
            ("sampler: grid", "prune: true", 17, "prune must be false with grid"),
            ("sampler: grid", "prune: maybe", 17, "prune must be true or false, got 'maybe'"),
            ("seeds: [0, 1]", "seeds: [0, 1", 12, "expected ',' or ']'"),
            ("seeds: [0, 1]", "seeds: [1:30]", 11, "seeds[0] must be a whole number, got '1:30'"),
            ("steps: 300", "steps: 1000000000000000000000", 2, "between 20 and 1,000,000,000, got 1e+21"),
            ("sampler: grid", "sampler: [grid]", 17, "sampler must be one of grid, bisect, tpe, got ['grid']"),
            ("program: tiny/prose", "program: nowhere", 1, "program must be the name of a recipe, a file, or"),
            ("seeds: [0, 1]", "seeds: [!seed 1]", 11, "could not determine a constructor for the tag '!seed'"),
            ("seeds: [0, 1]", "seeds: [2020-13-01]", 11, "seeds[0] must be a whole number, got '2020-13-01'"),
            ("steps: 300", f"steps: {'1' * 5000}", 2, "a part must be one of the kind int, got '111"),
            ("max_loss: 2.5", f"max_loss: {'1' * 400}", 16, "max_loss must be positive and finite, got inf"),
            ("seeds: [0, 1]", "seeds: [0]\x07", 1, "unacceptable character #x0007"),
            ("  period: [5, 20]", "  targets: [attention, [mlp, head], 'mlp,head']", 9, "must not hold mlp,head twice"),
            ("  data.batch_size: 8", "  data.batch_size: .nan", 14, "batch_size must be a string, a number"),
            ("name: narrow", "name: ''", 6, "the name of a variant must be printable and not empty, got ''"),
        ],
    )
    def test_errors_name_file_line_and_rule(self, write, old, new, line, message):
        assert SOUND.count(old) == 1
        file = write(SOUND.replace(old, new))
        with pytest.raises(StudyError) as error:
            load(file)
        assert str(error.value).startswith(f"{file}:{line}: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("sampler", "message"),
        [
            (Bisect(1.0, 0.1), "low and high must be positive and finite, low below high, got 1.0 and 0.1"),
            (Bisect(0.1, 1.0, resolution=0), "resolution must be positive and at most the decades .*, got 0"),
            (Bisect(0.1, 1.0, resolution=2), "resolution must be positive and at most the decades .*, got 2"),
            (Tpe(0.1, 1.0, seed=2**31), "seed must be below 2³¹, got 2147483648"),
            (Bisect(0.1, 1.0, runs=0), "runs must be at least 1, got 0"),
            (Tpe(0.1, 1.0, trials=0), "trials must be at least 1, got 0"),
        ],
    )
    def test_samplers_out_of_range(self, sampler, message):
        with pytest.raises(StudyError, match=message):
            make(factors={}, sampler=sampler)

    def test_pruning_only_with_tpe(self):
        with pytest.raises(StudyError, match="prune must be false with bisect"):
            make(factors={}, sampler=Bisect(0.1, 1.0), prune=True)

    def test_a_factor_that_changes_no_arm_is_refused(self):
        with pytest.raises(StudyError, match=r"the factor period concerns none of the arms \['adamw'\]"):
            make(arms=["adamw"], factors={"lr": [0.1], "period": [5]})

    def test_the_period_of_a_variant_is_its_own(self):
        variants = {"short": Variant("msign_first_quarter", {"period": 5})}
        study = make(arms=["short", "msign"], variants=variants, factors={"lr": [0.1], "period": [100]})
        assert [group.label for group in study.groups] == ["short", "msign (period=100)"]

    def test_an_arm_that_would_never_restore_is_refused(self):
        make(arms=["msign_first_quarter"], factors={"lr": [0.1], "period": [75]})
        with pytest.raises(
            StudyError, match=r"msign_first_quarter to restore once .* within 0\.25 of the run, got 300"
        ):
            make(arms=["msign_first_quarter"], factors={"lr": [0.1], "period": [76]})

    @pytest.mark.parametrize("text", ["", "[1, 2]", "quick"])
    def test_files_without_a_mapping(self, write, text):
        with pytest.raises(StudyError, match=r"mine\.yaml:1: a study must be a mapping"):
            load(write(text))

    @pytest.mark.parametrize("text", ["&a\nprogram: *a", "program: &a [*a]", f"program: {'[' * 3000 + ']' * 3000}"])
    def test_files_without_an_end(self, write, text):
        with pytest.raises(StudyError, match="parts must not hold themselves or be nested a thousand deep"):
            load(write(text))

    def test_an_alias_bomb_is_not_set_off(self, write):
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
        with pytest.raises(StudyError, match=r"mine\.yaml:1: a study must have at most 10,000 parts"):
            load(write("\n".join(lines)))

    def test_scalars_are_those_of_yaml_1_2(self, write):
        text = SOUND.replace("seeds: [0, 1]", "seeds: [010, +7]").replace("data.batch_size: 8", "data.source: yes")
        study = load(write(text))
        assert study.seeds == (10, 7)
        assert study.settings["data.source"] == "yes"

    def test_no_bound_can_be_written_down(self, write):
        assert load(write(SOUND.replace("max_loss: 2.5", "max_loss: null"))).stability == Criterion()

    @pytest.mark.parametrize("name", ["..", ".", " .", "a/b", "x" * 101, "a\nb"])
    def test_names_that_no_folder_can_have(self, name):
        with pytest.raises(StudyError, match="the name of a study must be usable as that of a folder"):
            Study(name, "tiny/prose", 300, ["adamw"], {"lr": [0.01]}, [0])

    def test_a_file_that_names_the_parent_folder_is_refused(self, tmp_path):
        (tmp_path / "...yaml").write_text(SOUND)
        with pytest.raises(StudyError, match=r"\.\.\.yaml:1: the name of a study must be usable .* got '\.\.'"):
            load(tmp_path / "...yaml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"- a", "a program's file must be a mapping, got \\['a'\\]"), (b"a: [", "expected"), (b"\xff", "UTF-8")],
    )
    def test_programs_that_are_no_mapping_or_no_yaml(self, write, tmp_path, content, message):
        program = tmp_path / "program.yaml"
        program.write_bytes(content)
        study = load(write(SOUND.replace("tiny/prose", str(program))))
        with pytest.raises(StudyError, match=rf"program\.yaml:1: .*{message}"):
            study.fingerprint()

    def test_own_arms_need_no_base(self, write):
        study = load(write(SOUND.replace("{name: narrow, base: msign, ", "{name: narrow, ")))
        assert study.variants["narrow"].base == "adamw"

    def test_files_that_are_not_there_or_no_text(self, tmp_path):
        with pytest.raises(StudyError, match="no study file 'quik', did you mean quick"):
            load("quik")
        (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x00\x9f")
        with pytest.raises(StudyError, match=r"noise\.yaml:1: a study must be a text file in UTF-8"):
            load(tmp_path / "noise.yaml")

    def test_reading_needs_neither_torch_nor_lightning(self):
        program = (
            "import sys; from msign_lightning.ablations.study import load; load('quick').cells; "
            "print({'torch', 'lightning'} & {*sys.modules})"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "set()"


class TestCells:
    def test_arms_are_crossed_only_with_what_concerns_them(self):
        study = make(
            arms=["adamw", "msign", "msign_attention", "cap", "qk_norm"],
            factors={"lr": [0.1, 0.2], "period": [5, 20], "targets": ["mlp", "all_2d"], "model.config.qk_norm": [True]},
            seeds=[3, 1],
        )
        qk = ("model.config.qk_norm", True)
        per_arm = {arm: [g.factors for g in study.groups if g.arm == arm] for arm in study.arms}
        assert per_arm["adamw"] == [(qk,)]
        assert per_arm["qk_norm"] == [()]
        assert per_arm["msign_attention"] == [(qk, ("period", 5)), (qk, ("period", 20))]
        for arm in ("msign", "cap"):
            assert per_arm[arm] == [(qk, ("period", p), ("targets", t)) for p in (5, 20) for t in ("mlp", "all_2d")]
        cells = list(study.cells.values())
        assert len(cells) == len(set(cells)) == len({cell.key for cell in cells}) == 2 * 2 * len(study.groups)
        assert [cell.seed for cell in cells] == [3] * 24 + [1] * 24, "a study that is cut off has whole seeds"
        assert {cell.group for cell in cells} == set(study.groups)

    def test_cells_of_a_search_are_not_known_beforehand(self):
        study = make(factors={}, sampler=Bisect(0.1, 1.0))
        assert not study.cells
        assert study.holds(Group("msign").cell(0.3, 0))
        assert not study.holds(Group("msign").cell(0.3, 1))

    def test_a_variant_is_its_base_with_further_settings(self):
        variants = {"wide": Variant("cap", {"targets": "mlp", "model.config.width": 64})}
        factors = {"lr": [0.1], "targets": ["mlp"], "period": [5]}
        study = make(arms=["wide", "cap"], variants=variants, factors=factors)
        wide = study.arm("wide")
        assert wide.settings == {"msign.rule": "cap", "msign.targets": "mlp", "model.config.width": 64}
        assert (wide.until, wide.callback) == (ARMS["cap"].until, ARMS["cap"].callback)
        assert [g.label for g in study.groups] == ["wide (period=5)", "cap (period=5, targets=mlp)"]

    def test_the_key_is_that_of_earlier_versions(self):
        cell = Group("msign", (("period", 20), ("targets", ("*q*", "*k*")))).cell(0.03, seed=1)
        assert cell.key == "bb79ff227b5576a7"
        assert cell.folder == f"msign_period=20_targets=_q_k_lr=0.03_seed=1_{cell.key[:6]}"
        others = [cell._replace(seed=2), cell._replace(arm="cap"), cell.group.cell(0.031, 1)]
        assert len({c.key for c in [cell, *others]}) == 4
        flags = [Cell("a", (("lr", 0.1), ("x", value)), 0).key for value in (1, True, 1.5, "1")]
        assert len(set(flags)) == 4

    scalars = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
    values = st.one_of(scalars, st.lists(scalars, max_size=3).map(tuple))

    @given(
        factors=st.dictionaries(st.text(), values, max_size=4), lr=st.floats(1e-9, 1e9), seed=st.integers(0, 2**32 - 1)
    )
    def test_cells_go_to_json_and_back(self, factors, lr, seed):
        factors.pop("lr", None)
        cell = Group("msign", tuple(sorted(factors.items(), key=lambda f: f[0]))).cell(lr, seed)
        again = Cell.from_dict(json.loads(json.dumps(cell.as_dict())))
        assert again == cell
        assert (again.key, again.lr, again.group) == (cell.key, lr, cell.group)
        assert "/" not in cell.folder
        assert len(cell.folder.encode()) < 256

    def test_a_list_of_lists_comes_back(self):
        cell = Group("adamw", (("model.x", ((1, 2), (3, 4))),)).cell(0.1, 0)
        again = Cell.from_dict(json.loads(json.dumps(cell.as_dict())))
        assert (again, hash(again)) == (cell, hash(cell))


class TestIdentityOfStudies:
    def test_the_same_study_has_no_changes_through_json(self, write):
        study = load(write(SOUND))
        stored = json.loads(json.dumps(study.fingerprint()))
        assert changes(stored, load(write("# a comment\n" + SOUND)).fingerprint()) == []

    @pytest.mark.parametrize(
        ("old", "new", "change"),
        [
            ("steps: 300", "steps: 400", "steps: 300 → 400"),
            ("[3e-3, 0.03]", "[3e-3]", "factors.lr: [0.003, 0.03] → [0.003]"),
            ("seeds: [0, 1]", "seeds: [0, 1, 2]", "seeds: [0, 1] → [0, 1, 2]"),
            ("max_loss: 2.5", "delta: 0.2", "stability.delta: 0.5 → 0.2"),
            ("  data.batch_size: 8\n", "", "settings.data.batch_size: 8 → nothing"),
            ("width: 16", "width: 8", "variants.narrow.settings.model.config.width: 16 → 8"),
        ],
    )
    def test_changes_say_what_changed(self, write, old, new, change):
        before = load(write(SOUND)).fingerprint()
        assert change in changes(before, load(write(SOUND.replace(old, new))).fingerprint())

    def test_a_changed_recipe_is_a_change(self, write, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("model: {optimizer: {init_args: {lr: 0.01}}}")
        study = load(write(SOUND.replace("tiny/prose", str(recipe))))
        before = study.fingerprint()
        recipe.write_text("model: {optimizer: {init_args: {lr: 0.02}}}  # faster")
        assert changes(before, study.fingerprint()) == ["program.file.model.optimizer.init_args.lr: 0.01 → 0.02"]

    def test_a_changed_configuration_is_a_change(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 5}")
        study = make(settings={"config": str(tmp_path / "mine.yaml")})
        before = study.fingerprint()
        (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 6}")
        assert changes(before, study.fingerprint()) == ["program.config.trainer.max_steps: 5 → 6"]


class TestCriterion:
    GOOD = Outcome(
        val_loss=2.4,
        initial_loss=5.5,
        best_loss=2.4,
        final_loss=2.5,
        diverged_at=None,
        collapsed_at=None,
        spikes=3,
        max_grad_norm=1.0,
        stable_rank=4.0,
        steps=1000,
        steps_per_second=1e4,
        seconds=1.0,
        curve=((1, 5.5), (1000, 2.5)),
    )

    @pytest.mark.parametrize(
        ("criterion", "changed", "stable"),
        [
            (Criterion(), {}, True),
            (Criterion(), {"diverged_at": 7, "val_loss": None, "final_loss": None}, False),
            (Criterion(max_loss=2.4), {}, True),
            (Criterion(max_loss=2.39), {}, False),
            (Criterion(delta=0.5), {"final_loss": 2.9}, True),
            (Criterion(delta=0.5), {"final_loss": 2.91}, False),
            (Criterion(delta=9.0), {"final_loss": 5.5}, True),
            (Criterion(delta=9.0), {"final_loss": 5.51}, False),
            (Criterion(spikes_per_10k=30), {}, True),
            (Criterion(spikes_per_10k=29), {}, False),
            (Criterion(spikes_per_10k=0), {"spikes": 0}, True),
        ],
    )
    def test_is_stable(self, criterion, changed, stable):
        assert criterion.is_stable(self.GOOD._replace(**changed)) is stable

    def test_outcomes_go_to_json_and_back(self):
        diverged = self.GOOD._replace(val_loss=None, diverged_at=3, stable_rank=None)
        for outcome in (self.GOOD, diverged):
            assert Outcome.from_dict(json.loads(json.dumps(outcome.as_dict()))) == outcome
