"""``tokenary serve``: an OpenAI-compatible server with a recipe per request, and a playground."""

from __future__ import annotations

from pathlib import Path

import typer

from tokenary.cli.generate import DTYPE, MODEL, THREADS

ENGINE = typer.Option("local", "--engine", help="local: a model on this machine; ray: replicas on Ray Serve.")
REPLICAS = typer.Option(1, "--replicas", min=1, help="With --engine ray: models that are loaded.")
ADDRESS = typer.Option(None, "--address", help="Of a Ray cluster; without one it is started here, for as long.")
GPUS = typer.Option(0.0, "--gpus", min=0.0, help="With --engine ray: GPUs for each replica.")


def serve(
    model: str = MODEL,
    name: str = typer.Option("", "--name", help="What requests call the model; by default its own name."),
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on; a public one needs a key."),
    port: int = typer.Option(8000, "--port", "-p", help="Port to listen on; 0 takes a free one."),
    api_key_file: Path = typer.Option(None, "--api-key-file", help="File with the key that every caller must have."),
    deadline: float = typer.Option(60.0, "--deadline", help="Seconds for a request; a client may ask for less."),
    max_wait: float = typer.Option(
        30.0, "--max-wait", help="Seconds in the queue; then a request is refused with 429."
    ),
    drain: float = typer.Option(30.0, "--drain", help="Seconds that running requests are given after SIGTERM."),
    max_in_flight: int = typer.Option(128, "--max-in-flight", help="Requests at a time; more are refused with 429."),
    max_new_tokens: int = typer.Option(512, "--max-new-tokens", "-n", help="Most tokens where a request is silent."),
    playground: bool = typer.Option(True, "--playground/--no-playground", help="Serve the playground at /."),
    dtype: str = DTYPE,
    threads: int = THREADS,
    engine: str = ENGINE,
    replicas: int = REPLICAS,
    address: str = ADDRESS,
    gpus: float = GPUS,
) -> None:
    """Serve a model under OpenAI's interface; each request may bring its own recipe.

    A recipe stands in the model's name (smollm2+token-recycling) or in the field tokenary.recipe. The playground at /
    shows the tokens as they come. SIGTERM and Ctrl-C let running requests finish. With --engine ray, this process
    remains the only door, and the models run in replicas on a Ray cluster.

    Example: [bold]tokenary serve --model smollm2 --port 8000[/bold]
    """
    from tokenary.core.errors import InputError
    from tokenary.serve.settings import Settings, read_key

    key, jobs = None if api_key_file is None else read_key(api_key_file), 2 * max_in_flight
    settings = Settings(
        model=model, name=name, host=host, port=port, api_key=key, deadline=deadline, max_wait=max_wait,
        drain=drain, max_in_flight=max_in_flight, max_jobs=jobs, max_new_tokens=max_new_tokens,
        playground=playground,
        engine_options={"model": model, "dtype": dtype, "threads": threads, "max_waiting": jobs},
        backend=engine, replicas=replicas, address=address, gpus=gpus,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        from tokenary.serve.server import run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "h11", "starlette"):
            raise
        raise InputError(f"the server needs {error.name}: pip install 'tokenary[serve]'") from None
    run(settings)
