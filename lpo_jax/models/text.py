"""A tokenizer bound to its model: it checks that every id has a row in the embedding, and renders chat messages.

A prompt depends only on the model, the messages and the template's arguments. Templates that write the current date get
a fixed one, so that a resumed run has the same prompts.
"""

import dataclasses
import datetime
import inspect
import re
from collections.abc import Mapping, Sequence

from lpo_jax.errors import UserError, nearest
from lpo_jax.models.vision_config import VisionConfig
from lpo_jax.types import Json, Tokenizer

# {"role": ..., "content": ...}; a content is a text, or a list of {"type": "text", "text": ...} and {"type": "image"}.
Message = Mapping[str, Json]

# The date that Llama 3's templates write if they have no clock.
DATE = datetime.datetime(2024, 7, 26)
_DIRECTIVES = [f"%{code}" for code in ("-d", "-m", "-H", "-I", "-M", "-S", *"aAbBdeHIjmMpSuyY")]
_REPLACED = "".join(f" | replace({code!r}, {DATE.strftime(code)!r})" for code in _DIRECTIVES)
# This macro, defined before a template, replaces the function of that name, which reads the clock.
_CLOCK = f"{{%- macro strftime_now(format) -%}}{{{{ format{_REPLACED} }}}}{{%- endmacro %}}\n"
_ANSWER = "<answer of the assistant>"  # a placeholder that shows where a template writes the answer
_TAG_AT_END = re.compile(r"<[^<>\s]+>$")


@dataclasses.dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer and what depends on its model. All other attributes (`decode`, ...) are those of the tokenizer.

    Attributes:
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      model: the model's name, for messages.
      vocab_size: V, the number of rows of the embedding.
      eos_ids: every id that ends a response.
      vision: the model's vision tower; None for a model of text.
      template_arguments: arguments of the chat template, such as `enable_thinking`. `chat_template` is the name of one
        of several templates, or a template.
    """

    tokenizer: Tokenizer
    model: str
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    vision: VisionConfig | None = None
    template_arguments: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    def __getattr__(self, name: str) -> Json:
        if name in ("tokenizer", "__setstate__"):  # copies ask for these before the fields are set
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, *texts: Json, **options: Json) -> Json:
        return self.tokenizer(*texts, **options)

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end token, or the model's first one if the tokenizer has none."""
        own = self.tokenizer.eos_token_id
        return own if own is not None or not self.eos_ids else self.eos_ids[0]

    def encode(self, text: str, **options: Json) -> list[int]:
        """Encode a text, as the tokenizer's `encode` does.

        Raises:
          UserError: an id has no row in the embedding. JAX would use the last row for it.
        """
        ids = self.tokenizer.encode(text, **options)
        if max(ids, default=0) >= self.vocab_size:
            beyond = next(i for i in ids if i >= self.vocab_size)
            raise UserError(
                f"{self.model}: token {self.tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}) has no row in the "
                f"embedding, which has {self.vocab_size}; keep it out of prompts, solutions and the chat template, or "
                "use the tokenizer that belongs to the weights"
            )
        return ids

    def with_arguments(self, arguments: Mapping[str, Json]) -> "ModelTokenizer":
        """Return this tokenizer with other template arguments.

        Raises:
          UserError: there is no chat template, or it does not use one of the arguments.
        """
        if not arguments:
            return dataclasses.replace(self, template_arguments={})
        changed = dataclasses.replace(self, template_arguments=dict(arguments))
        template = changed._template()
        given = {"messages", *inspect.signature(type(self.tokenizer).apply_chat_template).parameters}
        used = set(re.findall(r"\w+", template)) - (given - {"tools", "documents"})
        for name in arguments:
            if name not in used | {"chat_template"}:
                raise UserError(
                    f"{self.model}: its chat template does not use the argument {name!r}{nearest(name, used)}; "
                    "correct or remove it"
                )
        return changed

    def render(self, messages: Sequence[Message]) -> str:
        """Render chat messages to the text that a response continues.

        If the last message is the assistant's, its text is appended to the generation prompt unchanged. The template
        would treat it as a complete answer, strip it, or add an empty thought.

        Raises:
          UserError: there is no chat template, or it does not accept these messages.
        """
        *asked, last = messages
        if last["role"] != "assistant":
            return self._apply(messages, add_generation_prompt=True)
        prefill, prompt = last["content"], self._apply(asked, add_generation_prompt=True)
        if prompt == self._apply(asked, add_generation_prompt=False):
            return self._before_answer(asked, prompt) + prefill
        tag = _TAG_AT_END.search(prompt.rstrip())
        if tag and prefill.lstrip().startswith(tag[0]):
            raise UserError(
                f"{self.model}: its chat template begins each answer with {tag[0]} itself; leave {tag[0]} out of the "
                "prefill"
            )
        return prompt + prefill

    def _before_answer(self, asked: Sequence[Message], prompt: str) -> str:
        """For a template without a generation prompt, return the text before the answer."""
        whole = self._apply([*asked, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
        before, found, _ = whole.partition(_ANSWER)
        if not found or not before.startswith(prompt):
            raise UserError(
                f"{self.model}: its chat template rewrites the messages before an answer, so that no answer can be "
                "begun with a prefill; remove the prefill or use raw prompts"
            )
        return before

    def _template(self) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.model}: the model has no chat template; use raw prompts")
        own, chosen = self.tokenizer.chat_template, self.template_arguments.get("chat_template")
        named = own if isinstance(own, Mapping) else {}
        if chosen is None and named and "default" not in named:
            raise UserError(
                f"{self.model}: has several chat templates ({', '.join(named)}) and no default; set "
                "model.template_arguments.chat_template to one of these names"
            )
        if chosen is not None and chosen not in named and "{" not in str(chosen):
            have = f"; have {', '.join(named)}" if named else ""
            raise UserError(
                f"{self.model}: has no chat template {chosen!r}{have}; a template itself holds braces"
            )
        return self.tokenizer.get_chat_template(chosen)

    def _apply(self, messages: Sequence[Message], **options: Json) -> str:
        template = self._template()
        arguments = {key: x for key, x in self.template_arguments.items() if key != "chat_template"}
        clock = _CLOCK if "strftime_now" in template else ""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=clock + template, tokenize=False, **options, **arguments
            )
        except Exception as error:  # jinja's errors, and any that a template's expressions raise
            raise UserError(self._explain(error, messages, bool(clock))) from None

    def _explain(self, error: Exception, messages: Sequence[Message], has_clock: bool) -> str:
        import jinja2

        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, jinja2.TemplateSyntaxError):
            line = error.lineno - has_clock
            return f"{self.model}: its chat template is broken (line {line}: {reason}); mend it or use raw prompts"
        roles = ", ".join(str(message.get("role")) for message in messages)
        if isinstance(error, jinja2.UndefinedError):
            mend = "give what it lacks in model.template_arguments, or use raw prompts"
        elif any(message.get("role") == "system" for message in messages):
            mend = "ask without a system message (a task's `system` or `template`), or use raw prompts"
        else:
            mend = "ask in the way it wants, or use raw prompts"
        return (
            f"{self.model}: its chat template does not take messages of the roles {roles} ({reason}); {mend}"
        )
