"""What several tests of data start from."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write(tmp_path):
    """write("cat/1.png", array or image, ...) into a folder named photos."""

    def write(name, image, **settings):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **settings)
        return tmp_path / "photos"

    return write
