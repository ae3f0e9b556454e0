"""The text around a user's turn in a chat template, found by rendering it with a placeholder."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rtpurbo.data.texts import encode
from rtpurbo.errors import RTPurboError

PLACEHOLDER = "PLACEHOLDER-OF-A-USER-TURN"


@dataclass(frozen=True)
class UserTurn:
    """The rendered text before and after what a user says.

    Attributes:
        before: up to the user's words, default system prompt included.
        after: the end of the turn and the header of the assistant's turn.
    """

    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> UserTurn:
        """The user's turn of a tokenizer with a chat template.

        Raises:
            RTPurboError: the template does not render one user message as it is.
        """
        try:
            rendered = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": PLACEHOLDER}],
                    tokenize=False,
                    add_generation_prompt=True,
                    # Templates of reasoning models know this option; others ignore it.
                    enable_thinking=False,
                )
            )
        except TemplateError as error:
            raise RTPurboError(f"the chat template fails on one user message: {error}.") from error
        if rendered.count(PLACEHOLDER) != 1:
            raise RTPurboError("the chat template does not keep a user message as it is.")
        before, after = rendered.split(PLACEHOLDER)
        return cls(before, after)

    def stop_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The special token that ends the user's turn, if a special token does."""
        following = encode(tokenizer, self.after.lstrip())[:1]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        return [token_id for token_id in following if token_id in special]

    def words_of(self, text: str) -> str:
        """The user's words in sampled text: up to the end of the turn, if it comes."""
        end = self.after.strip().split("\n")[0]
        return (text.partition(end)[0] if end else text).strip()
