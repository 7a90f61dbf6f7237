"""`Field` is the one list of what an objective computes with: it agrees with the records, the parts and the hooks."""

import dataclasses

import pytest

from lpo_jax import objectives as O
from lpo_jax.objectives.batch import Field, Source, fields_from
from lpo_jax.objectives.vocabulary import words


def test_fields_are_those_of_the_records():
    names = [field.name for record in (O.TokenStats, O.Scored) for field in dataclasses.fields(record)]
    assert [str(field) for field in Field] == names


def test_hooks_fill_the_fields_that_are_theirs():
    given = {field for hook in words("hooks").values() for field in hook.gives}
    assert given == fields_from(Source.HOOK)


def test_every_method_names_its_needs_by_fields_that_a_run_can_fill():
    for name in O.names():
        objective = O.get(name)
        assert all(isinstance(field, Field) for field in objective.needs | objective.differentiates)
        given = {field for hook in objective.hooks for field in hook.gives}
        assert objective.needs & fields_from(Source.HOOK, Source.CALLER) <= given


def test_a_part_that_computes_with_an_undeclared_field_is_refused():
    with pytest.raises(TypeError, match="missing from its `reads`"):
        O.batch.required(None)
