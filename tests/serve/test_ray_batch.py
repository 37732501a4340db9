"""A batch over replicas on Ray Serve, with a real model and a cluster of its own."""

from __future__ import annotations

import pytest
from test_batch_process import texts_of

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenary[ray]'")


def test_replicas_write_the_same_texts(tmp_path):
    assert texts_of(tmp_path, "--engine", "ray", "--replicas", "2") == texts_of(tmp_path)
    assert not ray.is_initialized()  # the cluster was its own
