"""Word and byte perplexity as lm-eval has them: the log-likelihood of whole documents, by its own windows.

Every token is predicted once, the first one from the token that begins a text. Figures per word and per byte can be
compared between models of different tokenizers, which figures per token cannot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantforge.errors import DataError
from quantforge.evaluation import significance, zeroshot
from quantforge.evaluation.significance import Interval
from quantforge.record import finite


@dataclass(frozen=True)
class RollingScore:
    """The log-likelihood of each document, nats, and its size in tokens, words and bytes.

    words   pieces between white space, as lm-eval counts them: white space at an end makes an empty piece, which counts
    bytes   of the text in UTF-8
    window  the most tokens that the model read at once
    parts   the log-likelihood and the tokens of each piece that was read at once: a short document, or a window of one
    """

    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    words: tuple[int, ...]
    bytes: tuple[int, ...]
    window: int
    parts: tuple[tuple[float, int], ...] = ()

    @property
    def token_perplexity(self) -> float:
        """Return exp of the loss per token."""
        return self._per(self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Return exp of the loss per word."""
        return self._per(self.words)

    @property
    def byte_perplexity(self) -> float:
        """Return exp of the loss per byte."""
        return self._per(self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Return the loss per byte in bits."""
        return -math.fsum(self.log_likelihoods) / sum(self.bytes) / math.log(2)

    def intervals(self) -> dict[str, Interval]:
        """Return each figure with its interval of 95 %, by its name; NaN where it is not known.

        Words and bytes for each token are taken as the text has them, so that all tell of the loss per token.
        """
        loss = self._loss()
        counts = {"word_perplexity": self.words, "byte_perplexity": self.bytes, "token_perplexity": self.tokens}
        factors = {name: sum(self.tokens) / sum(each) for name, each in counts.items()}
        found = {name: significance.exponential(significance.scaled(loss, factor)) for name, factor in factors.items()}
        return {**found, "bits_per_byte": significance.scaled(loss, factors["byte_perplexity"] / math.log(2))}

    def _loss(self) -> Interval:
        """Return the loss per token, nats, with its interval by a bootstrap over the parts.

        They are of different size: what is drawn is by how much each loses more than so many tokens do on average (the
        linearized ratio, Cochran, Sampling Techniques, 1977, section 6.4).
        """
        value = -math.fsum(self.log_likelihoods) / sum(self.tokens)
        size = sum(self.tokens) / max(len(self.parts), 1)
        losses = [value - (found + value * tokens) / size for found, tokens in self.parts]
        if len(losses) < 2 or not all(map(math.isfinite, losses)):
            return Interval(value, math.nan, math.nan)
        return significance.mean_interval(losses)

    def _per(self, counts: Sequence[int]) -> float:
        loss = -math.fsum(self.log_likelihoods) / sum(counts)
        return math.exp(loss) if loss < 700 else math.inf

    def record(self) -> dict[str, Any]:
        """Return the figures and what they count as plain JSON values."""
        figures = {
            "word_perplexity": self.word_perplexity,
            "byte_perplexity": self.byte_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "token_perplexity": self.token_perplexity,
        }
        counts = {"tokens": sum(self.tokens), "words": sum(self.words), "bytes": sum(self.bytes)}
        return {
            **finite(figures),
            "intervals": {name: finite([one.low, one.high]) for name, one in self.intervals().items()},
            "documents": len(self.tokens),
            **counts,
            "window": self.window,
        }


def evaluate(
    model: nn.Module, tokenizer: Any, documents: Sequence[str], *, window: int | None = None, batch_size: int = 1
) -> RollingScore:
    """Score `model` on whole documents by lm-eval's rolling log-likelihood.

    window      the most tokens that the model reads at once; None: its positions, as lm-eval has it
    batch_size  windows that go through the model at once; 1 for a model in which texts of a batch mix
    Raises DataError for no documents or empty ones, or a tokenizer without a token to begin a text with.
    """
    for i, document in enumerate(documents):
        if not document.strip():
            raise DataError(449, f"document {i + 1} of {len(documents)} is empty.")
    if not documents:
        raise DataError(449, "there are no documents.")
    with zeroshot.untouched_randomness(), zeroshot.quiet():
        from lm_eval.api.instance import Instance

        harness = zeroshot.make_harness(model, tokenizer, batch_size, window)
        requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(documents)]
        found = harness.loglikelihood_rolling(requests)
        tokens = tuple(len(harness.tok_encode(text)) for text in documents)
        parts = tuple(harness.scored)
    return RollingScore(
        tuple(found),
        tokens,
        tuple(len(re.split(r"\s+", text)) for text in documents),
        tuple(len(text.encode()) for text in documents),
        harness.max_length,
        parts,
    )


def cut(documents: Sequence[str], tokenizer: Any, tokens: int) -> tuple[str, ...]:
    """Return the first documents, of about `tokens` tokens together: the last one ends with a word of its own.

    Tokens that only begin or end a text are not counted.
    """
    kept: list[str] = []
    for document in documents:
        size = len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if size > tokens:
            end = _end(document, tokenizer, tokens, size) if tokens else 0
            return (*kept, document[:end]) if document[:end].strip() else tuple(kept)
        kept.append(document)
        tokens -= size
    return tuple(kept)


def _end(document: str, tokenizer: Any, tokens: int, size: int) -> int:
    """Return where the last word ends that is whole within the first `tokens` of the `size` tokens of `document`."""
    end = len(document) * tokens // size  # a slow tokenizer does not say where its tokens end
    if tokenizer.is_fast:
        found = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        end = found["offset_mapping"][tokens - 1][1]
    # a word is whole if white space follows
    ends = [match.start() for match in re.finditer(r"(?<=\S)\s", document[: end + 1])]
    return ends[-1] if ends else end
