import numpy as np

from gnunet.data import sources
from gnunet.data.sources.base import Source, file_fingerprint


class NumpyFile(Source):
    """A .npy file of pictures, whose labels are whether the first pixel is dark."""

    def __init__(self, path, files, split):
        self.name = str(path)
        self.fingerprint = file_fingerprint(files)
        self._images = np.load(path)

    @classmethod
    def accepts(cls, path, files):
        return path.suffix == ".npy"

    def __len__(self):
        return len(self._images)

    def image(self, row):
        return self._images[row]

    def labels(self):
        return ["dark" if image[0, 0] < 128 else "light" for image in self._images]


def test_new_kind_of_source_needs_a_class_and_a_line(tmp_path, monkeypatch, load, greys):
    monkeypatch.setattr(sources, "SOURCES", [NumpyFile, *sources.SOURCES])
    np.save(tmp_path / "a.npy", np.full((3, 8, 8), [[[10]], [[200]], [[20]]], np.uint8))
    table = load(tmp_path / "a.npy")
    assert (greys(table), table.class_names, table.labels.tolist()) == ([10, 200, 20], ("dark", "light"), [0, 1, 0])
    assert greys(load(tmp_path / "a.npy", subset={"label": "light"})) == [200]
