"""Every recipe as a person types it: what is misspelt, missing, already there, changed or interrupted."""

import os
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.training import RunDirectory
from recipes import (
    compare_criteria,
    compare_estimators,
    compare_precision,
    compare_torch,
    ehap,
    pretrain,
    prune,
    quantize,
    quickstart,
    reproduce,
    spectrum,
    sweep,
    trace,
)
from tests.recipes.tiny import MODEL

FROM_A_NETWORK = {
    compare_criteria: ["short"],
    compare_estimators: ["short"],
    compare_precision: ["short"],
    prune: ["short"],
    quantize: ["short"],
    reproduce: ["cpu"],
    spectrum: ["short"],
    sweep: ["short"],
    trace: ["short"],
}
"""Recipe -> the words before the network it starts from."""
FROM_NOTHING = {ehap: ["digits"], pretrain: ["digits"], quickstart: []}
VARIANTS = [*FROM_A_NETWORK, ehap, pretrain]


def words(recipe, network="nowhere"):
    """A whole command, but for its output."""
    if recipe is compare_torch:
        return [str(network), "--data", "npz:nowhere.npz"]
    return [*FROM_A_NETWORK[recipe], str(network)] if recipe in FROM_A_NETWORK else FROM_NOTHING[recipe]


def typed(recipe, capsys, *given):
    """(exit status, standard error) of a command; tyro exits where it cannot parse one."""
    try:
        status = recipe.command([str(word) for word in given])
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr().err


def names(cases):
    return [recipe.__name__.rpartition(".")[2] for recipe in cases]


@pytest.mark.parametrize("recipe", FROM_NOTHING, ids=names(FROM_NOTHING))
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", "digts", "unknown data set 'digts'; did you mean 'digits'?; known"),
        ("--data", "npz:nowhere.npz", "there is no data file nowhere.npz"),
        ("--data", "folder:nowhere", "there is no folder nowhere/train"),
        ("--model", "renset8", "unknown model 'renset8'; did you mean 'resnet8'?"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(tmp_path, capsys, recipe, option, value, message):
    given = [*FROM_NOTHING[recipe], *MODEL, option, value, "--output", tmp_path / "run"]
    status, error = typed(recipe, capsys, *given)
    assert status == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", FROM_A_NETWORK, ids=names(FROM_A_NETWORK))
def test_a_missing_network_is_told_the_nearest(tmp_path, capsys, recipe):
    (tmp_path / "pretrain").mkdir()
    given = [*words(recipe, tmp_path / "pretrian"), "--data", "digits", "--output", tmp_path / "run"]
    status, error = typed(recipe, capsys, *given)
    assert status == 2 and len(error.splitlines()) == 1
    assert f"there is no checkpoint or run directory {tmp_path}/pretrian; did you mean '{tmp_path}/pretrain'?" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", VARIANTS, ids=names(VARIANTS))
def test_a_misspelt_variant_is_told_the_right_ones(capsys, recipe):
    right = words(recipe)[0]
    status, error = typed(recipe, capsys, right[:-1] + "x", *words(recipe)[1:])
    assert status == 2 and right in error


@pytest.mark.parametrize("recipe", [*FROM_A_NETWORK, *FROM_NOTHING], ids=names([*FROM_A_NETWORK, *FROM_NOTHING]))
def test_a_misspelt_option_is_told_the_nearest(capsys, recipe):
    status, error = typed(recipe, capsys, *words(recipe), "--otput", "somewhere")
    assert status == 2 and "--output" in error


EVERY: list = [*FROM_A_NETWORK, *FROM_NOTHING, compare_torch]


@pytest.mark.parametrize("recipe", EVERY, ids=names(EVERY))
def test_what_is_there_already_is_kept(tmp_path, capsys, recipe):
    """Found before anything is read: the network and the data of these commands do not exist."""
    RunDirectory.create(tmp_path / "run")
    status, error = typed(recipe, capsys, *words(recipe), "--output", tmp_path / "run")
    assert status == 2 and len(error.splitlines()) == 1 and "already exists" in error and "--overwrite" in error
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    status, error = typed(recipe, capsys, *words(recipe), "--output", tmp_path / "thesis", "--overwrite")
    assert status == 2 and "is not a run directory" in error
    (tmp_path / "file").write_text("dear")
    status, error = typed(recipe, capsys, *words(recipe), "--output", tmp_path / "file")
    assert status == 2 and "is a file" in error
    assert (tmp_path / "file").read_text() == "dear" and (tmp_path / "thesis" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("recipe", EVERY, ids=names(EVERY))
def test_where_nothing_can_be_written_is_told_first(tmp_path, capsys, recipe):
    """Before the network and the data are looked for. Permissions do not stop root; /proc and files as folders do."""
    (tmp_path / "file").write_text("dear")
    places = {tmp_path / "file" / "runs" / "a": "is a file; choose another path"}
    if Path("/proc/self").is_dir():
        places[Path("/proc/ehap_jax/run")] = "cannot write in /proc (No such file or directory); choose another path"
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        places[tmp_path / "closed" / "run"] = f"cannot write in {tmp_path}/closed (Permission denied); choose another"
    for place, message in places.items():
        status, error = typed(recipe, capsys, *words(recipe), "--output", place)
        assert status == 2 and len(error.splitlines()) == 1 and message in error
    assert (tmp_path / "file").read_text() == "dear"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pretrain, quickstart], ids=names([pretrain, quickstart]))
def test_settings_that_changed_before_a_resume_are_named(tmp_path, capsys, recipe):
    RunDirectory.create(tmp_path / "run", {"data": "digits", "seeds": 99})
    given = [*FROM_NOTHING[recipe], *MODEL, "--output", tmp_path / "run", "--resume"]
    status, error = typed(recipe, capsys, *given)
    assert status == 2 and len(error.splitlines()) == 1
    assert f"cannot resume {tmp_path}/run with another configuration" in error and "seeds: 99 there" in error


@pytest.mark.parametrize("recipe", EVERY, ids=names(EVERY))
def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch, recipe):
    RunDirectory.create(tmp_path / "run")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "main", interrupted)
    again = ["--overwrite"] if recipe is compare_torch else ["--resume"]
    status, error = typed(recipe, capsys, *words(recipe), "--output", tmp_path / "run", *again)
    hint = "" if recipe is compare_torch else "; continue with --resume"
    assert (status, error) == (130, f"{names([recipe])[0]}: interrupted{hint}\n")
