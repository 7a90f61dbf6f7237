"""A model of one layer: many shapes are compiled."""

import pytest
from tiny import RUN_CONFIG


@pytest.fixture(scope="session")
def one_layer(run_params):
    """(config, parameters) of the model of whole runs."""
    return RUN_CONFIG, run_params
