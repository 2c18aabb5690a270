"""The digits that come with scikit-learn: 1797 handwritten digits of 8 x 8 pixels, no download."""

import numpy as np

MAX_PIXEL = 16
NUM_TEST = 360
SPLIT_SEED = 0  # fixed for good: another seed is another benchmark


def read_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits in one fixed stratified split, as ((images, labels), (images, labels)).

    Returns: 1437 for training, then 360 for testing; images [N, 8, 8] with pixels 0 to 16, labels [N] 0 to 9.
    Raises ModuleNotFoundError where scikit-learn is not installed.
    """
    try:  # imported here because it costs a second that other data sets need not pay
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the data set "digits" comes with scikit-learn, which is missing; pip install "pctt[data]"'
        ) from error

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=NUM_TEST, random_state=SPLIT_SEED, stratify=labels
    )
    return (images[train], labels[train]), (images[test], labels[test])
