"""What an objective is: logits and a batch become a loss and its named parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tokenary.core.method import Method

Parts = dict[str, Tensor]


class Objective(Method):
    """Base of all objectives. An instance holds options only; the loss is a pure function of what it is given.

    Attributes
    ----------
    toy_options : mapping
        Options for toy nets.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def loss(self, logits: Tensor, batch: Any) -> tuple[Tensor, Parts]:
        """Compute the loss.

        Parameters
        ----------
        logits : Tensor
            (B, N, V) of the model that learns; the gradient flows into them alone.
        batch : object
            What they are held against; which kind, the objectives of a slot agree on.

        Returns
        -------
        loss : Tensor
            A scalar to call ``backward`` on.
        parts : dict of str to Tensor
            Detached scalars to log, the loss's terms among them.
        """
