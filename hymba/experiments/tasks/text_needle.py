"""A needle in a haystack of text, for any language model with a tokenizer: nothing is trained on it.

A sentence that binds a number to a name stands at a depth of the filler text, and the text ends with the beginning of
the same sentence. Two figures per length and depth: ``exact``, the share of trials in which greedy decoding writes the
number (every token of it is the most likely one after those before it), and ``choice``, the share in which the number
is more likely than every one of the distractors, other numbers in the same place. A model too small to write the
number can still show in ``choice`` that it has seen it.

Filler is the caller's, so that it can come from text that the model was not trained on (``Corpus.held_out``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAMES = "Lisbon Nairobi Oslo Quito Hanoi Dublin Cairo Lima Prague Seoul Vienna Havana Ottawa Riga Tunis Zagreb".split()
_BOUND = "\nThe secret number of {name} is"
_STOP = ".\n"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TextNeedle:
    """How needles are placed and asked.

    Attributes:
        lengths: tokens of the whole text, the question included, the answer not.
        depths: of the needle in the filler, 0 at its start and 1 just before the question.
        trials: texts for each length and depth, each with its own number, name and piece of filler.
        digits: of a number.
        distractors: other numbers that ``choice`` compares with.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 8
    digits: int = 4
    distractors: int = 3

    def __post_init__(self) -> None:
        for name, allowed, ok in (
            ("lengths", "at least one, from 1", bool(self.lengths) and min(self.lengths) >= 1),
            ("depths", "at least one, from 0 to 1", bool(self.depths) and all(0 <= d <= 1 for d in self.depths)),
            ("trials", "at least 1", self.trials >= 1),
            ("digits", "1 to 9", 1 <= self.digits <= 9),
            ("distractors", "at least 1, fewer than there are numbers", 1 <= self.distractors < 10**self.digits),
        ):
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected {allowed}")

    @torch.no_grad()
    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, filler: Sequence[str], *, seed: int = 0
    ) -> dict[str, float | list[Any]]:
        """Measure ``model``; its mode is put back afterwards.

        Args:
            tokenizer: its beginning-of-text token, if it has one, comes first.
            filler: documents without the needle; each trial starts at another place in them, and they
                repeat when they are short.

        Returns:
            ``exact`` and ``choice`` (means), ``exact_grid`` and ``choice_grid`` (length x depth), ``chance`` of
            ``choice``, ``lengths`` and ``depths``: plain numbers and lists.

        Raises:
            ValueError: no filler, or a length that does not hold needle and question.
        """

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        stream = [token for text in filler for token in encode(text)]
        if not stream:
            raise ValueError("filler has no text; give documents to hide the needle in")
        start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        training = model.training
        model.eval()
        exact = np.zeros((len(self.lengths), len(self.depths)))
        choice = np.zeros_like(exact)
        try:
            for i, length in enumerate(self.lengths):
                for j, depth in enumerate(self.depths):
                    for trial in range(self.trials):
                        generator = np.random.default_rng((seed, trial, length))
                        context, answers = self._text(generator, encode, stream, start, length, depth)
                        written, scores = _score(model, context, answers)
                        exact[i, j] += written
                        choice[i, j] += scores[0] > max(scores[1:])
        finally:
            model.train(training)
        exact, choice = exact / self.trials, choice / self.trials
        return {
            "exact": float(exact.mean()),
            "choice": float(choice.mean()),
            "chance": 1.0 / (1 + self.distractors),
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "exact_grid": exact.tolist(),
            "choice_grid": choice.tolist(),
        }

    def _text(
        self,
        generator: np.random.Generator,
        encode: Encode,
        stream: Sequence[int],
        start: list[int],
        length: int,
        depth: float,
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of one text of ``length`` tokens up to the answer, and of the answers, the true one first."""
        name = _NAMES[generator.integers(len(_NAMES))]
        numbers = generator.choice(10**self.digits, size=1 + self.distractors, replace=False)
        answers = [encode(f" {number:0{self.digits}d}") for number in numbers]
        # Piece by piece, so that needle and question have the same tokens whatever a merge would make of them.
        question = encode(_BOUND.format(name=name))
        needle = [*question, *answers[0], *encode(_STOP)]
        room = length - len(start) - len(needle) - len(question)
        if room < 0:
            raise ValueError(f"lengths = {list(self.lengths)}: {length} tokens do not hold needle and question")
        first = int(generator.integers(len(stream)))
        hay = [stream[(first + i) % len(stream)] for i in range(room)]
        place = round(depth * room)
        return [*start, *hay[:place], *needle, *hay[place:], *question], answers


def _score(model: PreTrainedModel, context: Sequence[int], answers: Sequence[list[int]]) -> tuple[bool, list[float]]:
    """Whether the first answer is what greedy decoding writes, and ln p of every answer, per token."""
    longest = max(map(len, answers))
    # Padding stands to the right of everything that is scored, where a causal model cannot see it.
    rows = [[*context, *answer, *[0] * (longest - len(answer))] for answer in answers]
    ids = torch.tensor(rows, device=next(model.parameters()).device)
    arguments: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = longest + 1
    logits: Tensor = model(input_ids=ids, **arguments).logits[:, -longest - 1 : -1].float().log_softmax(-1)
    scores = []
    for i, answer in enumerate(answers):
        target = torch.tensor(answer, device=logits.device)
        scores.append(float(logits[i, : len(answer)].gather(-1, target[:, None]).mean()))
    first = torch.tensor(answers[0], device=logits.device)
    written = bool((logits[0, : len(first)].argmax(-1) == first).all())
    return written, scores
