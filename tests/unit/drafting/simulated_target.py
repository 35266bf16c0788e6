"""A greedy target that agrees with the draft most of the time, and what vLLM would sample with it."""

from __future__ import annotations

from collections.abc import Sequence

from tests.unit.drafting.fake_model import FakeModel


class SimulatedTarget:
    """Takes the draft's likeliest token in about `agreement` of all contexts, otherwise its second or another one."""

    def __init__(self, draft: FakeModel, agreement: float = 0.75, seed: int = 99) -> None:
        self._draft = draft
        self._agreement = agreement
        self._doubt = FakeModel(max_length=draft.max_length, vocab_size=1000, seed=seed)

    def next_token(self, tokens: Sequence[int]) -> int:
        """The target's own greedy choice after this text."""
        order = self._draft.logits_after(tokens).argsort(descending=True).tolist()
        roll = int(self._doubt.logits_after(tokens).argmax())
        if roll < 1000 * self._agreement:
            return order[0]
        return order[1] if roll % 2 else order[-1 - roll % 7]

    def greedy_text(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens without any speculation."""
        text = list(tokens)
        for _ in range(count):
            text.append(self.next_token(text))
        return text[len(tokens) :]

    def verify(self, tokens: Sequence[int], drafts: Sequence[int]) -> list[int]:
        """The accepted drafts and the bonus token after them."""
        text = list(tokens)
        for draft in drafts:
            choice = self.next_token(text)
            text.append(choice)
            if choice != draft:
                return text[len(tokens) :]
        return [*text[len(tokens) :], self.next_token(text)]
