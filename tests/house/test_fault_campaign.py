"""The functions that scripts/fault_campaign.py interrupts exist under the names that it uses."""

import importlib
import operator

import fault_campaign
import pytest


@pytest.mark.parametrize("phase", [*fault_campaign.PHASES, *fault_campaign.WRITES])
def test_interrupted_functions_exist(phase):
    module, name = (fault_campaign.PHASES | fault_campaign.WRITES)[phase]
    assert callable(operator.attrgetter(name)(importlib.import_module(module)))
