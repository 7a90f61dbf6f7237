"""A model of one layer: many shapes are compiled."""

import dataclasses

import jax
import pytest


@pytest.fixture(scope="session")
def one_layer(tiny_config, tiny_params):
    """(config, parameters) of the first layer of the tiny model."""
    layers = jax.tree.map(lambda x: x[:1], tiny_params["layers"])
    return dataclasses.replace(tiny_config, num_layers=1), tiny_params | {"layers": layers}
