"""Networks, phases and cells of seconds, for recipes."""

import json

MODEL = ["--data", "digits", "--widths", "4", "4", "8"]


def phase(name, epochs=1):
    return [f"--{name}.epochs", str(epochs), f"--{name}.batch-size", "256", f"--{name}.warmup", "0"]


def read(path):
    return json.loads(path.read_text())


CELLS = [
    "--cells.criteria", "hessian", "random", "--cells.keeps", "0.5", "--cells.seeds", "1",
    "--cells.prune.scores.examples", "16", *phase("cells.finetune"), *phase("cells.int8"), "--train-images", "256",
]  # fmt: skip
