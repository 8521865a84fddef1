"""A causal language model's head where a label is, and nowhere else.

Logits are the widest tensors of a step, and prompt and padding carry no loss: hidden states of labelled positions alone
go through the head, in pieces that take no more memory than a layer does. How logits come from hidden states (scaling,
soft-capping, LoRA in the head, a head that is trained whole) is left to the model's own code.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor

from dataset import IGNORED

LEAST_AT_ONCE = 128  # positions of a piece, if memory would allow less: below that, matrix products become slow


@dataclass(frozen=True)
class Labelled:
    """The labelled positions of a batch: N hidden states, and the token that each should predict."""

    model: Any  # the causal language model, without PEFT's wrapper
    outputs: Any  # what its decoder returned
    states: Tensor  # (N, hidden)
    targets: Tensor  # (N,)
    at_once: int  # positions of a piece

    def after_decoder(self, states: Tensor, **options: Any) -> Any:
        """What the model's own forward pass makes of (N, hidden) `states` after its decoder."""
        handed = replace(self.outputs, last_hidden_state=states[None])
        with patch.object(below_head(self.model), "forward", lambda *_, **__: handed):
            return self.model(use_cache=False, **options)

    def logits(self, states: Tensor) -> Tensor:
        """(N, hidden) to (N, vocabulary)."""
        logits: Tensor = self.after_decoder(states).logits[0]
        return logits

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """States and targets, up to `at_once` positions at a time."""
        yield from zip(self.states.split(self.at_once), self.targets.split(self.at_once), strict=True)

    def loss(self) -> Tensor:
        """The summed cross-entropy, a float32 scalar (float64 of float64 states); it can be differentiated."""
        trained = [weight for weight in self.model.get_output_embeddings().parameters() if weight.requires_grad]
        loss: Tensor = SummedLoss.apply(self.states, self, *trained)  # type: ignore[no-untyped-call]
        return loss

    def auxiliary(self) -> Tensor:
        """What a mixture of experts adds to balance its load; its decoder was asked for `output_router_logits`."""
        found: Tensor = self.after_decoder(self.states[:1], output_router_logits=True).aux_loss
        return found


def labelled(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Labelled:
    """The labelled positions of a `batch` of `learning.training.collate`; the `options` are the decoder's."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    outputs = below_head(causal)(input_ids=batch["input_ids"], use_cache=False, **options)
    states, positions = outputs.last_hidden_state.flatten(0, 1), batch["positions"]
    targets = batch["labels"].flatten().index_select(0, positions + 1)
    at_once = positions_at_once(causal.config.get_text_config(), batch["input_ids"].numel())
    return Labelled(causal, outputs, states.index_select(0, positions), targets, at_once)


def below_head(causal: Any) -> Any:
    """The part that a causal language model calls for hidden states; OPT goes past its base model to what is inside."""
    return getattr(causal.base_model, "decoder", causal.base_model)


def labelled_positions(labels: Tensor) -> Tensor:
    """Where the next token of (rows, T) `labels` carries loss, counted through all rows: (N,)."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return (following != IGNORED).flatten().nonzero().squeeze(1)


def inner_width(shapes: Any) -> int:
    """Of a layer's part after attention; the widest, where each layer has its own."""
    width = getattr(shapes, "intermediate_size", None) or 4 * shapes.hidden_size
    return int(max(width) if isinstance(width, list | tuple) else width)


def layer_values(shapes: Any) -> int:
    """Values a token that a decoder layer works on at once, forward and backward."""
    return int(12 * shapes.hidden_size + 8 * inner_width(shapes))


def positions_at_once(shapes: Any, tokens: int) -> int:
    """Positions whose logits (6 values each of the vocabulary: in two precisions, probabilities, slopes) take no more
    memory than a decoder layer with `tokens` does, but at least LEAST_AT_ONCE."""
    return max(LEAST_AT_ONCE, tokens * layer_values(shapes) // (6 * shapes.vocab_size))


def log_probabilities(logits: Tensor) -> Tensor:
    """In float32, or in what is finer."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


class SummedLoss(torch.autograd.Function):
    """Cross-entropy of labelled positions; each piece's gradients are taken at once, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, positions: Labelled, *trained: Tensor) -> Tensor:
        total: Any = 0.0
        slopes, of_trained = [], [torch.zeros_like(weight) for weight in trained]
        for piece, targets in positions.pieces():
            loss, slope, *others = piece_gradients(positions, piece, targets, trained)
            total = total + loss
            slopes.append(slope)
            for sums, gradient in zip(of_trained, others, strict=True):
                sums += gradient
        ctx.save_for_backward(torch.cat(slopes) if slopes else torch.zeros_like(states), *of_trained)
        return total if slopes else states.sum().float()

    @staticmethod
    def backward(ctx: Any, *scale: Any) -> Any:
        slopes, *of_trained = (gradient.mul_(scale[0]) for gradient in ctx.saved_tensors)
        return slopes, None, *of_trained


def piece_gradients(
    positions: Labelled, states: Tensor, targets: Tensor, trained: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """The summed loss of a piece of `positions`, and its gradients: of states, and of the head's `trained` weights."""
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        logits = positions.logits(states)
    likely = log_probabilities(logits.detach())
    wanted = targets[:, None]
    loss = -likely.gather(1, wanted).sum()
    slope = likely.exp_().scatter_add_(1, wanted, likely.new_full((), -1.0).expand(wanted.shape))  # softmax - one-hot
    found = torch.autograd.grad(logits, (states, *trained), slope.to(logits.dtype), materialize_grads=True)
    return loss, *found
