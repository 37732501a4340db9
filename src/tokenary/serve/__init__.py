"""The HTTP server and its playground: OpenAI's interface, a recipe per request.

Two processes. The HTTP process (`app`) checks, tokenizes and limits; the worker process (`worker`) owns the model and
runs the `engine`, which batches the jobs of one recipe continuously. They exchange the values of `protocol`.
"""
