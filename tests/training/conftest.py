"""Fixtures: a tiny model's processor, its checkpoint, and a small corpus."""

import pytest

from tests.training.corpora import write_llava
from tests.training.tiny import save_tiny, tiny_processor


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"), 24)
