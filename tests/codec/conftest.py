import pytest
from codec_toy import SMALL, toy_lm

from tokenary.codec.blocks import Machine
from tokenary.codec.files import machine_for
from tokenary.codec.integer import IntegerLlama
from tokenary.codec.nacrith import Nacrith


@pytest.fixture(scope="session")
def lm():
    return toy_lm()


@pytest.fixture(scope="session")
def reader(lm):
    return IntegerLlama(lm)


@pytest.fixture
def make_machine(lm, reader):
    def make(**options) -> Machine:
        return machine_for(lm, Nacrith(**{**SMALL, **options}), reader)

    return make


@pytest.fixture
def machine(make_machine):
    return make_machine()
