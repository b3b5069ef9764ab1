import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    """torch's tracers log each step for whoever captures logs, as pytest does: a third of the time."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
