"""The 1,797 handwritten digits that ship inside scikit-learn: real images that need no network."""

import numpy as np

from ehap_jax.data.augment import Augmentation
from ehap_jax.data.dataset import Source, stratified_split

# The test split is the same whatever the seed of a run, so that accuracies are comparable.
_TEST_FRACTION = 0.2
_TEST_SEED = 2023


def read_digits() -> Source:
    """scikit-learn's digits as uint8 (N, 8, 8, 1), 10 classes: 359 test images, fixed and stratified.

    The source's 17 grey levels 0..16 become 0..255, rounded. Augmentation is a shift by one pixel and no flip: a
    mirrored digit is another sign.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits data set needs scikit-learn: pip install 'ehap-jax[digits]'") from error
    levels, labels = load(return_X_y=True)
    images = np.rint(np.asarray(levels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(labels).astype(np.int32)
    in_train, in_test = stratified_split(labels, _TEST_FRACTION, _TEST_SEED)
    return Source(
        "digits",
        (images[in_train], labels[in_train]),
        (images[in_test], labels[in_test]),
        num_classes=10,
        augmentation=Augmentation(crop_padding=1),
    )
