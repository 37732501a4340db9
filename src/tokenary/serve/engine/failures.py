"""What a client is told of an error: what it did wrong itself, and of a defect only that there is one."""

from __future__ import annotations

import logging
import traceback

from tokenary.core.errors import TokenaryError
from tokenary.decode.awrs.constraint import ConstraintError
from tokenary.serve.engine.work import Work
from tokenary.serve.protocol import Failed

_LOG = logging.getLogger("tokenary.serve")


def failed(work: Work, error: Exception) -> Failed:
    """Return the event of a job that could not be done; a defect is logged, without anything of the prompt."""
    if isinstance(error, ConstraintError) and work.new_tokens:  # its text quotes the answer
        return Failed(work.job.id, 422, "no token continues the answer under the constraint")
    if isinstance(error, TokenaryError):
        return Failed(work.job.id, 422, " ".join(str(error).split()))
    where = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("%s in the recipe %s\n%s", type(error).__name__, work.recipe, where)
    return Failed(work.job.id, 500, f"a defect ({type(error).__name__}) in the recipe {work.recipe}")
