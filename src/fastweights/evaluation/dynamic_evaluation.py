"""Dynamic evaluation: a model takes a gradient step on each segment of text after it has been scored on it.

B. Krause et al., "Dynamic Evaluation of Neural Sequence Models" (ICML 2018) and "Dynamic Evaluation of Transformer
Language Models" (arXiv 1904.08378). With g the gradient of a segment's mean loss and θ_0 the trained weights,

    sgd    θ <- θ - η g + λ (θ_0 - θ)
    rms    θ <- θ - η g / (√m + ε) + min(1, λ √m / mean(√m)) ⊙ (θ_0 - θ)

where m is the mean square of each weight's gradient over segments of the training text. It is the baseline of Fast
Weight Layers, and works on any causal language model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from fastweights.errors import FastWeightsError
from fastweights.reading.stream import Stream
from fastweights.settings.evaluation import DynamicEvaluationConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel


class DynamicEvaluation:
    """Inside `with`, the model adapts; outside it is bit for bit what it was, whatever happened inside.

    Args:
        model: any causal LM.
        config: rule, step size and what adapts.
        mean_squares: of each parameter's gradient, from `gradient_mean_squares`; needed by rms.

    Raises:
        FastWeightsError: no parameter matches `config.parameters`, or rms was not given the mean squares of those that
            do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: DynamicEvaluationConfig,
        mean_squares: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.config = model, config
        named = adapted_parameters(model, config.parameters)
        self.parameters: list[Tensor] = list(named.values())
        if config.rule == "rms":
            if mean_squares is None or set(mean_squares) != set(named):
                raise FastWeightsError(
                    "the rms rule needs gradient_mean_squares of the parameters that adapt; run it first"
                )
            roots = [mean_squares[name].sqrt() for name in named]
            mean = torch.cat([root.flatten() for root in roots]).mean().clamp(min=1e-30)
            self.scales = [1 / (root + config.epsilon) for root in roots]
            self.decays = [(config.decay * root / mean).clamp(max=1) for root in roots]
        self._inside = False

    def __enter__(self) -> DynamicEvaluation:
        if self._inside:
            raise RuntimeError("dynamic evaluation of this model is running already")
        self._inside = True
        self._trained = [parameter.detach().clone() for parameter in self.parameters]
        self._needed = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        self._gradients = {parameter: parameter.grad for parameter in self._needed}
        self._mode = self.model.training
        self.model.requires_grad_(False).eval()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *exception) -> None:
        self.reset()
        for parameter, needed in self._needed.items():
            parameter.requires_grad_(needed)
            parameter.grad = self._gradients[parameter]
        self.model.train(self._mode)
        del self._trained, self._needed, self._gradients
        self._inside = False

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the trained weights, bit for bit, as before a new document."""
        for parameter, trained in zip(self.parameters, self._trained, strict=True):
            parameter.copy_(trained)

    def score(self, stream: Stream, input_ids: Int[Tensor, "1 n"], targets: Int[Tensor, "1 n"]) -> Float[Tensor, " n"]:
        """Losses of the targets in nats, each under the weights at its segment's start, which then takes a step.

        Args:
            stream: where the model is in the text; it goes on from there.
            input_ids: the next tokens.
            targets: the token that follows each of them.
        """
        losses = []
        for start in range(0, input_ids.shape[1], self.config.segment):
            here = slice(start, start + self.config.segment)
            with torch.enable_grad():
                logits = stream.read(input_ids[:, here])
                loss = cross_entropy(logits[0].float(), targets[0, here], reduction="none")
                gradients = torch.autograd.grad(loss.mean(), self.parameters, allow_unused=True)
            stream.detach()
            losses.append(loss.detach())
            self._step(
                [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
            )
        return torch.cat(losses)

    @torch.no_grad()
    def _step(self, gradients: list[Tensor]) -> None:
        step, decay = self.config.step_size, self.config.decay
        if self.config.rule == "rms":
            gradients = list(torch._foreach_mul(gradients, self.scales))
        if decay:
            back = torch._foreach_sub(self._trained, self.parameters)
            if self.config.rule == "rms":
                torch._foreach_mul_(back, self.decays)
            else:
                torch._foreach_mul_(back, decay)
            torch._foreach_add_(self.parameters, back)
        torch._foreach_add_(self.parameters, gradients, alpha=-step)


def gradient_mean_squares(
    model: PreTrainedModel, blocks: Iterable[Int[Tensor, " _"]], config: DynamicEvaluationConfig
) -> dict[str, Tensor]:
    """Mean square of each adapted parameter's gradient over segments of training text, for the rms rule.

    Args:
        model: any causal LM; it stays as it is.
        blocks: pieces of training text, each longer than a token; each is read from a fresh start.
        config: which parameters adapt, and the length of a segment.

    Returns:
        For each name of a parameter that adapts, a tensor of its shape.

    Raises:
        FastWeightsError: there is no block, or no parameter matches.
    """
    named = adapted_parameters(model, config.parameters)
    sums = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    count = 0

    class Gather(DynamicEvaluation):
        def _step(self, gradients: list[Tensor]) -> None:
            nonlocal count
            count += 1
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient)

    gathering = DynamicEvaluationConfig(parameters=config.parameters, segment=config.segment)
    with Gather(model, gathering) as gather:
        for block in blocks:
            block = block.to(model.device)
            gather.score(Stream(model, len(block) - 1), block[None, :-1], block[None, 1:])
    if count == 0:
        raise FastWeightsError("there is no training text to gather gradients from: give at least one block")
    return {name: total / count for name, total in sums.items()}


def adapted_parameters(model: PreTrainedModel, pattern: str) -> dict[str, torch.nn.Parameter]:
    """The parameters whose whole name matches."""
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise FastWeightsError(f"parameters is {pattern!r}, which is no pattern of Python's re: {error}") from error
    named = {name: parameter for name, parameter in model.named_parameters() if matches(name)}
    if not named:
        examples = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise FastWeightsError(f"parameters is {pattern!r}, which matches none; there are {examples} and others")
    return named
