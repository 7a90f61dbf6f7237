"""Reading the fields of a Hugging Face `config.json` with their types checked."""

import dataclasses
import math
from collections.abc import Mapping

from lpo_jax.errors import UserError
from lpo_jax.types import Json


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a `config.json` and their defaults. Values of a wrong type are refused, as in transformers."""

    values: Mapping[str, Json]
    defaults: Mapping[str, Json]
    where: str

    def get(self, key: str) -> Json:
        """Return the value of a field, or its default."""
        if key not in self.values and key not in self.defaults:
            raise UserError(f"{self.where}: {key} is missing; is this the config of a language model?")
        return self.values.get(key, self.defaults.get(key))

    def integer(self, key: str, otherwise: int | None = None) -> int:
        """Return a positive integer; `otherwise` replaces null in fields that may be null."""
        value = self.get(key)
        if value is None and otherwise is not None:
            return otherwise
        if type(value) is not int or value < 1:
            raise self._refused(key, value, "a positive integer")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._refused(key, value, "a positive number")
        return value

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise self._refused(key, value, "true or false")
        return value

    def origin(self, key: str) -> str:
        """Return a remark for messages about a value that the file does not contain."""
        return "" if key in self.values else " (the family's default; the file has none)"

    def _refused(self, key: str, value: object, expected: str) -> UserError:
        return UserError(f"{self.where}: {key} must be {expected}, got {value!r}")
