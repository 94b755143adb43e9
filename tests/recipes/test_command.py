"""What every recipe refuses before it writes anything, and its exit statuses."""

import errno
import re
import signal
import time

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn: pip install 'ehap-jax[digits]'")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'ehap-jax[report]'")
from ehap_jax.training import OutOfTime, RunDirectory
from recipes import (
    command,
    compare_criteria,
    compare_estimators,
    compare_precision,
    ehap,
    pretrain,
    prune,
    quantize,
    reproduce,
    spectrum,
    sweep,
    trace,
)
from recipes.command import Missed, run_command
from tests.recipes.tiny import MODEL

REPRODUCE = ["cpu", "DENSE", "--train-images", "512"]


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (prune, ["short", "DENSE", "--train-images", "512", "--prune.keep", "0.001"], "out of reach"),
        (prune, ["short", "DENSE", "--train-images", "512", "--prune.steps", "0"], "--prune.steps must be at least 1"),
        (
            prune,
            ["short", "DENSE", "--train-images", "512", "--finetune.batch-size", "5000"],
            "--finetune.batch-size 5000",
        ),
        (prune, ["short", "DENSE", "--prune.scores.probes", "0", "--train-images", "512"], "--prune.scores.probes"),
        (prune, ["short", "nowhere"], "no checkpoint or run directory nowhere"),
        (reproduce, ["cpu", "nowhere"], "no checkpoint or run directory nowhere"),
        (trace, ["short", "DENSE", "--scores.examples", "100000"], "100000 images"),
        (
            compare_criteria,
            ["short", "DENSE", "--train-images", "512", "--cells.keeps", "1.5"],
            "--cells.keeps are fractions",
        ),
        (compare_criteria, ["short", "DENSE", "--train-images", "512", "--cells.seeds", "0"], "--cells.seeds"),
        (
            sweep,
            [
                "short",
                "DENSE",
                "--train-images",
                "512",
                "--cells.prune.steps",
                "2",
                "--cells.prune.between.epochs",
                "0",
            ],
            "--cells.prune.between.epochs",
        ),
        (reproduce, [*REPRODUCE, "--cells.int8.batch-size", "99999"], "--cells.int8.batch-size 99999"),
        (reproduce, [*REPRODUCE, "--cells.keeps", "1.5"], "--cells.keeps are fractions"),
        (reproduce, [*REPRODUCE, "--cells.keeps", "0.0001"], "out of reach"),
        (reproduce, [*REPRODUCE, "--cells.prune.steps", "0"], "--cells.prune.steps must be at least 1"),
        (reproduce, [*REPRODUCE, "--precision.scores.examples", "9999"], "--precision.scores.examples"),
        (pretrain, ["digits", "--phase.distill", "0.5"], "--phase.distill 0.5: this phase has no teacher"),
        (ehap, ["digits", "--int8.distill", "0.5"], "--int8.distill 0.5"),
        (quantize, ["short", "DENSE", "--train-images", "512", "--qat.distill", "0.5"], "--qat.distill 0.5"),
        (
            prune,
            ["short", "DENSE", "--train-images", "512", "--prune.steps", "2", "--prune.between.distill", "0.5"],
            "--prune.between.distill 0.5",
        ),
        (compare_precision, ["short", "DENSE", "--computes", "float32", "float32"], "--computes"),
        (sweep, ["short", "DENSE", "--max-minutes", "0"], "positive number of minutes"),
        (sweep, ["short", "DENSE", "--train-images", "512", "--cells.keeps", "0.001"], "out of reach"),
        (ehap, ["digits", "--model", "alexnet"], "unknown model 'alexnet'"),
        (pretrain, ["digits", "--model", "vgg11"], "vgg11 does not take --shortcut"),
        (pretrain, ["digits", "--train-images", "9999"], "cannot take 9999"),
        (pretrain, ["digits", "--phase.label-smoothing", "1"], "--phase.label-smoothing"),
        (pretrain, ["digits", "--phase.average", "1.5"], "--phase.average"),
        (pretrain, ["digits", "--phase.distill", "2"], "--phase.distill"),
        (pretrain, ["digits", "--phase.warmup", "30"], "--phase.warmup"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(dense, tmp_path, capsys, recipe, arguments, message):
    given = [str(dense) if word == "DENSE" else word for word in arguments]
    assert recipe.command([*given, "--data", "digits", "--output", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


DATA_OF_ANOTHER_KIND = [(12, (8, 8, 1), "10 classes apart, .* has 12"), (10, (16, 16, 1), "8 × 8 × 1, .* 16 × 16 × 1")]


@pytest.mark.parametrize(("classes", "shape", "message"), DATA_OF_ANOTHER_KIND)
@pytest.mark.parametrize(
    "recipe",
    [prune, trace, compare_criteria, compare_precision, compare_estimators, quantize, spectrum, reproduce, ehap],
)
def test_data_that_does_not_fit_the_network(dense, tmp_path, capsys, recipe, classes, shape, message):
    def images(count):
        return np.zeros((count, *shape), np.uint8), np.arange(count) % classes

    (x_train, y_train), (x_test, y_test) = images(10 * classes), images(classes)
    np.savez(tmp_path / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    variant = {reproduce: "cpu", ehap: "digits"}.get(recipe, "short")
    network = ["--dense", str(dense)] if recipe is ehap else [str(dense)]
    given = [variant, *network, "--data", f"npz:{tmp_path / 'data.npz'}", "--output", str(tmp_path / "run")]
    assert recipe.command(given) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FloatingPointError("the training loss of epoch 1 is nan"), 2),
        (ArithmeticError("the shrunk network differs from the masked one"), 2),
        (NotImplementedError("no rule for this primitive"), 2),
        (Missed("the integers are 1.00 points from float training"), 1),
        (OutOfTime("stopped after 1 minutes"), 3),
        (OSError(errno.EACCES, "Permission denied", "runs/a"), 2),
    ],
)
def test_a_run_that_failed_is_told_from_one_that_missed_its_bounds(capsys, tmp_path, error, status):
    assert failing(error, tmp_path) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pretrain: {error}")


def failing(error, output, *, started=False):
    """The exit status of a recipe that raises, before or after it has made its run directory."""

    def main(*_):
        if started:
            RunDirectory.create(output)
        raise error

    return run_command(main, pretrain.VARIANTS, ["digits", "--output", str(output)], name="pretrain")


@pytest.mark.parametrize("started", [True, False])
def test_an_interrupted_run_says_how_to_go_on(capsys, tmp_path, started):
    assert failing(KeyboardInterrupt(), tmp_path / "run", started=started) == 130
    hint = "; continue with --resume" if started else ""
    assert capsys.readouterr().err == f"pretrain: interrupted{hint}\n"


def test_an_interrupt_that_python_drops_comes_again(capsys, tmp_path, request):
    """As JAX's callback of the garbage collector loses it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Callback:
        def __del__(self):
            raise KeyboardInterrupt

    def main(*_):
        callback = Callback()
        del callback
        time.sleep(30)
        raise AssertionError("the interrupt was lost")

    assert run_command(main, pretrain.VARIANTS, ["digits", "--output", str(tmp_path)], name="pretrain") == 130
    assert capsys.readouterr().err == "pretrain: interrupted\n"


def behind(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        behind(RuntimeError("a thread failed"), OSError(errno.EDQUOT, "Disk quota exceeded")),
        ValueError('RESOURCE_EXHAUSTED: Error writing "key/0": No space left on device'),
    ],
)
def test_a_full_disk_is_one_line(capsys, tmp_path, error):
    assert failing(error, tmp_path / "run", started=True) == 2
    expected = f"pretrain: no space left for {tmp_path}/run; make some; continue with --resume\n"
    assert capsys.readouterr().err == expected


def test_names_from_files_stay_on_one_line_and_command_no_terminal(capsys, tmp_path):
    assert failing(ValueError("bad name 'a\n\x1b[2J\u202eb'"), tmp_path) == 2
    assert capsys.readouterr().err == "pretrain: bad name 'a \\x1b[2J\\u202eb'\n"


def test_a_programming_error_keeps_its_traceback(tmp_path):
    with pytest.raises(AttributeError):
        failing(AttributeError("'int' object has no attribute 'dtype'"), tmp_path)


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("tensorboard", ["--tensorboard"], "no tensorboard here: .*ehap-jax.tensorboard"),
        ("wandb", ["--wandb"], "pip install wandb"),
        ("jinja2", [], "no jinja2 here: .*ehap-jax.report"),
    ],
)
def test_a_missing_package_is_found_before_anything_is_written(
    tmp_path, capsys, monkeypatch, missing, options, message
):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else name)
    given = ["digits", *MODEL, *options, "--output", str(tmp_path / "run")]
    assert pretrain.command(given) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()
