"""Data sets held as uint8, and the augmentation that runs inside jit."""

from ehap_jax.data.augment import Augmentation as Augmentation
from ehap_jax.data.augment import augment as augment
from ehap_jax.data.augment import normalise as normalise
from ehap_jax.data.dataset import Dataset as Dataset
from ehap_jax.data.dataset import Normalisation as Normalisation
from ehap_jax.data.dataset import limit_training as limit_training
from ehap_jax.data.dataset import make_dataset as make_dataset
from ehap_jax.data.load import load_dataset as load_dataset
