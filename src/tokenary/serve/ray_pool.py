"""A pool of replicas on Ray Serve: the HTTP process stays the only door, the models run on the cluster.

Each replica is a Serve application of its own without a route, so that it is known here which recipes run where. Ray
starts one again that dies, and a call to it waits until it is there. Two kinds of calls stream back: `Replica.life` for
as long as a replica lives, and `Replica.write` for each request. Breaking off the latter cancels its jobs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tokenary.core.errors import OptionError, TokenaryError
from tokenary.core.files import one_line
from tokenary.serve.base_pool import FIRST_PAUSE, FIRST_TRIES, LEAVING, LONGEST_PAUSE, LOST, BasePool
from tokenary.serve.protocol import Failed, Job
from tokenary.serve.ray_replica import Replica
from tokenary.serve.settings import Settings
from tokenary.serve.worker import Ready, Refused
from tokenary.tokenize.engine_ray import connect

log = logging.getLogger("tokenary.serve")


@dataclass(eq=False)
class Slot:
    """A replica as it is seen from here.

    Parameters
    ----------
    name : str
        Of its application.
    ready : bool
        Whether it can take jobs.
    lanes : Counter
        Texts that it writes, by recipe.
    resident_bytes : int
        Its memory.
    handle : DeploymentHandle
        Reaches it.
    """

    name: str
    ready: bool = False
    lanes: Counter[str] = field(default_factory=Counter)
    resident_bytes: int = 0
    handle: Any = None

    @property
    def load(self) -> int:
        """Texts that it writes."""
        return self.lanes.total()


def choose(slots: Sequence[Slot], recipe: str, width: int) -> Slot:
    """Return the replica for texts of a recipe: one that writes such texts and has room in that batch, else the idlest.

    Parameters
    ----------
    slots : sequence of Slot
        Replicas; at least one is ready.
    recipe : str
        Canonical text.
    width : int
        Texts of a recipe that are written together; one that has so many more to do than the idlest is passed over.
    """
    ready = [slot for slot in slots if slot.ready]
    least = min(slot.load for slot in ready)
    return min(ready, key=lambda slot: (not (0 < slot.lanes[recipe] < width and slot.load < least + width), slot.load))


class RayPool(BasePool):
    """Replicas on Ray Serve.

    Parameters
    ----------
    settings : Settings
        ``replicas``, ``address`` and ``gpus``, and what all pools need.

    Raises
    ------
    TokenaryError
        If Ray is not installed, or the address is that of Ray's client mode, which does not stream.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        try:
            import ray.serve
        except ImportError:
            raise TokenaryError("the engine ray needs Ray Serve: pip install 'tokenary[ray]'") from None
        if (settings.address or "").startswith("ray://"):
            raise OptionError("address", settings.address, "auto or host:port, on a machine of the cluster")
        self._ray = ray
        group = uuid.uuid4().hex[:8]  # several servers may use one cluster
        self.slots = [Slot(f"tokenary-{group}-{number}") for number in range(settings.replicas)]
        self._relays: dict[str, asyncio.Task[None]] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._deaths = 0
        self._connected = False

    async def start(self) -> None:
        """Reach the cluster, or start one here, and deploy; returns before any of that is done."""
        self.refused = asyncio.get_running_loop().create_future()
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        try:
            await asyncio.to_thread(self._deploy)
        except TokenaryError as error:
            self._refuse(str(error))
            return
        if self.state == "stopped":
            return
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in self.slots]

    async def stop(self) -> None:
        """End all jobs and remove the replicas; a cluster that was started here ends too."""
        self.state = "stopped"
        self.give_up(LEAVING)
        await self._starting  # a cluster that is half there cannot be ended
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.to_thread(self._remove)

    def give_up(self, message: str) -> None:
        """End all jobs with 503."""
        super().give_up(message)
        for task in self._relays.values():
            task.cancel()

    @property
    def resident_bytes(self) -> int:
        """Memory of the replicas."""
        return sum(slot.resident_bytes for slot in self.slots)

    def _deploy(self) -> None:
        """Reach the cluster and start the replicas; blocks."""
        if not self._ray.is_initialized():
            here = max(os.cpu_count() or 1, self._settings.replicas * self._cpus)
            connect(self._ray, self._settings.address, here)
            self._connected = True
        if self.state == "stopped":
            return
        serve, given = self._ray.serve, self._settings
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells of every start and end on stderr
        logs = {"log_level": "ERROR", "enable_access_log": False}
        options = {name: getattr(given, name) for name in ("engine", "engine_options", "max_jobs", "stall")}
        deployment = serve.deployment(Replica).options(
            num_replicas=1,
            max_ongoing_requests=given.max_jobs + 8,  # the jobs are bounded here, so that none waits in between
            ray_actor_options={"num_cpus": self._cpus, "num_gpus": given.gpus},
            health_check_period_s=2,
            graceful_shutdown_timeout_s=2,
            graceful_shutdown_wait_loop_s=0.2,
            logging_config=logs,
        )
        try:
            serve.start(proxy_location="Disabled", logging_config=logs)
            targets = [serve.RunTarget(deployment.bind(options), slot.name, None, logs) for slot in self.slots]
            for slot, handle in zip(
                self.slots, serve.run_many(targets, wait_for_applications_running=False), strict=True
            ):
                slot.handle = handle.options(stream=True)
        except Exception as error:  # of many classes
            raise TokenaryError(f"Ray Serve failed: {one_line(error)}") from error

    @property
    def _cpus(self) -> int:
        """Cores that a replica asks for: its threads, or its share of this machine."""
        given, here = self._settings, 1 if self._settings.address else os.cpu_count() or 1
        return int(given.engine_options.get("threads") or max(1, here // given.replicas))

    def _remove(self) -> None:
        """Remove the replicas; blocks."""
        if self._settings.address is not None or not self._connected:  # else they end with their cluster
            names = [slot.name for slot in self.slots if slot.handle is not None]
            with contextlib.suppress(Exception), ThreadPoolExecutor(len(self.slots)) as threads:  # it may be gone
                list(threads.map(self._ray.serve.delete, names))
        if self._connected:
            self._ray.shutdown()

    async def _keep(self, slot: Slot) -> None:
        """Follow the life of a replica, and of those that Ray starts in its place."""
        pause = FIRST_PAUSE
        while self.state != "stopped":
            life = slot.handle.life.remote()
            try:
                async for said in life:
                    self._hear(slot, said)
            except asyncio.CancelledError:
                life.cancel()
                raise
            except Exception as error:  # of many classes, Ray's and Serve's
                log.error("the replica %s ended: %s", slot.name, type(error).__name__)
            pause = FIRST_PAUSE if slot.ready else min(2 * pause, LONGEST_PAUSE)
            slot.ready, slot.resident_bytes = False, 0
            self._set_state()
            self._deaths += 1
            tries = FIRST_TRIES * len(self.slots)
            if self.info is None and self._deaths >= tries:
                self._refuse(f"the replicas died {tries} times while they loaded the model")
            if self.refused.done():
                return
            await asyncio.sleep(pause)
            self.restarts += 1

    def _hear(self, slot: Slot, said: Ready | Refused | int) -> None:
        """Note what a replica says of itself."""
        if isinstance(said, Refused):
            log.error("the model cannot be loaded: %s", said.message)
            if self.info is None:
                self._refuse(said.message)
        elif isinstance(said, Ready):
            self.info, slot.ready = said, True
            log.info("the replica %s is ready", slot.name)
        else:
            slot.resident_bytes = said
        self._set_state()

    def _set_state(self) -> None:
        if self.state != "stopped":
            ready = any(slot.ready for slot in self.slots)
            self.state = "ready" if ready else "loading" if self.info is None else "dead"

    def _send(self, jobs: Sequence[Job]) -> None:
        slot = choose(self.slots, jobs[0].recipe, self._settings.engine_options.get("max_batch", 8))
        slot.lanes[jobs[0].recipe] += len(jobs)
        task = asyncio.create_task(self._relay(slot, jobs))
        task.add_done_callback(lambda task: self._relayed(task, slot, jobs))
        self._relays.update(dict.fromkeys((job.id for job in jobs), task))

    def _send_cancel(self, ids: Collection[str]) -> None:
        for task in {self._relays[id] for id in ids if id in self._relays}:
            task.cancel()

    async def _relay(self, slot: Slot, jobs: Sequence[Job]) -> None:
        """Have a replica write the texts of a request, and pass on what it says."""
        response = None
        try:
            response = slot.handle.write.remote(list(jobs))
            async for events in response:
                for event in events:
                    self._pass_on(event)
        except asyncio.CancelledError:
            if response is not None:
                response.cancel()
            raise
        except Exception as error:  # of many classes, Ray's and Serve's
            log.error("a request on %s was lost: %s", slot.name, type(error).__name__)

    def _relayed(self, task: asyncio.Task[None], slot: Slot, jobs: Sequence[Job]) -> None:
        """Forget a request; what has not ended was lost."""
        slot.lanes -= Counter({jobs[0].recipe: len(jobs)})  # keeps what is above 0
        for job in jobs:
            if self._relays.get(job.id) is task:
                del self._relays[job.id]
                self._pass_on(Failed(job.id, 503, LOST))
