"""Which arithmetic makes the probabilities; an archive names it, and is read with no other."""

from __future__ import annotations

from tokenary.codec.base import Reader, TextCodec
from tokenary.codec.blocks import Machine
from tokenary.codec.container import Header
from tokenary.codec.files import machine_for
from tokenary.core.errors import InputError, OptionError, UnknownNameError
from tokenary.core.recipe import Step
from tokenary.core.registry import cards
from tokenary.models.lm import LM

BACKENDS = ("torch", "llama.cpp")


def reader_for(lm: LM, backend: str = "torch") -> Reader:
    """Return a model that lanes can be opened on.

    Parameters
    ----------
    lm : LM
        The weights. A reader is kept in ``lm.warm``, so that quantizing happens once.
    backend : {"torch", "llama.cpp"}
        ``torch`` computes in integers and gives the same logits everywhere. ``llama.cpp`` is pinned: to its version,
        the instructions of the processor and one thread.

    Raises
    ------
    OptionError
        Another backend.
    """
    if backend not in BACKENDS:
        raise OptionError("backend", backend, " or ".join(BACKENDS))
    key = ("codec reader", backend)
    if key not in lm.warm:
        if backend == "torch":
            from tokenary.codec.integer import IntegerLlama

            lm.warm[key] = {"reader": IntegerLlama(lm)}
        else:
            from tokenary.codec.llama_cpp import LlamaCpp

            lm.warm[key] = {"reader": LlamaCpp(lm)}
    return lm.warm[key]["reader"]


def codec_from(text: str) -> TextCodec:
    """Build a method of the room from its text, such as ``nacrith:lanes=4``.

    Raises
    ------
    UnknownNameError
        No such codec.
    """
    step = Step.parse(text)
    if step.card.slot != "codec":
        raise UnknownNameError("codec", step.slug, [card.slug for card in cards(room="codec")])
    return step.build()


def machine_of(header: Header, lm: LM) -> Machine:
    """Return the machine that an archive was written with.

    Raises
    ------
    InputError
        Other weights, a backend that is not here, or an arithmetic that gives other probabilities.
    """
    if bytes.fromhex(lm.fingerprint)[:16] != header.fingerprint:
        raise InputError(
            f"the archive was written with the model {header.model}, weights {header.fingerprint.hex()[:12]}...;"
            f" {lm.name} here has {lm.fingerprint[:12]}..."
        )
    reader = reader_for(lm, header.backend.partition("/")[0])
    if reader.name != header.backend:
        raise InputError(f"the archive was written by {header.backend}; here is {reader.name}")
    try:
        codec = codec_from(header.codec)
    except UnknownNameError as error:
        raise InputError(f"the archive was written with {header.codec}: {error}") from error
    machine = machine_for(lm, codec, reader)
    if machine.check() != header.check:
        raise InputError(
            f"{header.backend} on this machine does not give the probabilities that the archive was written with"
        )
    return machine
