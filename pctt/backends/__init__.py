from pctt.backends.operations import BACKENDS, Backend, BackendUnavailable, backend

__all__ = ["BACKENDS", "Backend", "BackendUnavailable", "backend"]
