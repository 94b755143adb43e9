"""Training, evaluation, checkpoints and run directories for any pure function."""

from ehap_jax.training.checkpoint import Checkpoints as Checkpoints
from ehap_jax.training.deadline import Deadline as Deadline
from ehap_jax.training.deadline import OutOfTime as OutOfTime
from ehap_jax.training.epoch import EpochMetrics as EpochMetrics
from ehap_jax.training.epoch import data_mesh as data_mesh
from ehap_jax.training.epoch import forward_from_apply as forward_from_apply
from ehap_jax.training.epoch import frozen_forward as frozen_forward
from ehap_jax.training.epoch import low_precision as low_precision
from ehap_jax.training.epoch import make_epoch as make_epoch
from ehap_jax.training.epoch import training_inputs as training_inputs
from ehap_jax.training.evaluate import Evaluation as Evaluation
from ehap_jax.training.evaluate import evaluation_inputs as evaluation_inputs
from ehap_jax.training.evaluate import make_evaluate as make_evaluate
from ehap_jax.training.fit import fit as fit
from ehap_jax.training.losses import Teacher as Teacher
from ehap_jax.training.losses import cross_entropy as cross_entropy
from ehap_jax.training.losses import distillation_loss as distillation_loss
from ehap_jax.training.losses import smoothed_cross_entropy as smoothed_cross_entropy
from ehap_jax.training.optimizer import sgd_cosine as sgd_cosine
from ehap_jax.training.progress import Progress as Progress
from ehap_jax.training.run_directory import RunDirectory as RunDirectory
from ehap_jax.training.state import TrainState as TrainState
from ehap_jax.training.state import check_finite as check_finite
from ehap_jax.training.state import create_train_state as create_train_state
from ehap_jax.training.variables_file import load_variables as load_variables
from ehap_jax.training.variables_file import save_variables as save_variables
