"""Text around a user message in a chat template, found by rendering a placeholder."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rtpurbo.data.prompts import rendered_chat
from rtpurbo.data.texts import encode
from rtpurbo.errors import RTPurboError

PLACEHOLDER = "PLACEHOLDER-OF-A-USER-TURN"


@dataclass(frozen=True)
class UserTurn:
    """Rendered text before and after a user message.

    Attributes:
        before: text up to the message, including a default system prompt.
        after: end of the turn and header of the assistant's turn.
    """

    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> UserTurn:
        """Returns the user turn of a tokenizer's chat template.

        Raises:
            RTPurboError: the template fails on one user message or changes it.
        """
        try:
            rendered = rendered_chat(tokenizer, [{"role": "user", "content": PLACEHOLDER}])
        except TemplateError as error:
            raise RTPurboError(f"the chat template fails on one user message: {error}.") from error
        if rendered.count(PLACEHOLDER) != 1:
            raise RTPurboError(
                "the chat template changes a user message: set mixture.documents and "
                "mixture.conversations of the stages to 0."
            )
        before, after = rendered.split(PLACEHOLDER)
        return cls(before, after)

    def stop_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Returns the special token that ends the user's turn, if there is one."""
        following = encode(tokenizer, self.after.lstrip())[:1]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        return [token_id for token_id in following if token_id in special]

    def user_text(self, text: str) -> str:
        """Returns the user message in sampled text, up to the end of the turn if it is there."""
        end = self.after.strip().split("\n")[0]
        return (text.partition(end)[0] if end else text).strip()
