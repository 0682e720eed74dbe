"""Classifiers with heads of their own, of a base that was read only once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.model.base import FreshClassifier, fresh_classifier, quiet_transformers, seeded


class FreshCopies:
    """Gives what :func:`fresh_classifier` gives, without the weights that a trial doesn't train.

    Every lane of a pack waits while another one is built, and reading the base would be most of it.
    Copies have the encoder's modules and shapes; of their frozen weights every number is one and
    the same zero, which takes no memory. Heads, and all that is new, are real.

    Args:
        loaded: Just loaded, and not changed yet. It may be used for anything afterwards.
        seed: That it was loaded with.

    Attributes:
        faithful: Whether new weights are drawn here as they are where a base is loaded; it is
            seen from ``loaded`` itself. Where it isn't so, each copy is loaded.
    """

    def __init__(self, loaded: FreshClassifier, seed: int) -> None:
        self._loaded_from = loaded.base
        encoder = f"{loaded.model.base_model_prefix}."
        self._new_modules, self._drawn = loaded.new_modules, loaded.drawn
        self._frozen = {
            name
            for name, _ in loaded.model.named_parameters()
            if name.startswith(encoder) and not self._is_new(name)
        }
        self._pattern = self._copied(loaded.model)
        self.faithful = _same(self._redrawn(seed), loaded.model, self._frozen)

    def _is_new(self, name: str) -> bool:
        return any(name.startswith(f"{module}.") for module in self._new_modules)

    def fresh(self, seed: int) -> FreshClassifier:
        """Return a classifier whose new weights are drawn from ``seed``.

        The global random state is the same before and after.
        """
        if not self.faithful:
            return fresh_classifier(self._loaded_from, seed)
        return FreshClassifier(
            model=self._redrawn(seed),
            new_modules=self._new_modules,
            drawn=self._drawn,
            base=self._loaded_from,
        )

    def _copied(self, model: PreTrainedModel) -> PreTrainedModel:
        # Whoever uses a copy may replace a parameter's data, so each copy has its own objects.
        memo: dict[int, nn.Parameter] = {
            id(parameter): nn.Parameter(_one_zero(parameter), parameter.requires_grad)
            for name, parameter in model.named_parameters()
            if name in self._frozen
        }
        return copy.deepcopy(model, memo)

    def _redrawn(self, seed: int) -> PreTrainedModel:
        model = self._copied(self._pattern)
        # transformers draws whatever doesn't bear this mark, in the order of the modules.
        for module in model.modules():
            module._is_hf_initialized = False
        for name, parameter in model.named_parameters():
            parameter._is_hf_initialized = name not in self._drawn
        with seeded(seed), quiet_transformers():
            model.initialize_weights()
        return model


def _one_zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def _same(drawn: nn.Module, loaded: nn.Module, but: set[str]) -> bool:
    """Whether two models have the same numbers, but for some that are frozen."""
    expected = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    found = {**dict(drawn.named_parameters()), **dict(drawn.named_buffers())}
    return expected.keys() == found.keys() and all(
        name in but or torch.equal(found[name], tensor) for name, tensor in expected.items()
    )
